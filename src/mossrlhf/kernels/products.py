"""Float32 matrix products on a CPU: by oneDNN where BLAS leaves half of the processor idle.

The BLAS in torch's builds for x86 is MKL, which on processors of other makers than its own keeps to
256-bit instructions. Where these have 512-bit ones, oneDNN, which torch brings along as well, is
about twice as fast, and as exact (`benchmarks/products.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
"""Of a long side of a matrix: what is copied for oneDNN then stays in the cache."""


def product(
    a: Float[Tensor, "N K"], b: Float[Tensor, "K M"], out: Float[Tensor, "N M"] | None = None
) -> Float[Tensor, "N M"]:
    """A·B, without a gradient.

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
            out[:, columns] = _multiplied(a, b[:, columns].t(), None)
        return out
    out.zero_()
    for inner in _blocks(a.shape[1]):
        out.add_(_multiplied(a[:, inner], b[inner].t(), None))
    return out


def add_product(
    total: Float[Tensor, "N M"], a: Float[Tensor, "N K"], b: Float[Tensor, "K M"]
) -> None:
    """Add A·B to a matrix, in place.

    Args:
        total: ``[N, M]``.
        a: ``[N, K]``; a transposed view is as good.
        b: ``[K, M]``.

    Source: ours.
    """
    if not _by_onednn(a, b, 1):
        total.addmm_(a, b)
        return
    turned = b.t().contiguous()  # once for all blocks
    for rows in _blocks(len(a)):
        total[rows].add_(_multiplied(a[rows], turned, None))


def _blocks(size: int) -> Iterator[slice]:
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))


class FastProducts(TorchFunctionMode):
    """Within it linear layers of any model multiply as `product` does, gradients included.

    Nothing is changed in the model: ``torch.nn.functional.linear`` and ``torch.addmm`` are caught
    as they are called. Other types, devices, tensor subclasses and weights lent by ZeRO-3 go
    their usual way, and so does everything where `products` says "blas".

    Source: ours.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Multiply, or leave it to torch."""
        if func is nn.functional.linear and not kwargs:
            x, weight, bias = (*args, None)[:3]
            if _by_onednn(x, weight, 0):
                return _linear(x, weight, bias)
        elif func is torch.addmm and not kwargs:
            bias, x, weight = args
            if bias.ndim == 1 and _by_onednn(x, weight, 1):  # transformers' Conv1D
                return _linear(x, weight.t(), bias)
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiplied(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (dy,) = grads
        wanted = ctx.needs_input_grad
        # By the same function again, so that there is a second derivative.
        dx = _linear(dy, weight.t(), None) if wanted[0] else None
        dw = _linear(dy.t(), x.t(), None) if wanted[1] else None
        return dx, dw, dy.sum(0) if wanted[2] else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    parts = (flat, weight) if bias is None else (flat, weight, bias)
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        found = _Linear.apply(flat, weight, bias)
    else:
        found = _multiplied(flat, weight, bias)
    return found.view(*x.shape[:-1], weight.shape[0])


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X Wᵀ + b."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def _by_onednn(a: Any, b: Any, outer: int) -> bool:
    """Whether oneDNN is to multiply A with B, whose dimension `outer` is the product's last."""
    return (
        products().name == "onednn"
        and _plain(a)
        and _plain(b)
        and a.numel() * b.shape[outer] >= WORTH_IT
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _plain(x: Any) -> bool:
    """Whether this is a float32 matrix on the CPU, and nothing more."""
    fits = type(x) in (Tensor, nn.Parameter) and not hasattr(x, "ds_id")
    return fits and x.dtype == torch.float32 and x.device.type == "cpu" and x.ndim > 1
