"""Rows of logits by `torch.compile`: two reads forward, one read and one write backward.

It needs a C++ compiler and some seconds at first use, so it is taken only where it is asked for:
``MOSSRLHF_KERNELS=compiled`` in the environment, or `use_backend("compiled")`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mossrlhf.kernels import torch_rows
from mossrlhf.kernels.torch_rows import LOWEST


def stats(
    logits: Tensor, ids: Tensor, temperature: Tensor, ref_logits: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `rows.row_stats`; with a reference as `torch_rows` does.

    Args:
        logits: ``[N, V]``.
        ids: ``[N]``.
        temperature: ``[N]``.
        ref_logits: ``[N, V]`` or None.
        entropy: whether to compute it.

    Source: ours.
    """
    if ref_logits is not None or not len(ids):
        return torch_rows.stats(logits, ids, temperature, ref_logits, entropy)
    highest, d, chosen, weighted = _compiled(_summed)(logits, ids, temperature)
    counted, norms = ids >= 0, temperature.new_ones(4, len(ids))
    norms[0], norms[1] = highest, d
    logprob = torch.where(counted, chosen - d.log(), 0.0)
    logsumexp = torch.where(counted, highest / temperature + d.log(), 0.0)
    entropies = torch.where(counted, d.log() - weighted / d, 0.0)
    none = [norms.new_empty(0) for _ in range(3)]
    return logprob, logsumexp, entropies if entropy else none[0], none[1], none[2], norms


def gradient(
    out: Tensor,
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    norms: Tensor,
    coefs: Tensor,
    softcap: float | None,
) -> None:
    """Compute `rows.row_gradient`; with a reference or a cap as `torch_rows` does.

    Args:
        out: ``[N, V]``, written to; may be `logits`.
        logits: ``[N, V]``.
        ids: ``[N]``.
        temperature: ``[N]``.
        ref_logits: ``[N, V]`` or None.
        norms: ``[4, N]``.
        coefs: ``[4, N]``.
        softcap: c or None.

    Source: ours.
    """
    if ref_logits is not None or softcap is not None or not len(ids):
        torch_rows.gradient(out, logits, ids, temperature, ref_logits, norms, coefs, softcap)
        return
    coefs = torch.where(ids >= 0, coefs, 0.0)
    g, alpha, beta, _ = coefs / temperature
    given = (norms[0], g, alpha / norms[1], beta / norms[1], (coefs == 0).all(0))
    _compiled(_differentiated)(out, logits, ids, temperature, *given)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _summed(logits: Tensor, ids: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    wide = logits.to(temperature.dtype)
    highest = wide.amax(-1)
    x = (wide - highest[:, None]) / temperature[:, None]
    e = x.exp()
    chosen = x.gather(1, ids.clamp(min=0)[:, None]).squeeze(1)
    return highest, _sum(e), chosen, _sum(e * x.clamp(min=LOWEST))


def _sum(x: Tensor) -> Tensor:
    # In two steps where it can be: one running float32 sum of 32,000 terms loses two digits.
    if x.shape[1] % 64 == 0:
        x = x.unflatten(1, (-1, 64)).sum(-1)
    return x.sum(-1)


def _differentiated(
    out: Tensor,
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    highest: Tensor,
    g: Tensor,
    alpha: Tensor,
    beta: Tensor,
    dead: Tensor,
) -> None:
    x = (logits.to(temperature.dtype) - highest[:, None]) / temperature[:, None]
    slope = alpha[:, None] + beta[:, None] * x.clamp(min=LOWEST)
    at_label = torch.arange(logits.shape[1], device=ids.device) == ids[:, None]
    dz = x.exp() * slope + torch.where(at_label, g[:, None], 0.0)
    out.copy_(torch.where(dead[:, None], 0.0, dz))
