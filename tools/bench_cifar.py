"""ResNet on CIFAR-10 to half its MACs and half its measured latency: accuracy at every step.

    python tools/bench_cifar.py --data DIR --weights resnet56_cifar10.safetensors

DIR holds the official binary version of CIFAR-10. Channels are chosen by weights alone, so no image takes
part in a decision; recalibration and fine-tuning see training images only; every accuracy in the table is on
the 10,000 test images. Prints a table and writes one JSON row per network to `tools/results/`. Stopped and
started again with the same --work folder, it goes on.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import cifar_resnet

import compressor
from compressor.cli.console import ConsoleProgress
from compressor.data.images import Images, load_data
from compressor.runs.folder import versions
from compressor.values.files import load_weights, write_json

CASES = (
    ("l1 global sum", compressor.Magnitude("l1", "global", "sum", compensation=None), compressor.Budget(macs=0.5)),
    ("l1 global sum", compressor.Magnitude("l1", "global", "sum", compensation=None), compressor.Budget(latency=0.5)),
    ("l1 global mean", compressor.Magnitude("l1", "global", "mean", compensation=None), compressor.Budget(macs=0.5)),
    ("l1 uniform", compressor.Magnitude("l1", "uniform", compensation=None), compressor.Budget(macs=0.5)),
    ("l1 uniform", compressor.Magnitude("l1", "uniform", compensation=None), compressor.Budget(latency=0.5)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the official binary version of CIFAR-10")
    parser.add_argument("--weights", type=Path, required=True, help="resnet56_cifar10.safetensors or resnet20_cifar10.safetensors")
    parser.add_argument("--network", choices=("resnet56", "resnet20"), default="resnet56")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-cifar"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    model = getattr(cifar_resnet, args.network)()
    load_weights(model, args.weights)
    data = load_data(f"cifar10:{args.data}", limit=args.train_images)
    rows = []
    for name, method, budget in CASES:
        kind, bound = next(iter(budget.bounds.items()))
        rows.append(run_case(args, model.eval(), data, f"{name}, {kind} {bound}", method, budget))
    print(table(rows))
    target = rows[0]["target"]
    path = args.results / f"cifar-{args.network}-{target['backend']}.json"
    write_json(
        path,
        {
            "command": f"python tools/bench_cifar.py --network {args.network} --data DIR --weights FILE",
            "versions": versions(),
            "rows": rows,
        },
    )
    print(path)


def run_case(args: argparse.Namespace, model, data, name: str, method, budget) -> dict:
    out = args.work / args.network / name.replace(" ", "-").replace(",", "")
    test = data.test
    assert isinstance(test, Images)
    with ConsoleProgress() as progress:
        progress.stage(f"== {name} ==")
        result = compressor.compress(
            model,
            (torch.zeros(1, 3, 32, 32),),
            train=data.train,
            validate=replace(test, batch=250),
            budget=budget,
            target=compressor.Target("onnxruntime", batch=1),
            method=method,
            finetune=compressor.FineTune(epochs=args.epochs, learning_rate=0.01, distillation=0.5),
            out=out,
            progress=progress,
        )
    first, last = result.steps[0], result.steps[-1]
    return {
        "network": args.network,
        "case": name,
        "method": method.to_dict(),
        "budget": budget.bounds,
        "target": dict(result.compressed.target),
        "top1": {step.name: step.metric for step in result.steps},
        "macs": [first.macs, last.macs],
        "params": [first.params, last.params],
        "latency_ms": [result.original.median_ms, result.compressed.median_ms],
        "latency_ci95_ms": [list(result.original.interval_ms), list(result.compressed.interval_ms)],
        "latency_status": [result.original.status, result.compressed.status],
        "fine_tune": {"epochs": args.epochs, "images": args.train_images},
    }


def table(rows: list[dict]) -> str:
    head = "| case | top-1 before | removed | recalibrated | fine-tuned | MACs | params | latency | of original |"
    lines = [head, "|" + "---|" * 9]
    for row in rows:
        top1, latency = row["top1"], row["latency_ms"]
        lines.append(
            f"| {row['case']} | {top1['original']:.2f} | {top1['channels removed']:.2f} | {top1['norms recalibrated']:.2f} "
            f"| {top1['fine-tuned']:.2f} | {row['macs'][1] / row['macs'][0]:.3f} | {row['params'][1] / row['params'][0]:.3f} "
            f"| {latency[1]:.2f} ms | {latency[1] / latency[0]:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
