"""The check sums that were published with the released weights, and what they are sums of."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHECK_SUMS = {"en-reward": 50810.703125, "en-sft": 50874.84765625, "zh-reward": 49954.0859375}
"""By language and kind; that of the English policy was never published."""

TOLERANCE = 1e-4
"""Of a check sum, by its size: sums of 6.7 billion numbers, in another order and a wider type."""

FREQUENCIES = "rotary_emb.inv_freq"
"""The end of the names of what rotates positions: no weights, but transformers 4.30 kept them."""

THETA = 10000.0
"""The base of positions, which models of that time had, and no configuration told."""


def frequencies(folder: Path) -> Tensor:
    """Return θ^(−2i/d), a layer's rotary frequencies.

    Args:
        folder: with the configuration that says d.

    Raises:
        ValueError: where it does not.

    Source: RoFormer (arXiv 2104.09864) eq. 15.
    """
    config = _config(folder)
    if not _has_heads(config):
        raise ValueError(
            f"{folder / 'config.json'}: expected head_dim, or hidden_size and num_attention_heads, "
            "as layers here keep no rotary frequencies"
        )
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 1.0 / THETA ** (torch.arange(0, size, 2, dtype=torch.float32) / size)


def sum_of(tensor: Tensor) -> float:
    """Return the sum of a tensor's numbers, in float64.

    Args:
        tensor: any shape.

    Source: ours.
    """
    return float(sum(part.double().sum() for part in tensor.flatten().split(2**22)))


def missing_frequencies(keys: Iterable[str], folder: Path) -> float:
    """Return what the frequencies of layers that keep none would add to a check sum.

    Args:
        keys: of all tensors.
        folder: with the configuration.

    Source: ours; about 238.7 in all at 7B.
    """
    config = _config(folder)
    if not _has_heads(config) or not isinstance(config.get("num_hidden_layers"), int):
        return 0.0  # no Llama: no sum of it was published
    kept = sum(key.endswith(FREQUENCIES) for key in keys)
    return float(config["num_hidden_layers"] - kept) * sum_of(frequencies(folder))


def _has_heads(config: dict[str, Any]) -> bool:
    sizes = [config.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads")]
    known = [isinstance(size, int) and size > 0 for size in sizes]
    return known[0] or all(known[1:])


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: no JSON of a configuration, but a {type(found).__name__}")
    return found
