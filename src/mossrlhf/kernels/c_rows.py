"""Rows of logits in C, on a CPU: each row is read once from memory, in every thread a row.

`rows.c` has the arithmetic. What it does not read (other types than float32 and bfloat16, columns
apart) and what is to raise is handed to `torch_rows`.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from mossrlhf.kernels import c_library, torch_rows
from mossrlhf.kernels.threads import on_threads

KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""The types that C reads and writes, by `enum kind`."""

THREAD_NUMBERS = 2**17
"""Logits that are worth waking another thread for."""

CHECKED = (5, 1100)
"""Rows and words the library is tried on: more than one block, and no whole number of them."""

TOLERANCE = 1e-5


class Rows(ctypes.Structure):
    """What C is given: the structure of the same name in `rows.c`."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("logits", "ref", "out")],
        *[(f"{name}_kind", ctypes.c_int64) for name in ("logits", "ref", "out")],
        *[(f"{name}_stride", ctypes.c_int64) for name in ("logits", "ref", "out")],
        ("ids", ctypes.c_void_p),
        ("temperature", ctypes.c_void_p),
        ("temperature_stride", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("found", "norms", "coefs")],
        ("softcap", ctypes.c_double),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
    ]


def stats(
    logits: Tensor, ids: Tensor, temperature: Tensor, ref_logits: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `rows.row_stats`.

    Args:
        logits: ``[N, V]``.
        ids: ``[N]``.
        temperature: ``[N]``.
        ref_logits: ``[N, V]`` or None.
        entropy: whether to compute it.

    Source: `functional.logprobs`, which is the oracle.
    """
    if not _is_read(ids, temperature, logits, ref_logits):
        return torch_rows.stats(logits, ids, temperature, ref_logits, entropy)
    return _stats(_library(), logits, ids, temperature, ref_logits, entropy)


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
    """Compute `rows.row_gradient`.

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
    rest = (ids, temperature, ref_logits, norms, coefs, softcap)
    # Rows that share memory, as expanded ones do, would overwrite what the next ones read.
    apart = out.shape[0] < 2 or out.stride(0) >= out.shape[1]
    if apart and _is_read(ids, temperature, logits, ref_logits, out):
        _gradient(_library(), out, logits, *rest)
    else:
        torch_rows.gradient(out, logits, *rest)


@cache
def why_not() -> str | None:
    """Return why C does not compute on this machine, as a clause; None where it does.

    Source: ours.
    """
    built = c_library.load()
    if isinstance(built, str):
        return built
    try:
        return _wrong(built)
    except AttributeError as error:  # no such function in it
        return f"what the C compiler made cannot be called ({error})"


def _library() -> ctypes.CDLL:
    built, why = c_library.load(), why_not()
    if isinstance(built, str) or why is not None:
        raise RuntimeError(f"use_backend('c'): rows are not computed in C here, since {why}")
    return built


def _is_read(ids: Tensor, temperature: Tensor, logits: Tensor, *others: Tensor | None) -> bool:
    """Whether C reads what is given, and every label is one: others are for torch to refuse."""
    width = logits.shape[1]
    matrices = [x for x in (logits, *others) if x is not None]
    return (
        logits.numel() > 0
        and not (ids.is_floating_point() or ids.dtype == torch.bool)
        and all(x.device.type == "cpu" for x in (ids, temperature))
        and temperature.dtype == torch.float32
        and all(x.device.type == "cpu" and x.dtype in KINDS for x in matrices)
        and all(x.stride(1) == 1 or width == 1 for x in matrices)
        and int(ids.max()) < width
    )


def _stats(
    library: ctypes.CDLL,
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found, norms = temperature.new_zeros(5, len(ids)), temperature.new_ones(4, len(ids))
    ids = ids.to(torch.int64).contiguous()
    work = _rows(logits, ref_logits, None, ids, temperature)
    work.found, work.norms = found.data_ptr(), norms.data_ptr()
    _run(library.mossrlhf_stats, work)
    kept = (True, True, entropy, ref_logits is not None, ref_logits is not None)
    logprob, logsumexp, entropies, ref_logprob, kl = (
        # Rows of their own: what an operator returns may not share its memory.
        x.clone() if wanted else x.new_empty(0)
        for x, wanted in zip(found, kept, strict=True)
    )
    return logprob, logsumexp, entropies, ref_logprob, kl, norms


def _gradient(
    library: ctypes.CDLL,
    out: Tensor,
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    norms: Tensor,
    coefs: Tensor,
    softcap: float | None,
) -> None:
    # Kept by name until C is done: pointers keep nothing.
    ids, norms, coefs = ids.to(torch.int64).contiguous(), norms.contiguous(), coefs.contiguous()
    work = _rows(logits, ref_logits, out, ids, temperature)
    work.norms, work.coefs, work.softcap = norms.data_ptr(), coefs.data_ptr(), softcap or 0.0
    _run(library.mossrlhf_gradient, work)


def _rows(
    logits: Tensor, ref: Tensor | None, out: Tensor | None, ids: Tensor, temperature: Tensor
) -> Rows:
    work = Rows(rows=logits.shape[0], width=logits.shape[1], ids=ids.data_ptr())
    work.temperature, work.temperature_stride = temperature.data_ptr(), temperature.stride(0)
    for name, x in (("logits", logits), ("ref", ref), ("out", out)):
        if x is not None:
            setattr(work, name, x.data_ptr())
            setattr(work, f"{name}_kind", KINDS[x.dtype])
            setattr(work, f"{name}_stride", x.stride(0))
    return work


def _run(function: Callable[..., object], work: Rows) -> None:
    """Divide rows among threads, each taking the next in turn."""
    worth = max(1, work.rows * work.width // THREAD_NUMBERS)
    threads = min(torch.get_num_threads(), work.rows, worth)
    pointer, step = ctypes.byref(work), ctypes.c_int64(threads)
    on_threads(lambda first: function(pointer, ctypes.c_int64(first), step), threads)


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def _wrong(library: ctypes.CDLL) -> str | None:
    """Return what a library gets wrong on a few rows, as a clause; None where it agrees."""
    draw = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:  # whatever torch's defaults are when somebody first asks
        return torch.randn(*shape, generator=draw, dtype=torch.float32, device="cpu")

    logits, ref = 3 * normal(2, *CHECKED)
    logits[1, ::3], ref[1, ::3] = -torch.inf, -torch.inf
    ids = torch.tensor([0, 1, CHECKED[1] - 1, -100, 1030], device="cpu")
    taus = torch.tensor([1.0, 0.7, 1.0, 1.0, 2.0], dtype=torch.float32, device="cpu")
    coefs = normal(4, CHECKED[0])
    for dtype, cap in product(KINDS, (None, 20.0)):
        z, r = (x.clamp(min=-(cap or torch.inf)).to(dtype) for x in (logits, ref))
        z = torch.cat([z, z], 1)[:, : z.shape[1]]  # rows apart
        *ours, our_norms = _stats(library, z, ids, taus, r, True)
        *theirs, norms = torch_rows.stats(z, ids, taus, r, True)
        mine, other = torch.empty_like(r), torch.empty_like(r)
        _gradient(library, mine, z, ids, taus, r, norms, coefs, cap)
        torch_rows.gradient(other, z, ids, taus, r, norms, coefs, cap)
        counted = ids >= 0  # of other rows no norms are kept
        pairs = zip([*ours, our_norms[:, counted]], [*theirs, norms[:, counted]], strict=True)
        near = [torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE) for a, b in pairs]
        # What is rounded may be rounded up and down from next to the middle.
        step = TOLERANCE if dtype == torch.float32 else torch.finfo(dtype).eps
        if not all([*near, torch.allclose(mine, other, rtol=step, atol=TOLERANCE)]):
            return f"what the C compiler made computes other numbers than torch, of {dtype}"
    return None
