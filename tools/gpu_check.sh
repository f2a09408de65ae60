#!/usr/bin/env bash
# Everything that needs a GPU, in one command: one table, one JSON file.
#
#     bash tools/gpu_check.sh [--plan] [--call N] [--wheels FOLDER] [--trt8 trt8/run] [--data FOLDER] [--out FOLDER]
#                             [--seconds 300] [--only STEP,STEP] [--dry]
#
# --plan prints what a lent machine does in its minutes, and the size of what travels. --call N runs one of its calls.
# For a machine without a network: FOLDER holds wheels of packages that its Python lacks (`tools/gpu_prepare.sh` fetches
# them); they are unpacked once into a temporary folder and put on PYTHONPATH.
# --trt8 names the launcher of an old TensorRT (tensorrt_worker.py speaks 8.5 and newer). --dry runs every step small and
# on the CPU. Without a GPU every other step says so and is skipped.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --wheels)
      packages=${TMPDIR:-/tmp}/compressor-wheels
      if [ -d "$2" ]; then
        mkdir -p "$packages"
        for wheel in "$2"/*.whl; do "$python" -m zipfile -e "$wheel" "$packages"; done
      fi
      export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
      shift 2 ;;
    --trt8)
      if [ -x "$2" ]; then
        COMPRESSOR_TENSORRT_PYTHON=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
        export COMPRESSOR_TENSORRT_PYTHON
      else
        echo "gpu_check: $2 is not there; without it TensorRT is looked for in this Python"
      fi
      shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
# The server that steps are forked from takes its path from here alone, and would leave out what it cannot import.
export PYTHONPATH=$root:$root/tools${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
exec "$python" "$root/tools/gpu_check.py" ${arguments[@]+"${arguments[@]}"}
