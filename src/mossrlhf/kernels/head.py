"""An output head, applied to one chunk of hidden states after the other."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mossrlhf.functional import upcast
from mossrlhf.kernels.dispatch import backend_of

CPU_CHUNK_BYTES = 2**25
CUDA_CHUNK_BYTES = 2**30
"""Of the float32 logits of one chunk: few bytes to save memory, enough rows for the product."""

MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 64, 4096


def chunks(count: int, width: int, cuda: bool) -> Iterator[slice]:
    """Cut rows of logits into chunks of about the same size, within the budgets above.

    There is at least one, for a loss to name its statistics.

    Args:
        count: N.
        width: V.
        cuda: which budget.

    Source: ours.
    """
    budget = CUDA_CHUNK_BYTES if cuda else CPU_CHUNK_BYTES
    most = max(MIN_CHUNK_ROWS, min(MAX_CHUNK_ROWS, budget // (4 * max(1, width))))
    number = max(1, math.ceil(count / most))
    size = max(1, math.ceil(count / number))
    for start in range(0, max(1, count), size):
        yield slice(start, min(start + size, count))


def capped(logits: Tensor, scale: float, softcap: float | None, in_place: bool = False) -> Tensor:
    """c·tanh(s·z / c), in float32 at least.

    Args:
        logits: z, any shape.
        scale: s.
        softcap: c, or None for s·z.
        in_place: whether z may be overwritten.

    Source: Gemma 2 (arXiv 2408.00118 §2).
    """
    if scale == 1.0 and softcap is None:
        return logits
    if not in_place:
        z = upcast(logits) * scale
        return z if softcap is None else softcap * torch.tanh(z / softcap)
    logits.mul_(scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


class Head:
    """z = c·tanh(s (x Wᵀ + b) / c) for one chunk of x after the other, and the gradients of it.

    The product is computed in autocast's type where that is on, else in that of the operands, and
    summed and kept in float32; on the CPU operands in half precision become float32 first.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype or _product_dtype(hidden, weight)
        self.hidden, self.weight = hidden.to(self.dtype), weight.to(self.dtype)
        self.bias, self.scale, self.softcap = bias, scale, softcap
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.gradients: list[tuple[Tensor, torch.dtype] | None] = [None, None, None]
        self._inputs = (hidden, weight, bias)
        self._logits: Tensor | None = None

    def chunks(self) -> Iterator[slice]:
        """Cut N rows into chunks of like size."""
        return chunks(len(self.hidden), len(self.weight), self.hidden.is_cuda)

    def logits(self, rows: slice) -> Tensor:
        """Compute the logits ``[n, V]`` of a chunk."""
        x = self.hidden[rows]
        z = _product(x, self.weight.t(), self.wide, self._room(len(x)))
        if self.bias is not None:
            z += self.bias
        return capped(z, self.scale, self.softcap, in_place=True)

    def _room(self, count: int) -> Tensor | None:
        """Where the logits of every chunk go in turn; on CUDA the allocator does as well."""
        if self.hidden.is_cuda or self.dtype != self.wide:
            return None
        if self._logits is None:
            self._logits = self.hidden.new_empty(count, len(self.weight))
        return self._logits[:count]

    def want(self, hidden: bool, weight: bool, bias: bool) -> None:
        """Make room for the gradients of hidden states, weight and bias, as they are wanted."""
        for i, wanted in enumerate((hidden, weight, bias)):
            given = self._inputs[i]
            if wanted and given is not None:
                self.gradients[i] = given.new_zeros(given.shape, dtype=self.wide), given.dtype

    def add_gradient(
        self, rows: slice, z: Tensor, ids: Tensor, tau: Tensor, norms: Tensor, coefs: Tensor
    ) -> None:
        """Add what a chunk has to say; its logits are overwritten where their type allows it."""
        dz = z if self.dtype == z.dtype else torch.empty_like(z, dtype=self.dtype)
        scaled = coefs * self.scale
        backend_of(z).gradient(dz, z, ids[rows], tau[rows], None, norms, scaled, self.softcap)
        d_hidden, d_weight, d_bias = self.gradients
        if d_hidden is not None:
            d_hidden[0][rows] = _product(dz, self.weight, self.wide)
        if d_weight is not None:
            _add_product(d_weight[0], dz.t(), self.hidden[rows])
        if d_bias is not None:
            d_bias[0].add_(dz.sum(0, dtype=self.wide))


def rounded(
    gradient: tuple[Tensor, torch.dtype] | None, factor: Tensor | None = None
) -> Tensor | None:
    """Return a gradient in the type of what it is of, rounded once.

    Args:
        gradient: in the type it was summed in, and the other type; or None.
        factor: to multiply it by first, where it was summed; None for 1.

    Source: ours.
    """
    if gradient is None:
        return None
    value, dtype = gradient
    return (value if factor is None else value.mul_(factor)).to(dtype)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    kind = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and not hidden.is_cuda else dtype


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """A·B, summed in float32 and rounded once, to `dtype`."""
    if a.dtype == dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=dtype)  # half precision, which is left as it is on CUDA alone


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add A·B to `total` in the type of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
