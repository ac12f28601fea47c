"""Rows of logits with torch alone, a few at a time: what is made of a block stays in the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 2**21
"""Of one block of rows, in the type it is computed in; there are two or three of them."""

LOWEST = -1e4
"""Stands in for x − m = −∞ where it is multiplied by exp(x − m) = 0: NaN otherwise."""


def stats(
    logits: Tensor, ids: Tensor, temperature: Tensor, ref_logits: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `rows.row_stats`, block by block.

    Args:
        logits: ``[N, V]``.
        ids: ``[N]``.
        temperature: ``[N]``.
        ref_logits: ``[N, V]`` or None.
        entropy: whether to compute it.

    Source: `functional.logprobs`, which is the oracle.
    """
    counted, label = ids >= 0, ids.clamp(min=0)[:, None]
    norms = temperature.new_zeros(4, len(ids))
    chosen, chosen_ref, weighted, cross = temperature.new_zeros(4, len(ids))
    with_ref = ref_logits is not None
    scratch = _Scratch(logits, temperature, 3 if with_ref else 2)
    for rows in _blocks(logits):
        x, e, r = scratch(rows)
        norms[0, rows] = _shifted(x, logits[rows], temperature[rows])
        chosen[rows] = x.gather(1, label[rows]).squeeze(1)
        torch.exp(x, out=e)
        torch.sum(e, -1, out=norms[1, rows])
        if entropy or with_ref:
            weighted[rows] = _expected(e, x)
        if ref_logits is not None:
            norms[2, rows] = _shifted(r, ref_logits[rows], temperature[rows])
            chosen_ref[rows] = r.gather(1, label[rows]).squeeze(1)
            torch.sum(torch.exp(r, out=x), -1, out=norms[3, rows])
            cross[rows] = _expected(e, r)
    _, d, _, ref_d = norms
    found = [
        chosen - d.log(),
        norms[0] / temperature + d.log(),
        d.log() - weighted / d if entropy else None,
        chosen_ref - ref_d.log() if with_ref else None,
        (weighted - cross) / d - d.log() + ref_d.log() if with_ref else None,
    ]
    kept = [norms.new_empty(0) if x is None else torch.where(counted, x, 0.0) for x in found]
    return kept[0], kept[1], kept[2], kept[3], kept[4], norms


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
    """Compute `rows.row_gradient`, block by block.

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
    coefs = torch.where(ids >= 0, coefs, 0.0)
    dead, label = (coefs == 0).all(0)[:, None], ids.clamp(min=0)[:, None]
    g, alpha, beta, gamma = (coefs / temperature)[:, :, None]
    d = norms[1][:, None]
    alpha, beta, gamma = alpha / d, beta / d, gamma / d
    scratch = _Scratch(logits, temperature, 2 if ref_logits is None else 3)
    some_dead = out.device.type != "cpu" or bool(dead.any())
    sloped = out.device.type != "cpu" or bool((coefs[2:] != 0).any())
    for rows in _blocks(logits):
        x, e, r = scratch(rows)
        _shifted(x, logits[rows], temperature[rows], norms[0, rows])
        torch.exp(x, out=e)
        slope = alpha[rows]
        if sloped:
            slope = torch.addcmul(slope, beta[rows], x.clamp_(min=LOWEST), out=x)
        if ref_logits is not None:
            _shifted(r, ref_logits[rows], temperature[rows], norms[2, rows])
            x.addcmul_(gamma[rows], r.masked_fill_((e == 0) | (gamma[rows] == 0), 0.0))
        # Straight to where it is wanted, unless that would round it before it is whole.
        done = out[rows] if out.dtype == e.dtype and softcap is None else e
        torch.mul(e, slope, out=done).scatter_add_(1, label[rows], g[rows])
        if softcap is not None:
            torch.mul(logits[rows], logits[rows], out=x)
            done.mul_(x.mul_(-1 / softcap**2).add_(1))
        if some_dead:
            done.masked_fill_(dead[rows], 0.0)
        if done is e:
            out[rows] = e


class _Scratch:
    """As many tensors as asked for, as large as the largest block, used for one after the other."""

    def __init__(self, logits: Tensor, like: Tensor, count: int) -> None:
        size = next(_blocks(logits), slice(0, 0)).stop
        self.blocks = [like.new_empty(size, logits.shape[1]) for _ in range(count)]

    def __call__(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        cut = [block[: rows.stop - rows.start] for block in self.blocks]
        return cut[0], cut[1], cut[-1]


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows, width = logits.shape
    size = max(1, BLOCK_BYTES // (4 * max(1, width)))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _shifted(
    out: Tensor, logits: Tensor, temperature: Tensor, highest: Tensor | None = None
) -> Tensor:
    """Write x − max x into `out`, with x = z/τ, and return max z of each row, where not given.

    The difference is taken before it is divided: logits far from zero keep their digits.
    """
    if highest is None:
        highest = logits.amax(-1).to(out)
    torch.sub(logits, highest[:, None], out=out)
    if temperature.device.type != "cpu" or bool((temperature != 1).any()):
        out.div_(temperature[:, None])
    return highest


def _expected(e: Tensor, x: Tensor) -> Tensor:
    """Σ e·x over each row, where e = 0 times x = −∞ is 0."""
    total = torch.linalg.vecdot(e, x)
    if total.device.type != "cpu" or bool(total.isnan().any()):
        total = torch.linalg.vecdot(e, x.masked_fill(e == 0, 0.0))
    return total
