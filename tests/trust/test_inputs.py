"""Models and data of every kind that goes wrong: an answer that names what is wrong."""

import itertools
import time

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.utils.data import DataLoader, IterableDataset

import compressor
from compressor.errors import CompressorError, DataError, TraceError
from compressor.training.evaluate import evaluate
from compressor.training.fine_tune import FineTune, train
from tests.networks import Residual, randomize

X = (torch.zeros(1, 3, 8, 8),)


def pairs(count=3, labels=None):
    return [(torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,)) if labels is None else labels) for _ in range(count)]


def compress(model, tmp_path, validate=None, train=None, **options):
    validate, train = (pairs() if batches is None else batches for batches in (validate, train))
    return compressor.compress(
        model, X, validate=validate, train=train, budget=compressor.Budget(macs=0.6),
        target=compressor.Target("fake", align=4), finetune=FineTune(epochs=1), out=tmp_path / "run", **options,
    )  # fmt: skip


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.randn(3, 8, 8), k % 4) for k in range(32)])


def test_a_loader_without_a_length_is_read(tmp_path):
    loader = DataLoader(Stream(), batch_size=8)
    assert compress(randomize(Residual()), tmp_path, validate=loader, train=loader).met


def raising(after):
    for k, pair in enumerate(pairs(9)):
        if k == after:
            raise OSError("the disk is gone")
        yield pair


class Raises:
    def __iter__(self):
        return raising(1)


LABELS = {
    "floats": (torch.zeros(8), "whole numbers, found float32"),
    "one-hot": (torch.zeros(8, 4), r"pass y.argmax\(1\)"),
    "truth values": (torch.zeros(8, dtype=torch.bool), "whole numbers, found bool"),
    "too few": (torch.zeros(3, dtype=torch.long), r"one per input, found \(3,\)"),
    "out of range": (torch.full((8,), 7), "tells 5 classes apart"),
    "negative": (torch.full((8,), -1), "tells 5 classes apart"),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("work", ["evaluate", "train"])
def test_labels_of_another_form_are_named(labels, work):
    model = randomize(Residual())
    with pytest.raises(DataError, match=labels[1]):
        evaluate(model, pairs(1, labels[0])) if work == "evaluate" else train(model, pairs(1, labels[0]), FineTune(epochs=1))


def test_labels_of_32_bits_are_taken():
    assert evaluate(randomize(Residual()), pairs(1, torch.zeros(8, dtype=torch.int32))).count == 8


@pytest.mark.parametrize("what", ["validate", "train"])
def test_a_loader_that_fails_in_the_middle_is_named(tmp_path, what):
    with pytest.raises(DataError, match="batch 1: the loader raised OSError: the disk is gone"):
        compress(randomize(Residual()), tmp_path, **{what: Raises()})


def test_a_loader_that_never_ends_is_named():
    with pytest.raises(DataError, match="this loader never ends"):
        evaluate(randomize(Residual()), itertools.cycle(pairs(2)))


def test_a_generator_that_is_used_up_and_an_empty_loader_are_named():
    used = iter(pairs(2))
    evaluate(randomize(Residual()), used)
    for empty in (used, []):
        with pytest.raises(DataError, match="read only once"):
            evaluate(randomize(Residual()), empty)


def filled(name, value):
    model = randomize(Residual())
    dict([*model.named_parameters(), *model.named_buffers()])[name].data.view(-1)[0] = value
    return model


MODELS = {
    "NaN in a weight": (lambda: filled("stem.weight", float("nan")), "stem.weight` holds NaN"),
    "infinity in a variance": (lambda: filled("bn1.running_var", float("inf")), "running_var` holds NaN"),
    "half": (lambda: randomize(Residual()).half(), "is float16"),
    "bfloat16": (lambda: randomize(Residual()).bfloat16(), "is bfloat16"),
    "double": (lambda: randomize(Residual()).double(), "is float64"),
    "meta": (lambda: Residual().to("meta"), "meta"),
    "scripted": (
        lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)).eval()),
        "is a TorchScript module",
    ),
    "jit traced": (lambda: torch.jit.trace(randomize(Residual()), torch.zeros(2, 3, 8, 8)), "is a TorchScript module"),
    "exported": (lambda: torch.export.export(randomize(Residual()), (torch.zeros(2, 3, 8, 8),)).module(), "of an exported program"),
    "quantized": (lambda: quantize_dynamic(randomize(Residual()), {nn.Linear}), "`fc` is quantized already"),
    "complex": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.complex64), nn.Flatten()), "is complex64"),
    "nothing": (lambda: nn.Sequential(nn.Flatten()), "nothing in this model"),
    "no module": (lambda: 3, "must be a torch.nn.Module"),
    "fails": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3)), "does not run on inputs"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
def test_models_that_cannot_be_compressed_are_answered(tmp_path, kind):
    make, said = MODELS[kind]
    with pytest.raises(CompressorError, match=said):
        compress(make(), tmp_path)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.third.weight = self.second.weight

    def forward(self, x):
        return self.head(self.third(torch.relu(self.second(self.first(x)))).mean((2, 3)))


def chain(*convs):
    return nn.Sequential(*convs, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def one_channel():
    return chain(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))


def normalised():
    return chain(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.Conv2d(16, 16, 3))


GOOD = {"tied": Tied, "one channel": one_channel, "training mode": lambda: Residual().train(), "weight norm": normalised}


@pytest.mark.parametrize("kind", GOOD)
def test_models_that_are_odd_are_compressed(tmp_path, kind):
    torch.manual_seed(0)
    result = compress(randomize(GOOD[kind]()), tmp_path)
    assert result.error < 1e-4
    loaded = compressor.load(tmp_path / "run")
    with torch.no_grad():
        x = torch.randn(3, 3, 8, 8)
        torch.testing.assert_close(loaded(x), result.graph.cpu()(x))


def test_a_compressed_network_is_compressed_again(tmp_path):
    compress(randomize(Residual()), tmp_path / "once")
    again = compress(compressor.load(tmp_path / "once" / "run"), tmp_path / "twice")
    assert again.met


def test_inputs_without_a_pixel_are_answered():
    with pytest.raises(TraceError):
        compressor.trace(Residual(), (torch.zeros(1, 3, 0, 8),))


@pytest.mark.slow
def test_two_thousand_convolutions_are_traced_analysed_and_planned_within_a_minute():
    model = nn.Sequential(*[nn.Conv2d(4, 4, 1) for _ in range(2000)]).eval()
    begun = time.monotonic()
    channels = compressor.analyze(compressor.trace(model, (torch.zeros(1, 4, 4, 4),)))
    channels.plan(0.5)
    assert time.monotonic() - begun < 60
