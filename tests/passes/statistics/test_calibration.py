"""Calibration data that is no good: one clear error that names the batch, and nothing else happens."""

import pytest
import torch
from torch import nn

import compressor
from compressor.errors import DataError
from compressor.passes.statistics.calibration import Calibration

GRAPH = compressor.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), (torch.zeros(1, 3, 8, 8),))


def images(count, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


class Loader:
    """Says that it has more batches than it gives, or raises."""

    def __init__(self, batches, length=None, error=None):
        self.batches, self.length, self.error = batches, length, error

    def __len__(self):
        return len(self.batches) if self.length is None else self.length

    def __iter__(self):
        yield from self.batches
        if self.error:
            raise self.error


def spoilt(value):
    x = images(4, 1)
    x[2, 1, 3, 3] = value
    return [images(4), x]


WRONG = {
    "one image": ([images(1)], "1 images in all"),
    "no batch": ([], "there is no batch"),
    "constant images": (
        [images(4), torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)],
        "batch 1: every image is constant",
    ),
    "the same image": ([images(4), images(1).repeat(4, 1, 1, 1)], "batch 1: all 4 images are the same"),
    "NaN": (spoilt(float("nan")), "batch 1 holds NaN or infinity"),
    "infinity": (spoilt(float("inf")), "batch 1 holds NaN or infinity"),
    "wrong size": ([images(4), torch.randn(4, 3, 8, 9)], r"batch 1 has shape \(4, 3, 8, 9\), the network takes \(N, 3, 8, 8\)"),
    "wrong rank": ([torch.randn(3, 8, 8)], "batch 0 has shape"),
    "empty batch": ([images(4), images(0)], "batch 1 has shape"),
    "bytes": ([torch.zeros(4, 3, 8, 8, dtype=torch.uint8)], "batch 0 is uint8, the network takes float32"),
    "no tensor": ([("a", "b")], "batch 0: the network takes 1 tensors, found str, str"),
    "ends early": (Loader([images(4)], length=3), "ended after 1 of the 3 batches"),
    "raises": (Loader([images(4)], error=OSError("disk on fire")), "batch 1: the loader raised OSError: disk on fire"),
    "not iterable": (7, "must be iterable, found int"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_data_is_refused_with_the_batch_named(case):
    batches, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        Calibration.read(batches, GRAPH, 100)


def test_pairs_single_tensors_and_generators_are_all_right():
    for batches in ([images(10)], [(images(10), torch.zeros(10))], ([images(5), "name"] for _ in range(2))):
        assert Calibration.read(batches, GRAPH, 100).images == 10


def test_reading_stops_once_there_are_enough():
    found = Calibration.read(Loader([images(6), images(6)], error=OSError("never reached")), GRAPH, 10)
    assert [len(batch[0]) for batch in found.batches] == [6, 4]
    assert found.first(7).images == 7
    assert found.after(7).images == 3
    assert torch.equal(found.after(7).batches[0][0], found.batches[1][0][1:])
