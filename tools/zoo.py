"""Channel analysis on the networks that people use: every torchvision classifier and segmentation model, and timm's families.

    python tools/zoo.py                       # all of tools/zoo_models.txt, two at a time; goes on where it stopped
    python tools/zoo.py --only resnet --jobs 1

For each model, with random weights: trace, analysis, random plans at 25, 50 and 75 %, removed = masked, the parameters left, and at
50 % ONNX export and parity in ONNX Runtime. One process per model, so that a crash costs that model only. Rows go to `--work`,
one file per model; the table to `tools/results/zoo.*`. *Pruned effectively* means that at 50 % at most 40 % of the parameters of
the prunable layers are left, removed = masked at every ratio, and ONNX Runtime agrees with PyTorch.
"""

import argparse
import collections
import contextlib
import csv
import json
import multiprocessing
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.zoo_build import CLASSES, build  # noqa: E402 - the clone's root has just been put on the path

MODELS = Path(__file__).with_name("zoo_models.txt")
RATIOS = (0.25, 0.5, 0.75)
LEFT = 0.4  # share of the prunable layers' parameters that an effective plan at 50 % may leave


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--only", default="", help="regular expression on `library kind family name`")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600, help="seconds per model")
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument("--again", default="", help="regular expression on the status of rows that are done again")
    parser.add_argument("--work", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    listed = [tuple(line.split()) for line in args.models.read_text().splitlines() if line and not line.startswith("#")]
    chosen = [entry for entry in listed if re.search(args.only, " ".join(entry))]
    todo = [entry for entry in chosen if not _done(args, entry)]
    print(f"{len(chosen)} models, {len(chosen) - len(todo)} of them done already", flush=True)
    run_all(todo, args)
    rows = [json.loads(_file(args.work, entry).read_text()) for entry in chosen if _file(args.work, entry).exists()]
    text = summary(rows)
    print(text)
    if len(chosen) == len(listed):
        args.results.mkdir(exist_ok=True)
        write_tables(rows, args.results, text)


def _file(work: Path, entry: tuple[str, ...]) -> Path:
    return work / f"{entry[0]}-{entry[3]}.json"


def _done(args: argparse.Namespace, entry: tuple[str, ...]) -> bool:
    file = _file(args.work, entry)
    return file.exists() and not (args.again and re.search(args.again, json.loads(file.read_text())["status"]))


def run_all(todo: list[tuple[str, ...]], args: argparse.Namespace) -> None:
    """A process per model, `--jobs` at a time."""
    context = multiprocessing.get_context("forkserver")  # imports once, forks per model
    context.set_forkserver_preload(["tools.zoo_imports"])
    os.chdir(ROOT)
    waiting, running = list(todo), {}
    while waiting or running:
        while waiting and len(running) < args.jobs:
            entry = waiting.pop(0)
            process = context.Process(target=examine, args=(entry, str(_file(args.work.resolve(), entry)), not args.no_onnx))
            process.start()
            running[entry] = (process, time.monotonic())
        time.sleep(0.05)
        for entry, (process, start) in list(running.items()):
            if process.is_alive() and time.monotonic() - start < args.limit:
                continue
            late = process.is_alive()
            if late:
                process.kill()
            process.join()
            del running[entry]
            file = _file(args.work.resolve(), entry)
            if late or process.exitcode:
                reason = f"took longer than {args.limit:.0f} s" if late else f"the process ended with {process.exitcode}"
                partial = json.loads(file.read_text()) if file.exists() else new_row(entry)
                _write(file, {**partial, "status": "timeout" if late else "crash", "reason": reason})
            row = json.loads(file.read_text())
            print(
                f"{row['name']:40s} {row['status']:14s} left {row.get('left_50', '')} {time.monotonic() - start:5.0f} s "
                f"{row['reason'][:110]}",
                flush=True,
            )


def new_row(entry: tuple[str, ...]) -> dict[str, object]:
    library, kind, family, name = entry
    return {"library": library, "kind": kind, "family": family, "name": name, "status": "crash", "reason": ""}


def _write(file: Path, row: dict[str, object]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(row, indent=1))
    temporary.replace(file)


def examine(entry: tuple[str, ...], file: str, onnx: bool) -> None:
    """Fill one row; runs in a process of its own."""
    import torch

    torch.set_num_threads(1)
    row = new_row(entry)
    try:
        examine_model(entry, row, onnx)
    except Exception as error:
        row["status"] = row.get("stage", "build")
        row["reason"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
    row.pop("stage", None)
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    _write(Path(file), row)


def examine_model(entry: tuple[str, ...], row: dict[str, object], onnx: bool) -> None:
    """Fill a row stage by stage, so that what fails leaves what came before."""
    import torch

    import compressor
    from compressor.passes.transforms.remove_channels import RemoveChannels
    from compressor.passes.transforms.verify import relative_error, run_masked

    row["stage"] = "build"
    model, inputs = build(*entry)
    row["input"] = list(inputs[0].shape[1:])
    row["params"] = sum(p.numel() for p in model.parameters())
    with _timed(row, "trace"):
        graph = compressor.trace(model, inputs)
    row["nodes"] = len(graph.graph.nodes)
    with torch.no_grad():
        original = flat(model(*inputs))
        if relative_error(flat(graph(*inputs)), original) > 1e-4:
            raise AssertionError("the traced graph gives other outputs than the model")
    del model
    with _timed(row, "analyze"):
        channels = compressor.analyze(graph)
    row["groups"], row["free_groups"] = len(channels.groups), len(channels.free)
    row["unknown"] = list(channels.unknown)[:20]
    row["frozen"] = dict(frozen_reasons(channels))
    prunable = prunable_tensors(channels)
    total = sum(p.numel() for p in graph.parameters())
    row["prunable_share"] = round(sum(prunable.values()) / max(total, 1), 4)
    small = None
    for ratio in RATIOS:
        percent = round(100 * ratio)
        with _timed(row, "plan"):
            plan = channels.plan(ratio, seed=percent)
        with _timed(row, "apply"):
            removed = RemoveChannels(plan, channels)(graph).graph
        with _timed(row, "verify"):
            error, effect = oracle(channels, plan, removed, inputs, original, run_masked)
        row[f"error_{percent}"], row[f"effect_{percent}"] = error, effect
        sizes = {name: t.numel() for name, t in removed.named_parameters()}
        row[f"left_{percent}"] = round(sum(sizes[n] for n in prunable) / max(sum(prunable.values()), 1), 4)
        small = removed if percent == 50 else small
    del graph, channels
    if onnx:
        export(row, small)
    row["status"], row["reason"] = verdict(row)


def oracle(channels, plan, removed, inputs, original, run_masked) -> tuple[float, float]:
    """Relative error of removed against masked, and how far the plan moves the outputs; in float64 where float32 is in doubt."""
    import torch

    from compressor.passes.transforms.verify import TOLERANCE, relative_error, verify_removal

    masked = run_masked(channels, plan, inputs)
    effect = relative_error(original, masked)
    with torch.no_grad():
        error = relative_error(flat(removed.eval()(*inputs)), masked)
    if error > TOLERANCE:  # rounding amplified by a deep random network, or a defect? float64 can tell
        channels.graph.double()
        error = verify_removal(channels, plan, removed.double(), [x.double() for x in inputs]).relative_error
        channels.graph.float()
        removed.float()
        if error > 1e-6:
            raise AssertionError(f"removed differs from masked by {error:.1e} in float64")
    else:
        error = max(error, verify_removal(channels, plan, removed).relative_error)  # at other batch sizes
    return error, effect


def export(row: dict[str, object], small) -> None:
    """ONNX at 50 %, and its parity in ONNX Runtime."""
    import tempfile

    from compressor.errors import BackendError
    from compressor.passes.tracing.trace import example_inputs_of
    from compressor.runtime.measuring.measure import check_onnx
    from compressor.runtime.onnx.export import to_onnx
    from compressor.runtime.onnx.precision import PARITY

    with _timed(row, "onnx"):
        proto = to_onnx(small, example_inputs_of(small))
    with _timed(row, "onnxruntime"), tempfile.TemporaryDirectory() as folder:
        import onnx

        path = Path(folder) / "model.onnx"
        onnx.save_model(proto, path, save_as_external_data=True, location="model.bin")  # some exceed what one file may hold
        try:
            row["parity"] = check_onnx(path, small)
        except BackendError as error:
            noise = rounding(small)
            if noise < PARITY["fp32"] / 10:
                raise
            message = f"on these random weights PyTorch's own float32 is off by {noise:.1e} from float64, so parity says nothing"
            raise AssertionError(f"{message} ({error})") from error


def rounding(graph) -> float:
    """Relative error of a graph in float32 against float64."""
    import torch

    from compressor.passes.tracing.trace import example_inputs_of
    from compressor.passes.transforms.verify import relative_error

    inputs = example_inputs_of(graph)
    with torch.no_grad():
        found = flat(graph(*inputs))
        expected = flat(graph.double()(*[x.double() for x in inputs]))
    graph.float()
    return relative_error(found, expected)


def verdict(row: dict[str, object]) -> tuple[str, str]:
    """Status and reason of a row that came to its end."""
    blocked = "; ".join(f"{reason} ({count})" for reason, count in list(row["frozen"].items())[:4])
    if not row["free_groups"]:
        return "nothing free", blocked
    if max(row[f"effect_{round(100 * r)}"] for r in RATIOS) < 1e-3:
        return "blind", "pruning does not move the outputs, so that the oracle proves nothing"
    if row["left_50"] > LEFT:
        return "little", f"{row['left_50']:.0%} of the prunable layers are left at 50 %; {blocked}"
    return "ok", blocked


@contextlib.contextmanager
def _timed(row: dict[str, object], stage: str) -> Iterator[None]:
    row["stage"] = stage
    start = time.perf_counter()
    yield
    row[f"{stage}_s"] = round(row.get(f"{stage}_s", 0.0) + time.perf_counter() - start, 4)


def flat(outputs) -> list:
    """Tensors of a nested output."""
    from compressor.passes.tracing.trace import outputs_of

    return outputs_of(outputs)


def prunable_tensors(channels) -> dict[str, int]:
    """Parameters along some axis of which channels may be removed, and their sizes."""
    free = {k for k, group in enumerate(channels.groups) if group.frozen is None}
    parameters = dict(channels.graph.named_parameters())
    names = {
        slot.name
        for slot in channels.walk.labeler.slots.values()
        if free & set(channels.grouping.group_of[slot.labels].tolist()) and slot.name in parameters
    }
    return {name: parameters[name].numel() for name in sorted(names)}


def frozen_reasons(channels) -> list[tuple[str, int]]:
    """Why channels stay, without the names of nodes, and how many; the outputs of the model are not worth a word."""
    counts: collections.Counter[str] = collections.Counter()
    for group in channels.groups:
        if group.frozen is not None and not group.frozen.startswith("model output"):
            counts[re.sub(r"`[^`]*`", "…", group.frozen)] += group.size
    return counts.most_common(8)


FIELDS = (
    "library", "kind", "family", "name", "status", "input", "params", "nodes", "groups", "free_groups", "prunable_share",
    "left_25", "left_50", "left_75", "error_25", "error_50", "error_75", "parity",
    "trace_s", "analyze_s", "plan_s", "apply_s", "verify_s", "onnx_s", "onnxruntime_s", "peak_mb", "reason",
)  # fmt: skip


def summary(rows: list[dict]) -> str:
    """Markdown: a total per kind and family, then everything that is not `ok`."""
    lines = [
        "| library | family | models | pruned effectively | prunable share | left at 50 % | not effective |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    kinds: dict[tuple[str, str], list[dict]] = {}
    families: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        kinds.setdefault((row["library"], row["kind"]), []).append(row)
        families.setdefault((row["library"], row["kind"], row["family"]), []).append(row)
    for (library, kind), own in kinds.items():
        lines.append(_line(f"**{library}**", f"**all {kind}**", own))
        lines += [_line(library, family, rs) for (lib, k, family), rs in families.items() if (lib, k) == (library, kind)]
    bad = [row for row in rows if row["status"] != "ok"]
    lines += ["", f"{len(rows) - len(bad)} of {len(rows)} models pruned effectively; the others:", ""]
    lines += [f"- {row['library']} {row['kind']} `{row['name']}`: {row['status']}: {row['reason']}" for row in bad]
    return "\n".join(lines)


def _line(library: str, family: str, rows: list[dict]) -> str:
    good = [row for row in rows if row["status"] == "ok"]
    share = _median([row["prunable_share"] for row in rows if "prunable_share" in row])
    left = _median([row["left_50"] for row in rows if "left_50" in row])
    bad = ", ".join(row["name"] for row in rows if row["status"] != "ok")
    return f"| {library} | {family} | {len(rows)} | {len(good)} ({len(good) / len(rows):.0%}) | {share} | {left} | {bad} |"


def _median(values: list[float]) -> str:
    return f"{sorted(values)[len(values) // 2]:.0%}" if values else ""


def write_tables(rows: list[dict], folder: Path, text: str) -> None:
    """`zoo.csv` with one row per model, `zoo.md` with the totals."""
    with (folder / "zoo.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "input": "x".join(map(str, row.get("input", [])))} for row in rows)
    import torch

    head = (
        "# Channel analysis on the networks that people use\n\n"
        f"`python tools/zoo.py`, torch {torch.__version__}, random weights, {CLASSES} classes.\n"
    )
    note = (
        "Medians over the models of a line. *Prunable share*: parameters of tensors from which channels may be removed, of all. "
        "*Left at 50 %*: what a random plan that removes half of every group leaves of those; "
        f"effective means at most {LEFT:.0%}.\n"
    )
    (folder / "zoo.md").write_text(f"{head}\n{note}\n{text}\n")


if __name__ == "__main__":
    main()
