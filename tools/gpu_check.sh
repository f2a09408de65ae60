#!/usr/bin/env bash
# Everything that needs a GPU, in one command: one table, one JSON file.
#
#     bash tools/gpu_check.sh [--wheels FOLDER] [--trt8 trt8/run] [--out FOLDER] [--minutes 8] [--dry]
#
# For a machine without a network: FOLDER holds wheels of packages that its Python lacks (onnxscript, onnx-ir,
# onnx-graphsurgeon, safetensors, typer, rich, optuna, cmaes, sqlalchemy, alembic, Mako, colorlog, tensorly, ...); they are
# unpacked into a temporary folder and put on PYTHONPATH.
# --trt8 names the launcher of an old TensorRT (tensorrt_worker.py speaks 8.5 and newer). --dry runs every step small and
# on the CPU. Without a GPU every other step says so and is skipped.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --wheels)
      packages=$(mktemp -d)
      for wheel in "$2"/*.whl; do "$python" -m zipfile -e "$wheel" "$packages"; done
      export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
      shift 2 ;;
    --trt8)
      COMPRESSOR_TENSORRT_PYTHON=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
      export COMPRESSOR_TENSORRT_PYTHON
      shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" "$root/tools/gpu_check.py" ${arguments[@]+"${arguments[@]}"}
