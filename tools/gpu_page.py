"""The page `docs/gpu.md`, made from what GPUs have measured: `python tools/gpu_page.py [--collect FOLDER ...]`.

`--collect` first merges the files that the calls of the plan brought back into `tools/results/gpu-<device>.json`: later
rows of a step replace earlier ones (of latencies, those of the same network and target), a step without rows replaces
none. What was expected stands in `EXPECTED`, written before anything was measured; the page says of each expectation
whether it held.
"""

import argparse
import json
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "tools" / "results", ROOT / "docs" / "gpu.md"
REMOVED = " % removed"
WIDTHS = (
    "Median of one run; in brackets the share of the whole network's. Removed are equal shares of every width, rounded to no step: "
    "12 channels instead of 16 make the quarter of ResNet-56 slower than the whole. Searches ask for widths of `Target.align`."
)


def rows_of(results, step):
    return results["steps"].get(step, {}).get("rows", [])


def median_ms(results, network, batch, precision="fp16", mode="cudagraph"):
    wanted = (network, batch, precision, mode)
    for row in rows_of(results, "latency"):
        if (row["network"], row["batch"], row["precision"], row["options"].get("mode")) == wanted:
            return row["median_ms"]
    return None


def ratio(results, over, under):
    """Of two medians; None where one was not measured."""
    a, b = median_ms(results, *over), median_ms(results, *under)
    return None if a is None or b is None else a / b


def worst(results, step, key):
    found = [row[key] for row in rows_of(results, step) if key in row]
    return max(found) if found else None


def compressed(results):
    found = [row["ratio"] for row in rows_of(results, "compress") if "ratio" in row]
    return statistics.median(found) if found else None


def again(results):
    """Relative difference of a network's medians between sessions with engines built anew."""
    medians = [row["original_ms"] for row in rows_of(results, "compress") if "original_ms" in row]
    return max(medians) / min(medians) - 1 if len(medians) > 1 else None


def enqueues(results):
    """How far events around single enqueues are from samples of many, without a CUDA graph's gain."""
    found = [abs(row["graph_ms"] / row["median_ms"] - 1) for row in rows_of(results, "tensorrt") if "graph_ms" in row]
    return max(found) if found else None


def off_eight(results):
    """Share of the right edges that are no multiples of 8."""
    edges = [edge for row in rows_of(results, "staircase") for edge in row.get("edges", ())]
    return sum(edge % 8 != 0 for edge in edges) / len(edges) if edges else None


EXPECTED = (  # what, how it is read from the rows, least, most
    ("ResNet-50, FP16, batch 8: half of all widths is at least 1.8 times as fast",
     lambda r: ratio(r, ("resnet50", 8), ("resnet50 50 % removed", 8)), 1.8, None),
    ("ResNet-50, FP16, batch 1 is bound by launches: half of all widths gains less than 1.5 times",
     lambda r: ratio(r, ("resnet50", 1), ("resnet50 50 % removed", 1)), None, 1.5),
    ("`compress` to half of ResNet-50's latency is measured at 0.52 or less, engines built anew", compressed, None, 0.52),
    ("the same network in three sessions: medians within 1 %", again, None, 0.01),
    ("the latency model's median error on structures that it has not seen is 3 % or less",
     lambda r: worst(r, "latency-model", "median_error"), None, 0.03),
    ("right edges of staircases are multiples of 8", off_eight, None, 0.0),
    ("compensation on the GPU gives the outputs of the CPU's, within 1e-3",
     lambda r: worst(r, "compensation", "relative_difference"), None, 1e-3),
    ("TensorRT's outputs agree with PyTorch's: FP16 1e-2 (INT8 0.2 is checked before timing)",
     lambda r: max((x["parity"] for x in rows_of(r, "tensorrt") if x["precision"] == "fp16" and "parity" in x), default=None),
     None, 1e-2),
    ("events around each replay agree with our samples of TensorRT, within 2 %", enqueues, None, 0.02),
)  # fmt: skip


def verdict(found, least, most):
    if found is None:
        return "not measured"
    return "held" if (least is None or found >= least) and (most is None or found <= most) else "**did not hold**"


def number(value):
    return "" if value is None else f"{value:.3g}"


