"""Random states of torch, Python and NumPy: saved, restored, set aside."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of this process's generators: tensors, and JSON data.

    Torch's on every device, and Python's and NumPy's, which reward functions may use.
    """
    tensors = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        tensors[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    version, numbers, gauss = random.getstate()
    mersenne: Any = np.random.get_state()
    kind, keys, *rest = mersenne
    tensors["numpy"] = torch.from_numpy(keys.astype(np.int64))
    plain = {"python": [version, list(numbers), gauss], "numpy": [kind, *rest]}
    return tensors, plain


def set_random_state(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(tensors["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    version, numbers, gauss = plain["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, *rest = plain["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *rest))


@contextmanager
def temporary_seed(seed: int) -> Iterator[None]:
    """Seed every generator for the duration of the block, and restore them afterwards."""
    before = random_state()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        set_random_state(*before)
