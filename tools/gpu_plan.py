"""What is done in the minutes that a GPU machine is at hand: a few full calls, each complete in itself.

A call carries files to the machine (the repository, and ignored folders beside it) and runs one command there. The first
one answers the most by itself; each of the following brings a part of TensorRT and measures something meanwhile, so that
no transfer is idle. `bash tools/gpu_check.sh --plan` prints this plan with the sizes of what is there to travel.
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 64  # MiB that one call carries, the repository among them
LEASE_S = 900  # of the machine, its start and the transfers included
START_S = 45  # until the first command runs; 34 s were seen, 62 MiB among them
PARTS = 5  # of TensorRT, at most 60 MiB each
TENSORRT = "/tmp/compressor-tensorrt"


@dataclass(frozen=True)
class Step:
    """A step of `gpu_steps.py` and its share of the time.

    Attributes:
        name: Of the step.
        seconds: After which it is stopped; the rows so far are kept.
    """

    name: str
    seconds: int


@dataclass(frozen=True)
class Call:
    """One call of the machine.

    Attributes:
        carries: Ignored folders that travel with the repository.
        steps: What runs, in order.
        before: Shell commands before the check.
        arguments: Of the check.
        networks: Traced once, before the steps: those that several of them take.
        transfer_s: What the transfer is expected to take, and Python until the first step begins.
    """

    carries: tuple[str, ...]
    steps: tuple[Step, ...]
    before: str = ""
    arguments: str = ""
    networks: str = ""
    transfer_s: int = 18

    @property
    def seconds(self) -> int:
        """Limit of the steps together."""
        return sum(step.seconds for step in self.steps)

    def command(self, number: int) -> str:
        """What is typed on the machine; `$OUT` is where files come back from."""
        check = f"bash tools/gpu_check.sh --call {number} --out $OUT {self.arguments}".rstrip()
        return f"{self.before}{check}"


def _keep(k: int) -> str:
    return f"mkdir -p {TENSORRT}/parts && mv .gpu-part{k}/* {TENSORRT}/parts/ && "


WHEELS = "--wheels .whl"
JOIN = f"PYTHONPATH={TENSORRT}/site bash {TENSORRT}/parts/join_parts.sh {TENSORRT}/parts {TENSORRT} && "
CALLS = (
    Call((".whl", ".gpu-data"), (Step("compress", 110), Step("fine-tune", 60)), arguments=f"{WHEELS} --data .gpu-data"),
    Call((".gpu-part0",), (Step("latency", 75),), _keep(0), WHEELS),
    Call((".gpu-part1",), (Step("latency-model", 80),), _keep(1), WHEELS),
    Call((".gpu-part2",), (Step("staircase", 60), Step("compensation", 15)), _keep(2), WHEELS, "resnet50"),
    Call((".gpu-part3",), (Step("conformance", 60),), _keep(3), WHEELS),
    Call(
        (".gpu-part4",),
        (Step("tensorrt", 170), Step("compile", 30), Step("factorization", 30), Step("search", 20)),
        f"{_keep(4)}mkdir -p {TENSORRT}/site && python3 -m zipfile -e {TENSORRT}/parts/zstandard*.whl {TENSORRT}/site && {JOIN}",
        f"{WHEELS} --trt8 {TENSORRT}/trt8/run",
        "resnet50,mobilenet_v2",
    ),
)


def size_mb(folder):
    """MiB of the files in a folder, or None where it is not there."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20


def repository_mb(root=ROOT):
    """MiB of the files that git knows."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout.decode().split("\0")
    return sum((root / name).stat().st_size for name in names if name and (root / name).is_file()) / 2**20


def plan(root=ROOT):
    """The plan as text, and whether everything that is there fits."""
    own, lines, fits = repository_mb(root), [], True
    for number, call in enumerate(CALLS, 1):
        sizes = {folder: size_mb(root / folder) for folder in call.carries}
        total = own + sum(size or 0 for size in sizes.values())
        fits = fits and total <= LIMIT_MB
        travels = ", ".join(f"{folder} {'not prepared' if size is None else f'{size:.1f} MiB'}" for folder, size in sizes.items())
        steps = ", ".join(f"{step.name} {step.seconds} s" for step in call.steps)
        lines += [
            f"call {number}: {steps}; at most {call.seconds} s",
            f"  carries the repository {own:.1f} MiB, {travels}: {total:.1f} of {LIMIT_MB} MiB",
            f"  {call.command(number)}",
        ]
        files = [file for folder in call.carries for file in sorted((root / folder).glob("*")) if file.is_file()]
        lines += [f"    {file.stat().st_size / 2**20:6.2f} MiB  {file.name}" for file in files]
    total_s = START_S + sum(call.seconds + call.transfer_s for call in CALLS)
    lines.append(f"all calls: {total_s} of {LEASE_S} s, the start ({START_S} s) and the transfers among them")
    return "\n".join(lines), fits and total_s <= LEASE_S
