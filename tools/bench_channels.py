"""Speed and memory of the channel analysis against torch-pruning, in the same run, on one thread.

    python tools/bench_channels.py [--network resnet50 ...] [--repeats 5]

Each (network, tool) runs in a process of its own at 224x224, batch 1, tools in turn; medians over the repeats.

- compressor: `trace`, `analyze`, a random plan that removes half of every group, applying it with the analysis at hand.
- torch-pruning: building its dependency graph (`analyze_s`), pruning half of the channels in random order (`apply_s`);
  it has no step that corresponds to `trace`: it runs the model under autograd hooks while it builds the graph.

`peak_mb` is the rise of the process's peak memory over what it held after its imports, so the model's own weights are
part of it. Prints a table and writes one JSON row per network and tool to `tools/results/channels-cpu.json`.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NETWORKS = {
    "resnet50": ("torchvision", "resnet50"),
    "resnet152": ("torchvision", "resnet152"),
    "densenet201": ("torchvision", "densenet201"),
    "efficientnet_b0": ("torchvision", "efficientnet_b0"),
    "regnet_y_16gf": ("torchvision", "regnet_y_16gf"),
    "convnext_base": ("torchvision", "convnext_base"),
    "inception_v3": ("torchvision", "inception_v3"),
    "resnet56_cifar": ("cifar", "resnet56"),
}
TOOLS = ("compressor", "torch-pruning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "TOOL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    rows = []
    for network in args.network:
        found: dict[str, list[dict]] = {tool: [] for tool in TOOLS}
        for _ in range(args.repeats):
            for tool in TOOLS:  # in turn, so that a slow minute of the machine hits both
                found[tool].append(_in_process(network, tool))
        rows += [combine(found[tool]) for tool in TOOLS]
        print(json.dumps(rows[-2:]), flush=True)
    print(table(rows))
    if set(args.network) == set(NETWORKS):
        (args.results / "channels-cpu.json").write_text(json.dumps(rows, indent=1) + "\n")


def _in_process(network: str, tool: str) -> dict:
    done = subprocess.run([sys.executable, __file__, "--one", network, tool], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        return {"network": network, "tool": tool, "error": reason[:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def combine(rows: list[dict]) -> dict:
    """Medians of what was measured; the first error where there was one."""
    bad = next((row for row in rows if "error" in row), None)
    if bad is not None:
        return bad
    numbers = {k for k, v in rows[0].items() if isinstance(v, int | float) and v is not None}
    return {k: round(statistics.median(row[k] for row in rows), 4) if k in numbers else v for k, v in rows[0].items()}


def build(network: str):
    """The model in eval mode, and an input."""
    import torch

    source, name = NETWORKS[network]
    if source == "cifar":
        from tools import cifar_resnet

        return getattr(cifar_resnet, name)().eval(), torch.randn(1, 3, 32, 32)
    from tools import torchvision_ops

    torchvision_ops.declare()
    import torchvision.models as zoo

    options = {"init_weights": False} if name == "inception_v3" else {}
    return getattr(zoo, name)(weights=None, **options).eval(), torch.randn(1, 3, 224, 224)


def measure(network: str, tool: str) -> dict:
    """One row, in this process."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if tool == "compressor":
        import compressor  # noqa: F401
    else:
        import torch_pruning  # noqa: F401
    if NETWORKS[network][0] == "torchvision":
        from tools import torchvision_ops

        torchvision_ops.declare()
        import torchvision.models  # noqa: F401
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model, x = build(network)
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) / 2**20
    row = {"network": network, "tool": tool, **(_ours if tool == "compressor" else _theirs)(model, x)}
    row["weights_mb"] = round(weights, 1)
    row["peak_mb"] = round(row.pop("peak_kb") / 1024 - before / 1024, 1)
    return row


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _ours(model, x) -> dict:
    import compressor
    from compressor.passes.transforms.remove_channels import RemoveChannels

    total = sum(p.numel() for p in model.parameters())
    times = [time.perf_counter()]
    graph = compressor.trace(model, (x,))
    times.append(time.perf_counter())
    channels = compressor.analyze(graph)
    times.append(time.perf_counter())
    plan = channels.plan(0.5, seed=0)
    times.append(time.perf_counter())
    small = RemoveChannels(plan, channels)(graph).graph
    times.append(time.perf_counter())
    trace_s, analyze_s, plan_s, apply_s = (b - a for a, b in itertools.pairwise(times))
    peak = _peak()
    again = []
    for seed in range(1, 6):  # as in a search: the analysis is kept
        plan = channels.plan(0.5, seed=seed)
        start = time.perf_counter()
        RemoveChannels(plan, channels)(graph)
        again.append(time.perf_counter() - start)
    left = sum(p.numel() for p in small.parameters()) / total
    return {
        "trace_s": trace_s, "analyze_s": analyze_s, "plan_s": plan_s, "apply_s": apply_s,
        "apply_in_search_s": statistics.median(again), "nodes": len(graph.graph.nodes),
        "params_left": round(left, 4), "peak_kb": peak,
    }  # fmt: skip


def _theirs(model, x) -> dict:
    import torch
    import torch_pruning as tp

    total = sum(p.numel() for p in model.parameters())
    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        model, x, importance=tp.importance.RandomImportance(), pruning_ratio=0.5, ignored_layers=[last]
    )  # builds the dependency graph
    middle = time.perf_counter()
    pruner.step()
    end = time.perf_counter()
    left = sum(p.numel() for p in model.parameters()) / total
    return {
        "trace_s": 0.0, "analyze_s": middle - start, "apply_s": end - middle, "nodes": len(pruner.DG.module2node),
        "params_left": round(left, 4), "peak_kb": _peak(),
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """Markdown, one line per network, the peer beside us."""
    lines = [
        "| network | nodes | trace | analyze | apply | in a search | analyze + apply | torch-pruning | times faster "
        "| params left | its | weights | peak | its |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    pairs = {(row["network"], row["tool"]): row for row in rows}
    for network in dict.fromkeys(row["network"] for row in rows):
        ours, theirs = pairs[network, "compressor"], pairs[network, "torch-pruning"]
        own = ours["analyze_s"] + ours["apply_s"]
        head = (
            f"| {network} | {ours['nodes']} | {ours['trace_s']:.1f} s | {_ms(ours['analyze_s'])} | {_ms(ours['apply_s'])} "
            f"| {_ms(ours['apply_in_search_s'])} | {_ms(own)} "
        )
        if "error" in theirs:
            lines.append(head + f"| fails: {theirs['error'][:60]} | | {ours['params_left']:.0%} | | | {ours['peak_mb']:.0f} MB | |")
            continue
        other = theirs["analyze_s"] + theirs["apply_s"]
        lines.append(
            head + f"| {_ms(other)} | {other / own:.1f} | {ours['params_left']:.0%} | {theirs['params_left']:.0%} "
            f"| {ours['weights_mb']:.0f} MB | {ours['peak_mb']:.0f} MB | {theirs['peak_mb']:.0f} MB |"
        )
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


if __name__ == "__main__":
    main()
