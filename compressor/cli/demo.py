"""The demo: scikit-learn's real digits, a small residual network trained on the spot, half its latency."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.api import compress
from compressor.data.images import load_data
from compressor.runs.result import Result
from compressor.training.fine_tune import FineTune, train
from compressor.values.budget import Budget
from compressor.values.files import load_weights, save_tensors
from compressor.values.progress import Progress
from compressor.values.target import Target


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H/stride, W/stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class DigitsResNet(nn.Module):
    """A residual network for 8x8 digits: 48, 96 and 192 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 48, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(48)
        self.layer1 = nn.Sequential(Block(48, 48, 1), Block(48, 48, 1))
        self.layer2 = nn.Sequential(Block(48, 96, 2), Block(96, 96, 1))
        self.layer3 = nn.Sequential(Block(96, 192, 2))
        self.fc = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) to (N, 10)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def demo(out: Path, seed: int = 0, progress: Progress | None = None) -> Result:
    """Train, compress to half the measured latency, fine-tune, export, check, report.

    Args:
        out: The run's folder; the trained original is kept beside it as `<name>-original.safetensors`.
        seed: Of everything random.
        progress: Where to say what is being done.

    Raises:
        DataError: scikit-learn is missing, or the folder is in use.
    """
    progress = progress or Progress()
    data = load_data("digits", batch=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsResNet()
    weights = out.parent / f"{out.name}-original.safetensors"
    if weights.exists():
        load_weights(model, weights)
    else:
        progress.stage("train a small residual network on scikit-learn's digits")
        train(model, data.train, FineTune(epochs=12, learning_rate=0.05, distillation=0.0), seed=seed, progress=progress)
        save_tensors(weights, model.state_dict())
    return compress(
        model.eval(),
        (torch.zeros(1, 1, 8, 8),),
        train=data.train,
        validate=data.validate,
        test=data.test,
        budget=Budget(latency=0.5),
        target=Target("onnxruntime", batch=1),
        finetune=FineTune(epochs=8, learning_rate=0.02),
        out=out,
        seed=seed,
        progress=progress,
    )
