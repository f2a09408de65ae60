"""The package: links resolve, tables equal the disk, the gate checks what it should."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = {"compressor": "compressor", "compressor.passes": "passes", "compressor.runtime": "runtime"}


def packages_on_disk():
    found = set()
    for package, folder in ROOMS.items():
        for file in (ROOT / folder).rglob("__init__.py"):
            parts = file.parent.relative_to(ROOT / folder).parts
            if not (package == "compressor" and parts and parts[0] in ("passes", "runtime")):
                found.add(".".join([package, *parts]))
    return found


def test_links_resolve_to_the_rooms_and_are_relative():
    for name in ("passes", "runtime"):
        link = ROOT / "compressor" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
        assert (link / "__init__.py").is_file()


def test_declared_packages_are_those_on_disk():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()
    for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items():
        assert (ROOT / folder / "__init__.py").is_file(), package


def test_pre_commit_has_the_locked_versions():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    (ruff,) = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("ruff==")]
    assert f"rev: v{ruff.removeprefix('ruff==')}" in hooks


STAND_ALONE = {"tensorrt_worker.py": 550}  # copied to devices as one file


def test_every_room_has_a_docstring_and_files_stay_readable():
    for folder in ("compressor", "passes", "runtime"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            assert text.startswith('"""'), file
            assert text.count("\n") <= STAND_ALONE.get(file.name, 350), f"{file} is longer than ten minutes of reading"


def test_the_type_checker_sees_the_whole_package():
    found = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False)
    if "No module named mypy" in found.stderr:
        pytest.skip("mypy is not installed")
    assert found.returncode == 0, found.stdout
    count = sum(len(list((ROOT / folder).rglob("*.py"))) for folder in ("compressor", "passes", "runtime"))
    assert f"in {count} source files" in found.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build", reason="the package `build` is not installed")
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    expected = {"compressor/py.typed"}
    for package, folder in ROOMS.items():
        for file in (ROOT / folder).rglob("*.py"):
            relative = file.relative_to(ROOT / folder)
            if not (package == "compressor" and relative.parts[0] in ("passes", "runtime")):
                expected.add(f"{package.replace('.', '/')}/{relative.as_posix()}")
    assert set(names) == expected


@pytest.mark.slow
@pytest.mark.timeout(2400)  # a fresh environment takes minutes to install
def test_the_wheel_works_in_a_clean_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    lock = ROOT / "requirements.lock"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", lock, f"{wheel}[demo]"], check=True, cwd=tmp_path)
    script = tmp_path / "venv" / "bin" / "compressor"
    found = subprocess.run([script, "demo", "--out", tmp_path / "demo"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "budget latency" in found.stdout
