"""Rows of logits with torch alone, a block at a time, so that a block stays in the cache."""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK_BYTES = 2**20
"""Of one block of rows, in float32; two or three blocks of scratch memory are held."""

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
    weighted, cross = temperature.new_zeros(2, len(ids))
    with_ref, warm = ref_logits is not None, _may_differ_from_one(temperature)

    def work(rows: slice, x: Tensor, e: Tensor, r: Tensor) -> None:
        norms[0, rows] = _shifted(x, logits[rows], temperature[rows], warm)
        torch.exp(x, out=e)
        torch.sum(e, -1, out=norms[1, rows])
        if entropy or with_ref:
            weighted[rows] = _expected(e, x)
        if ref_logits is not None:
            norms[2, rows] = _shifted(r, ref_logits[rows], temperature[rows], warm)
            torch.sum(torch.exp(r, out=x), -1, out=norms[3, rows])
            cross[rows] = _expected(e, r)

    _for_each_block(work, logits, temperature, 3 if with_ref else 2)
    _, d, _, ref_d = norms

    def chosen(z: Tensor, highest: Tensor) -> Tensor:
        return (z.gather(1, label).squeeze(1).to(norms.dtype) - highest) / temperature

    found = [
        chosen(logits, norms[0]) - d.log(),
        norms[0] / temperature + d.log(),
        d.log() - weighted / d if entropy else None,
        None if ref_logits is None else chosen(ref_logits, norms[2]) - ref_d.log(),
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
    on_cpu, warm = out.device.type == "cpu", _may_differ_from_one(temperature)
    some_dead, sloped = not on_cpu or bool(dead.any()), not on_cpu or bool((coefs[2:] != 0).any())

    def work(rows: slice, x: Tensor, e: Tensor, r: Tensor) -> None:
        _shifted(x, logits[rows], temperature[rows], warm, norms[0, rows])
        torch.exp(x, out=e)
        slope = alpha[rows]
        if sloped:  # in two steps: torch's addcmul of a column takes twice as long
            slope = x.clamp_(min=LOWEST).mul_(beta[rows]).add_(slope)
        if ref_logits is not None and sloped:
            _shifted(r, ref_logits[rows], temperature[rows], warm, norms[2, rows])
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

    _for_each_block(work, logits, temperature, 2 if ref_logits is None else 3)


def block_rows(count: int, width: int) -> int:
    """Return how many of N rows of V logits are computed at a time.

    Args:
        count: N.
        width: V.
    """
    return min(count, max(1, BLOCK_BYTES // (4 * max(1, width))))


def _for_each_block(
    work: Callable[[slice, Tensor, Tensor, Tensor], None], logits: Tensor, like: Tensor, count: int
) -> None:
    """Call `work` for each block, with three scratch tensors; of two the last is passed twice."""
    total, width = logits.shape
    size = block_rows(total, width)
    scratch = [like.new_empty(size, width) for _ in range(count)]
    for start in range(0, total, max(1, size)):
        rows = slice(start, min(start + size, total))
        x, e, *rest = (block[: rows.stop - start] for block in scratch)
        work(rows, x, e, rest[0] if rest else e)


def _may_differ_from_one(temperature: Tensor) -> bool:
    """Whether to divide by the temperatures; on other devices asking would mean waiting."""
    return temperature.device.type != "cpu" or bool((temperature != 1).any())


def _shifted(
    out: Tensor, logits: Tensor, temperature: Tensor, divide: bool, highest: Tensor | None = None
) -> Tensor:
    """Write x − max x into `out`, with x = z/τ, and return max z of each row, where not given.

    The difference is taken before it is divided: logits far from zero keep their digits.
    """
    if highest is None:
        highest = logits.amax(-1).to(out)
    torch.sub(logits, highest[:, None], out=out)
    if divide:
        out.div_(temperature[:, None])
    return highest


def _expected(e: Tensor, x: Tensor) -> Tensor:
    """Σ e·x over each row, where e = 0 times x = −∞ is 0; x is overwritten."""
    total = x.mul_(e).sum(-1)
    if total.device.type != "cpu" or bool(total.isnan().any()):
        total = x.masked_fill_(e == 0, 0.0).sum(-1)
    return total
