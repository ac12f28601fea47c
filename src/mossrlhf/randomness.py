"""The generators that a process draws from: noted, and put back."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of this process's generators: tensors, and what JSON holds.

    Torch's on every device, Python's and NumPy's, which reward functions draw from.

    Source: ours.
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
    """Put back what `random_state` returned.

    Args:
        tensors: of torch and NumPy.
        plain: of Python and NumPy.

    Source: ours.
    """
    torch.set_rng_state(tensors["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    version, numbers, gauss = plain["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, *rest = plain["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *rest))
