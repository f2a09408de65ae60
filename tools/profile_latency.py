"""`compressor profile` as a script: for a device that has a clone (or a copy of it) and no installed package.

    python tools/profile_latency.py net.py:resnet56 --shape 1x3x32x32 --precision fp32,fp16 --batch 1,8 --layers

It needs the packages that pyproject.toml lists; the folders to copy are compressor, passes, runtime and tools.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    "torch",
    "numpy",
    "scipy",
    "onnx",
    "onnxscript",
    "onnx_graphsurgeon",
    "onnxruntime",
    "safetensors",
    "typer",
    "rich",
    "matplotlib",
)


def main() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"profile_latency: this Python lacks {', '.join(missing)}: pip install {' '.join(missing).replace('_', '-')}")
    if not (ROOT / "compressor" / "runtime" / "__init__.py").exists():
        sys.exit(f"profile_latency: {ROOT} is no clone: copy the folders compressor, passes, runtime and tools, links included")
    sys.path.insert(0, str(ROOT))
    from compressor.cli.main import main as command

    sys.argv = ["compressor", "profile", *sys.argv[1:]]
    command()


if __name__ == "__main__":
    main()
