"""Float32 matrix products on a CPU: by oneDNN where BLAS leaves half of the processor idle.

The BLAS in torch's builds for x86 is MKL, which on processors of other makers than its own keeps to
256-bit instructions. Where these have 512-bit ones, oneDNN, which torch brings along as well, is
faster, and as exact; docs/performance.md has what an iteration gains by it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

WORTH_IT = 2**20
"""Multiplications below which a product is left to BLAS: the detour costs more than it saves."""

NAMES = ("onednn", "blas")


@dataclass(frozen=True)
class Products:
    """Who multiplies float32 matrices on the CPU, and why.

    Args:
        name: one of `NAMES`.
        reason: a clause to follow "since".

    Source: ours.
    """

    name: str
    reason: str


_forced: list[str] = []
"""What `use_products` says, on all threads."""


@cache
def _chosen() -> Products:
    maker, widest = _maker(), torch.backends.cpu.get_cpu_capability()
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return Products("blas", "this torch comes without oneDNN")
    if not torch.backends.mkl.is_available():
        return Products("blas", "torch's BLAS is not MKL")
    if maker in ("", "GenuineIntel"):
        return Products("blas", f"the processor's maker is {maker or 'unknown'}")
    if widest != "AVX512":
        return Products("blas", f"the widest instructions of the processor are {widest}")
    return Products("onednn", f"MKL would keep to AVX2 on this processor of {maker}")


def _maker() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def products() -> Products:
    """Return who multiplies float32 matrices on the CPU. Source: ours."""
    return Products(_forced[-1], "use_products() says so") if _forced else _chosen()


@contextmanager
def use_products(name: str) -> Iterator[None]:
    """Let one of `NAMES` multiply, whatever the processor; for tests and measurements.

    Args:
        name: "onednn" or "blas".

    Raises:
        ValueError: where there is no such name.

    Source: ours.
    """
    if name not in NAMES:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(NAMES)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


BLOCK = 2048
"""Of a vocabulary: what is copied for oneDNN then stays in the cache."""

SIZES = (1024, 256, 128, 64, 32, 16)
"""Rows that oneDNN is given at a time, unless there are a multiple of `ROUND`: for each new size
it keeps half a megabyte of instructions, and no two batches have the same number of tokens."""

CALL = 32
"""Rows that take as long as turning the weight around, as oneDNN does in each call."""

ROUND = 128


def product(
    a: Float[Tensor, "N K"], b: Float[Tensor, "K M"], out: Float[Tensor, "N M"] | None = None
) -> Float[Tensor, "N M"]:
    """A·B for any number N of rows, without a gradient.

    Args:
        a: ``[N, K]``.
        b: ``[K, M]``; a transposed view is as good.
        out: ``[N, M]`` to write to; None for new memory.

    Source: ours.
    """
    if not _by_onednn(a, b, 1):
        return torch.mm(a, b, out=out)
    out = a.new_empty(len(a), b.shape[1]) if out is None else out
    if a.shape[1] <= b.shape[1]:
        for columns in _blocks(b.shape[1]):
            _write_rows(out[:, columns], a, b[:, columns].t())
        return out
    out.zero_()
    for inner in _blocks(a.shape[1]):
        out.add_(_by_rows(a[:, inner], b[inner].t(), None))
    return out


def add_product(
    total: Float[Tensor, "N M"], a: Float[Tensor, "N K"], b: Float[Tensor, "K M"]
) -> None:
    """Add A·B to a matrix, in place, for any length K of the sum.

    Args:
        total: ``[N, M]``.
        a: ``[N, K]``; a transposed view is as good.
        b: ``[K, M]``.

    Source: ours.
    """
    if not _by_onednn(a, b, 1):
        total.addmm_(a, b)
        return
    for inner in pieces(a.shape[1]):
        turned = b[inner].t().contiguous()  # once for all blocks
        for rows in _blocks(len(a)):
            total[rows].add_(_multiplied(a[rows, inner], turned, None))


@contextmanager
def fast_products() -> Iterator[None]:
    """Within this context linear layers of any model multiply as `product` does, both ways.

    Nothing is changed in the model: ``torch.nn.functional.linear`` and ``torch.addmm`` are others
    meanwhile, in all threads. They leave other types, devices, tensor subclasses and weights that
    ZeRO-3 lends to torch, and all of it where `products` says "blas".

    Source: ours; a `TorchFunctionMode` would cost a microsecond in every other function.
    """
    global _inside
    if products().name != "onednn":
        yield
        return
    with _lock:
        _inside += 1
        # Functions that somebody else has put there keep their place.
        if nn.functional.linear is _torch_linear:
            nn.functional.linear = linear
        if torch.addmm is _torch_addmm:
            torch.addmm = _addmm  # type: ignore[assignment]
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and nn.functional.linear is linear:
                nn.functional.linear = _torch_linear
            if _inside == 0 and torch.addmm is _addmm:
                torch.addmm = _torch_addmm


_lock, _inside = Lock(), 0
_torch_linear, _torch_addmm = nn.functional.linear, torch.addmm
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """``torch.nn.functional.linear``, by oneDNN where that is faster.

    Args:
        input: ``[..., K]``.
        weight: ``[M, K]``.
        bias: ``[M]`` or None.

    Source: torch's signature.
    """
    if not _by_onednn(input, weight, 0) or not _fits(bias, weight.shape[0]):
        return _torch_linear(input, weight, bias)
    return _linear(input, weight, bias)


def _addmm(input: Any, mat1: Any, mat2: Any, **kwargs: Any) -> Any:
    """``torch.addmm``, by which GPT-2 and its like have their linear layers."""
    if kwargs or not _by_onednn(mat1, mat2, 1) or not _fits(input, mat2.shape[1]):
        return _torch_addmm(input, mat1, mat2, **kwargs)
    return _linear(mat1, mat2.t(), input)


class _Linear(torch.autograd.Function):
    """x Wᵀ + b, with N rows; its gradients are made of products as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # What is frozen, as under an adapter, needs no input kept for its gradient.
        kept = x if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, weight if ctx.needs_input_grad[0] else None)
        return _by_rows(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (dy,), wanted = grads, ctx.needs_input_grad
        dx = _linear(dy, weight.t(), None) if wanted[0] else None
        dw = _Outer.apply(dy, x) if wanted[1] else None
        return dx, dw, dy.sum(0) if wanted[2] else None


class _Outer(torch.autograd.Function):
    """yᵀ x, a sum over N rows."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(y, x)
        # What comes first is copied: the narrower of the two.
        turned = x.shape[1] < y.shape[1]
        a, b = (x, y) if turned else (y, x)
        parts = [_multiplied(a[rows].t(), b[rows].t(), None) for rows in pieces(len(x))]
        total = parts[0]
        for part in parts[1:]:
            total.add_(part)
        return total.t() if turned else total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, x = ctx.saved_tensors
        (g,), wanted = grads, ctx.needs_input_grad
        return x @ g.t() if wanted[0] else None, y @ g if wanted[1] else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    parts = (flat, weight) if bias is None else (flat, weight, bias)
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        found = _Linear.apply(flat, weight, bias)
    else:
        found = _by_rows(flat, weight, bias)
    return found.view(*x.shape[:-1], weight.shape[0])


def _by_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    parts = [_filled_up(x[rows], weight, bias) for rows in pieces(len(x), fill=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _write_rows(out: Tensor, x: Tensor, weight: Tensor) -> None:
    for rows in pieces(len(x), fill=True):
        out[rows] = _filled_up(x[rows], weight, None)


def _filled_up(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X Wᵀ + b, by as many rows as one of `SIZES`."""
    if short := filled(len(x)) - len(x):
        return _multiplied(nn.functional.pad(x, (0, 0, 0, short)), weight, bias)[:-short]
    return _multiplied(x, weight, bias)


def filled(count: int) -> int:
    """Return how many rows one of `pieces` is filled up to.

    Args:
        count: its rows.

    Source: ours.
    """
    if count % ROUND == 0:
        return count
    if count < SIZES[-1]:
        return -4 * (-count // 4)
    return min(size for size in SIZES if size >= count)


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X Wᵀ + b by oneDNN."""
    if x.shape[1] < SIZES[-1]:  # the last piece of a sum
        return _torch_linear(x, weight, bias)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def pieces(count: int, fill: bool = False) -> Iterator[slice]:
    """Cut a number of tokens into pieces of few different sizes.

    Args:
        count: N.
        fill: whether a last piece may fall short of a size where filling it up costs less than
            cutting it.

    Source: ours.
    """
    start, sizes = 0, (count,) if count % ROUND == 0 and count else SIZES
    for size in sizes:
        enough = size - min(CALL, size * 3 // 8) if fill else size
        while count - start >= enough:
            yield slice(start, min(start + size, count))
            start += size
    if start < count:
        yield slice(start, count)


def _blocks(size: int) -> Iterator[slice]:
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))


def _by_onednn(a: Any, b: Any, outer: int) -> bool:
    """Whether oneDNN is to multiply A with B, whose dimension `outer` is the product's last."""
    return (
        products().name == "onednn"
        and _plain(a)
        and _plain(b)
        and a.numel() * b.shape[outer] >= WORTH_IT
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
    )


def _fits(bias: Any, size: int) -> bool:
    """Whether a bias is none, or the plain row of numbers that oneDNN takes it for."""
    return bias is None or (_plain(bias[None]) and bias.shape == (size,) and bias.is_contiguous())


def _plain(x: Any) -> bool:
    """Whether this is a float32 matrix on the CPU, and nothing more."""
    fits = type(x) in (Tensor, nn.Parameter) and not hasattr(x, "ds_id")
    fits = fits and x.dtype == torch.float32 and x.device.type == "cpu" and x.ndim > 1
    # Under torch.func tensors look like others, and are not.
    return fits and x.layout == torch.strided and not _is_wrapped(x)
