"""Data that are drawn at random are the same from the same seed, and what was drawn before and after is left alone."""

import random

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from compressor.data.seeding import first_seen, seeded


def drawn():
    return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()


def loader(**more):
    data = TensorDataset(torch.arange(40.0)[:, None], torch.arange(40))
    return DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(5), **more)


def test_all_generators_begin_at_the_seed_and_are_put_back():
    own = loader()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), own.generator.get_state()
    found = []
    for _ in range(2):
        with seeded(3, own):
            found.append((drawn(), [x.flatten().tolist() for x, _ in own]))
    assert found[0] == found[1]
    with seeded(4, own):
        assert (drawn(), [x.flatten().tolist() for x, _ in own]) != found[0]
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), own.generator.get_state()
    assert torch.equal(before[0], after[0])
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])


def test_a_loader_is_told_by_its_first_batch():
    assert first_seen(loader(), 0) == first_seen(loader(), 0) != first_seen(loader(), 1)
    batches = [(torch.ones(2, 3), torch.zeros(2))]
    assert first_seen(batches, 0) == first_seen(batches, 1) != first_seen([(torch.ones(2, 3), torch.ones(2))], 0)
    assert first_seen([torch.ones(2, 3)], 0) is not None
    once = iter(batches)
    assert first_seen(once, 0) is None
    assert next(once) is batches[0], "what can be read only once is left alone"
    for nothing in (None, [], ["text"], 3):
        assert first_seen(nothing, 0) is None