def latencies(results):
    """Rows by network, a column for each batch and precision."""
    rows = [row for row in rows_of(results, "latency") if "median_ms" in row]
    if not rows:
        return []
    columns = list(dict.fromkeys((r["batch"], r["precision"], r["options"].get("mode", "")) for r in rows))
    names = dict.fromkeys(r["network"] for r in rows)
    at = {(r["network"], (r["batch"], r["precision"], r["options"].get("mode", ""))): r for r in rows}
    lines = ["| ms | " + " | ".join(f"{p.upper()}, batch {b}, {m}" for b, p, m in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name in names:
        cells = []
        for column in columns:
            row, base = at.get((name, column)), at.get((name.split(" ")[0], column))
            share = f" ({row['median_ms'] / base['median_ms']:.2f})" if row and base and row is not base else ""
            note = "" if not row or row["status"] == "ok" else f" {row['status']}"
            cells.append(f"{row['median_ms']:.3f}{share}{note}" if row else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return ["", "### Latency", "", WIDTHS, "", *lines]


def compressions(results):
    """What was compressed, and what that rests on."""
    lines = []
    for row in rows_of(results, "compress"):
        if "macs_share" in row:
            found = f"{row['latency_ratio']:.3f} of the latency with {row['macs_share']:.3f} of the MACs"
            lines += ["", "### Compressed", "", f"`{row['method']}`, {row['seconds']:.0f} s: {found}."]
    for row in rows_of(results, "fine-tune"):
        before, after = row["test"]
        found = f"`CaP()` to {row['macs_share']:.3f} of the MACs: {before:.2f} % before, {after:.2f} % after, on the test images"
        lines += ["", f"ResNet-56, {found} ({row['epochs']} epochs of {row['images']:,} images, {row['seconds']:.0f} s)."]
    for row in rows_of(results, "compensation"):
        took = f"{row['cuda_s']:.1f} s on the GPU, {row['cpu_s']:.1f} s on the CPU beside it"
        lines += ["", f"Compensation of a halved ResNet-50 on {row['images']} images: {took}."]
    for row in rows_of(results, "latency-model"):
        found = f"{100 * row['median_error']:.1f} %, nine in ten below {100 * row['p90_error']:.1f} %"
        lines += [
            "",
            f"Latency model of {row['network']}, {row['engines']} engines: median error on {row['structures']} others {found}.",
        ]
    for row in rows_of(results, "staircase"):
        if "edges" in row:
            lines += ["", f"Right edges of `{row['group']}` in {row['network']}: {', '.join(map(str, row['edges']))}."]
    return lines


def section(results):
    about = results["environment"]
    where = f"driver {about.get('driver')}, CUDA {about.get('cuda')}, cuDNN {about.get('cudnn')}, PyTorch {about['torch']}"
    lines = [f"## {about['device']}", "", f"{where}, Python {about['python']}.", "", "| expected | found | |", "|---|---:|---|"]
    for said, read, least, most in EXPECTED:
        found = read(results)
        lines.append(f"| {said} | {number(found)} | {verdict(found, least, most)} |")
    lines += latencies(results)
    lines += compressions(results)
    engines = [row for row in rows_of(results, "tensorrt") if "median_ms" in row]
    if engines:
        version = f"TensorRT {engines[0]['build']['version']}, batch 8; each engine beside PyTorch's CUDA graph, in one session."
        lines += ["", "### TensorRT", "", version, ""]
        lines += ["| network | precision | ms | CUDA graph, FP16 | off PyTorch by | built in |", "|---|---|---:|---:|---:|---:|"]
        lines += [engine_line(row, engines) for row in engines]
    lines += ["", "### Steps", "", "| step | | seconds | |", "|---|---|---:|---|"]
    for name, found in results["steps"].items():
        reason = found.get("reason", "").split(".")[0][:120]
        lines.append(f"| {name} | {found['status']} | {found.get('seconds', 0):.0f} | {reason} |")
    return lines


def engine_line(row, engines):
    whole = [r["median_ms"] for r in engines if (r["network"], r["precision"]) == (row["network"].split(" ")[0], row["precision"])]
    share = f" ({row['median_ms'] / whole[0]:.2f})" if REMOVED in row["network"] and whole else ""
    cells = [row["network"], row["precision"].upper(), f"{row['median_ms']:.3f}{share}", f"{row['cudagraph_fp16_ms']:.3f}"]
    cells += [f"{row['parity']:.4f}", f"{row['build']['build_s']:.0f} s"]
    return f"| {' | '.join(cells)} |"


def page(everything):
    lines = [
        "# Measured on GPUs",
        "",
        "Made by `python tools/gpu_page.py` from `tools/results/gpu-*.json`; measured by `bash tools/gpu_check.sh`.",
        "",
    ]
    if not everything:
        return "\n".join([*lines, "No GPU has run it yet.", ""])
    for results in everything:
        lines += [*section(results), ""]
    return "\n".join(lines)


def same(row):
    """What a latency is of, a later row of the same replaces an earlier one; nothing for a row without a batch."""
    return [row.get(name) for name in ("batch", "network", "backend", "precision", "options")]


def merged(files):
    """One result of many calls on one device; the order is that of the files."""
    found = None
    for file in files:
        results = json.loads(Path(file).read_text())
        if found is None:
            found = {**results, "steps": {}}
        if results["environment"]["device"] != found["environment"]["device"]:
            raise SystemExit(f"gpu_page: {file} is of {results['environment']['device']}, not {found['environment']['device']}")
        for name, step in results["steps"].items():
            if step["rows"] or not found["steps"].get(name, {}).get("rows"):
                older = found["steps"].get(name, {}).get("rows", [])
                rows = [
                    row
                    for row in older
                    if isinstance(row, dict) and "batch" in row and all(same(row) != same(new) for new in step["rows"])
                ]
                found["steps"][name] = {key: value for key, value in step.items() if key != "where"} | {
                    "rows": [*rows, *step["rows"]]
                }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", nargs="+", type=Path, default=[], help="files of the calls, in their order")
    arguments = parser.parse_args()
    if arguments.collect:
        results = merged(arguments.collect)
        label = "".join(c if c.isalnum() else "-" for c in results["environment"]["device"]).lower()
        (RESULTS / f"gpu-{label}.json").write_text(json.dumps(results, indent=1) + "\n")
    everything = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("gpu-*.json"))]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page([results for results in everything if not results["dry"]]))
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
