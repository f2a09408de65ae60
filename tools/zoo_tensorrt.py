"""The zoo's short list through the real parser and builder of TensorRT-RTX, which need no GPU.

    python tools/zoo_tensorrt.py [--only resnet]

Every network as it is and pruned at 50 %, at FP32, FP16 and INT8 (Q/DQ), with a dynamic batch where the network has one.
Prints a table and writes tools/results/zoo-tensorrt-rtx.json.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHORT = Path(__file__).with_name("zoo_short.txt")
RESULTS = Path(__file__).parent / "results" / "zoo-tensorrt-rtx.json"


def short_list() -> list[tuple[str, ...]]:
    return [tuple(line.split()) for line in SHORT.read_text().splitlines() if line]


def compile_all(entry) -> list[dict[str, object]]:
    """One row per variant and precision; raises BackendError where TensorRT refuses."""
    import compressor
    from compressor.passes.transforms.remove_channels import RemoveChannels
    from tools.zoo_build import build

    model, inputs = build(*entry)
    graph = compressor.trace(model, inputs)
    channels = compressor.analyze(graph)
    small = RemoveChannels(channels.plan(0.5), channels)(graph).graph
    return [row for name, variant in (("original", graph), ("pruned", small)) for row in compile_one(entry[3], name, variant)]


def compile_one(network, variant, graph) -> list[dict[str, object]]:
    import compressor
    from compressor.passes.tracing.trace import DYNAMIC
    from compressor.runtime.backends import BACKENDS, Workload
    from compressor.runtime.measuring.measure import example_for

    batch = 2 if graph.meta[DYNAMIC] else graph.meta["compressor.inputs"][0][0][0]
    rows, workload = [], None
    for precision in ("fp32", "fp16", "int8"):
        target = compressor.Target("tensorrt-rtx", batch=batch, precision=precision, options={"max_batch": 4 * batch})
        workload = workload or Workload(example_for(graph, target), graph)
        with tempfile.TemporaryDirectory() as folder:
            found = BACKENDS["tensorrt-rtx"]().compile(workload, target, Path(folder) / "engine")
        keep = ("build_s", "engine_bytes", "network_types", "version")
        row = {"network": network, "variant": variant, "precision": precision, "dynamic": graph.meta[DYNAMIC]}
        rows.append(row | {name: found[name] for name in keep})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression on `library kind family name`")
    arguments = parser.parse_args()
    rows = []
    for entry in short_list():
        if re.search(arguments.only, " ".join(entry)):
            for row in compile_all(entry):
                rows.append(row)
                size = f"{row['engine_bytes'] / 1e6:8.2f} MB in {row['build_s']:6.2f} s"
                print(f"{row['network']:36s} {row['variant']:9s} {row['precision']:5s} {size}  {row['network_types']}", flush=True)
    if not arguments.only:
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
