"""The triton backend of `row_stats`: a program per row forward, per block of a row backward.

Importing it needs triton. With ``TRITON_INTERPRET=1`` the kernels run on CPU tensors, slowly.
``no_type_check`` keeps jaxtyping's import hook off them: triton compiles no decorated function.
"""

from contextlib import nullcontext
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits a program loads at a time."""

WARPS = 8


@triton.jit
@no_type_check
def _raised(m, z, t):
    """Update a running maximum: (new maximum, what to subtract, shift of x, factor on sums).

    If every logit so far is −∞, zero is subtracted, since −∞ − (−∞) is NaN.
    """
    highest = tl.maximum(m, tl.max(z, 0))
    base = tl.where(highest == -float("inf"), 0.0, highest)
    moved = tl.where(m == -float("inf"), 0.0, (m - base) / t)
    kept = tl.where(m == -float("inf"), 0.0, tl.exp(moved))
    return highest, base, moved, kept


@triton.jit(do_not_specialize=["N", "tau_stride"])
@no_type_check
def _stats_kernel(
    logits, ids, tau, ref, logprob, logsumexp, entropy, ref_logprob, kl, norms,
    N, V, row_stride, col_stride, ref_row_stride, ref_col_stride, tau_stride,
    ENTROPY: tl.constexpr, REF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # N·V may pass 2³¹
    label = tl.load(ids + row)
    if label < 0:
        tl.store(logprob + row, 0.0)
        tl.store(logsumexp + row, 0.0)
        if ENTROPY:
            tl.store(entropy + row, 0.0)
        if REF:
            tl.store(ref_logprob + row, 0.0)
            tl.store(kl + row, 0.0)
        return
    t = tl.load(tau + row * tau_stride)
    z_row = logits + row * row_stride
    r_row = ref + row * ref_row_stride
    columns = tl.arange(0, BLOCK)
    m = -float("inf")
    ref_m = -float("inf")
    d = tl.zeros([BLOCK], tl.float32)  # Σ e
    w = tl.zeros([BLOCK], tl.float32)  # Σ e·x
    ref_d = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)  # Σ e·r
    for start in range(0, V, BLOCK):
        at = (start + columns).to(tl.int64)
        inside = at < V
        z = tl.load(z_row + at * col_stride, mask=inside, other=-float("inf")).to(tl.float32)
        m, base, moved, kept = _raised(m, z, t)
        x = (z - base) / t
        e = tl.exp(x)
        if REF:
            r = tl.load(r_row + at * ref_col_stride, mask=inside, other=-float("inf"))
            r = r.to(tl.float32)
            ref_m, ref_base, ref_moved, ref_kept = _raised(ref_m, r, t)
            r = (r - ref_base) / t
            ref_d = ref_kept * ref_d + tl.exp(r)
            before = tl.where(kept == 0.0, 0.0, kept * (cross + ref_moved * d))
            cross = before + tl.where(e == 0.0, 0.0, e * r)
        if ENTROPY or REF:
            before = tl.where(kept == 0.0, 0.0, kept * (w + moved * d))
            w = before + tl.where(e == 0.0, 0.0, e * x)
        d = kept * d + e
    total = tl.sum(d, 0)
    log_d = tl.log(total)
    expected = tl.sum(w, 0) / total
    chosen = tl.load(z_row + label.to(tl.int64) * col_stride, mask=label < V, other=float("nan"))
    tl.store(logprob + row, (chosen.to(tl.float32) - m) / t - log_d)
    tl.store(logsumexp + row, m / t + log_d)
    tl.store(norms + row, m)
    tl.store(norms + N + row, total)
    if ENTROPY:
        tl.store(entropy + row, log_d - expected)
    if REF:
        ref_total = tl.sum(ref_d, 0)
        ref_log_d = tl.log(ref_total)
        chosen = tl.load(
            r_row + label.to(tl.int64) * ref_col_stride, mask=label < V, other=float("nan")
        )
        tl.store(ref_logprob + row, (chosen.to(tl.float32) - ref_m) / t - ref_log_d)
        tl.store(kl + row, expected - tl.sum(cross, 0) / total - log_d + ref_log_d)
        tl.store(norms + 2 * N + row, ref_m)
        tl.store(norms + 3 * N + row, ref_total)


@triton.jit(do_not_specialize=["N", "tau_stride"])
@no_type_check
def _gradient_kernel(
    out, logits, ids, tau, ref, norms, coefs, softcap,
    N, V, out_row_stride, out_col_stride, row_stride, col_stride, ref_row_stride, ref_col_stride,
    tau_stride, SOFTCAP: tl.constexpr, REF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = at < V
    label = tl.load(ids + row)
    g = tl.load(coefs + row)
    alpha = tl.load(coefs + N + row)
    beta = tl.load(coefs + 2 * N + row)
    gamma = tl.load(coefs + 3 * N + row)
    place = out + row * out_row_stride + at * out_col_stride
    # Rows without a gradient are not read: NaN × 0 is NaN.
    needed = (g != 0.0) | (alpha != 0.0) | (beta != 0.0) | (gamma != 0.0)
    if (label < 0) | (needed == 0):
        zero = tl.zeros([BLOCK], tl.float32)
        tl.store(place, zero.to(out.dtype.element_ty), mask=inside)
        return
    t = tl.load(tau + row * tau_stride)
    m = tl.load(norms + row)
    d = tl.load(norms + N + row)
    z = tl.load(logits + row * row_stride + at * col_stride, mask=inside, other=-float("inf"))
    z = z.to(tl.float32)
    x = (z - m) / t
    e = tl.exp(x)
    slope = alpha + tl.where(e == 0.0, 0.0, beta * x)
    if REF:
        r = tl.load(ref + row * ref_row_stride + at * ref_col_stride, mask=inside, other=0.0)
        r = (r.to(tl.float32) - tl.load(norms + 2 * N + row)) / t
        slope += tl.where(e == 0.0, 0.0, tl.where(gamma == 0.0, 0.0, gamma * r))
    dz = (e / d * slope + tl.where(at == label, g, 0.0)) / t
    if SOFTCAP:
        share = z / softcap
        dz *= 1.0 - share * share
    tl.store(place, dz.to(out.dtype.element_ty), mask=inside)


def stats(
    logits: Tensor, ids: Tensor, temperature: Tensor, ref_logits: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `row_stats.row_stats`."""
    ids = ids.contiguous()
    rows, width = logits.shape
    ref = logits if ref_logits is None else ref_logits

    def column(wanted: bool) -> Tensor:
        return logits.new_empty(rows if wanted else 0, dtype=torch.float32)

    wanted = (True, True, entropy, ref_logits is not None, ref_logits is not None)
    logprob, logsumexp, entropies, ref_logprob, kl = (column(w) for w in wanted)
    norms = logits.new_ones(4, rows, dtype=torch.float32)
    if rows:
        with _on(logits):
            _stats_kernel[(rows,)](
                logits, ids, temperature, ref, logprob, logsumexp, entropies, ref_logprob, kl,
                norms, rows, width, *logits.stride(), *ref.stride(), temperature.stride(0),
                ENTROPY=entropy, REF=ref_logits is not None, BLOCK=_block(width), num_warps=WARPS,
            )  # fmt: skip
    return logprob, logsumexp, entropies, ref_logprob, kl, norms


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
    """Compute `row_stats.row_gradient`."""
    ids = ids.contiguous()
    rows, width = logits.shape
    ref, block = logits if ref_logits is None else ref_logits, _block(width)
    if rows:
        with _on(logits):
            _gradient_kernel[(rows, triton.cdiv(width, block))](
                out, logits, ids, temperature, ref, norms.contiguous(), coefs.contiguous(),
                softcap or 1.0, rows, width, *out.stride(), *logits.stride(), *ref.stride(),
                temperature.stride(0),
                SOFTCAP=softcap is not None, REF=ref_logits is not None, BLOCK=block,
                num_warps=WARPS,
            )  # fmt: skip


def _block(width: int) -> int:
    return min(BLOCK, max(16, triton.next_power_of_2(width)))


def _on(logits: Tensor) -> Any:
    return torch.cuda.device(logits.device) if logits.is_cuda else nullcontext()
