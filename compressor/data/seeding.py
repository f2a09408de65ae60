"""Everything that data may be drawn by, started from a seed: a run that goes on after a kill must see the same images."""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from compressor.tasks.samples import Samples
from compressor.values.files import digest_of_tensors


@contextmanager
def seeded(seed: int, *loaders: object, devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """The global generators of torch, NumPy and Python, and the loaders' own, begin at a seed; afterwards they are as before.

    A generator that a data set keeps to itself (`np.random.default_rng()`) is not reached.

    Args:
        seed: Any number from 0.
        loaders: What is read inside: a `DataLoader`'s `generator` and its sampler's count, everything else is left alone.
        devices: GPUs whose generators are put back, too.
    """
    own = {id(found): found for loader in loaders for found in _generators(loader)}.values()
    states = [generator.get_state() for generator in own]
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        for generator in own:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
            for generator, state in zip(own, states, strict=True):
                generator.set_state(state)


def _generators(loader: object) -> Iterator[torch.Generator]:
    """Of a loader, its sampler and its batch sampler."""
    loader = loader.batches if isinstance(loader, Samples) else loader
    batches = getattr(loader, "batch_sampler", None)
    for owner in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
        found = getattr(owner, "generator", None)
        if isinstance(found, torch.Generator):
            yield found


def first_seen(batches: object, seed: int) -> str | None:
    """Digest of the first batch that a loader gives from a seed.

    None where there is none, it holds no tensors, it cannot be read (which is told where all of it is), or the loader can be
    read once only.
    """
    batches = batches.batches if isinstance(batches, Samples) else batches
    if not isinstance(batches, Iterable):
        return None
    try:
        with seeded(seed, batches):
            iterator = iter(batches)
            batch = None if iterator is batches else next(iterator, None)
    except Exception:
        return None
    found = {str(k): part for k, part in enumerate(pytree.tree_leaves(batch)) if isinstance(part, Tensor)}
    return digest_of_tensors(found) if found else None
