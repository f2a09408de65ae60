#!/usr/bin/env bash
# What travels to a GPU machine without a network: wheels, data, the parts of TensorRT. Run from a clone.
#
#     bash tools/gpu_prepare.sh [--data FOLDER_WITH_cifar-10-batches-bin] [--weights resnet56.safetensors] [--parts FOLDER]
#
# The folders it makes (.whl, .gpu-data, .gpu-part0 …) have to be ignored by git. `gpu_check.sh --plan` then shows their sizes.
# The machine has Python 3.12, torch, torchvision, timm, onnx, onnxscript, onnxruntime, scipy, safetensors, typer, rich.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=(optuna==5.0.0 cmaes==0.13.1 SQLAlchemy==2.1.9 alembic==1.20.1 Mako==1.4.3 colorlog==6.12.0 tensorly==0.10.0
        onnx_graphsurgeon==0.6.1)
fetch() {
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$1" "${@:2}"
}
rm -rf .whl && fetch .whl "${wheels[@]}"
while [ $# -gt 0 ]; do
  case $1 in
    --data)  # 10,000 training images in the official form, and all test images
      mkdir -p .gpu-data
      "$python" - "$2" <<'PYTHON'
import io
import pathlib
import sys
import tarfile

source = pathlib.Path(sys.argv[1])
with tarfile.open(".gpu-data/cifar10.tar.xz", "w:xz", preset=6) as out:
    for name, images in [(f"data_batch_{k}.bin", 2000) for k in range(1, 6)] + [("test_batch.bin", 10000)]:
        data = (source / name).read_bytes()[: 3073 * images]
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        out.addfile(entry, io.BytesIO(data))
PYTHON
      shift 2 ;;
    --weights) mkdir -p .gpu-data && cp "$2" .gpu-data/resnet56.safetensors; shift 2 ;;
    --parts)
      for k in 0 1 2 3 4; do
        mkdir -p .gpu-part$k && cp "$2"/part.0$k .gpu-part$k/
      done
      cp "$2"/join_parts.sh .gpu-part4/
      fetch .gpu-part4 zstandard
      shift 2 ;;
    *) echo "gpu_prepare: unknown argument $1"; exit 2 ;;
  esac
done
bash tools/gpu_check.sh --plan
