"""Running models on the meta device: what a device would do there that the meta device does not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LOW = {
    F.linear, F.bilinear, F.scaled_dot_product_attention, F.conv1d, torch.conv1d, torch.matmul,
    torch.bmm, torch.mm, torch.addmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.bmm,
    Tensor.__matmul__,
}  # fmt: skip
"""Functions that autocast computes in half precision, of those in transformers' models."""

HIGH = {F.softmax, torch.softmax, F.layer_norm, F.rms_norm, F.log_softmax, torch.pow, Tensor.pow}
"""Functions that autocast computes in float32."""


class Dry(TorchFunctionMode):
    """Stands in for a device where operations of tensors without memory are asked for it.

    Attention is one kernel that keeps queries, keys, values and result for its backward, as on
    CPU and CUDA. Autocast casts operands, and keeps a cast weight until the forward is over.
    Nothing has a value: a question about one is answered by no, as for prompts of unlike lengths.

    Args:
        bf16: whether autocast to bfloat16 is on.

    Source: torch's documentation of autocast and of scaled dot-product attention.
    """

    def __init__(self, bf16: bool) -> None:
        super().__init__()
        self.bf16 = bf16
        self._cast: dict[int, Tensor] = {}
        self._keeps = False

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Keep the weights that are cast until the forward is over; recomputed, none is kept."""
        self._keeps = True
        try:
            yield
        finally:
            self._keeps = False
            self._cast.clear()

    @contextmanager
    def in_full(self) -> Iterator[None]:
        """Turn autocast off for a while."""
        before, self.bf16 = self.bf16, False
        try:
            yield
        finally:
            self.bf16 = before

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__:
            return False
        if self.bf16 and (func in LOW or func in HIGH):
            low = func in LOW
            args = tuple(self._as(x, low) for x in args)
            kwargs = {key: self._as(x, low) for key, x in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            return _Attention.apply(*args[:3], mask)
        return func(*args, **kwargs)

    def _as(self, given: Any, low: bool) -> Any:
        if not isinstance(given, Tensor) or not given.is_floating_point():
            return given
        if given.dtype == torch.float64 or not low:
            return given.float() if given.dtype in (torch.bfloat16, torch.float16) else given
        leaf = given.is_leaf and given.requires_grad and given.dtype == torch.float32
        if not (leaf and self._keeps):
            return given.to(torch.bfloat16)
        if id(given) not in self._cast:
            self._cast[id(given)] = given.to(torch.bfloat16)
        return self._cast[id(given)]


class _Attention(torch.autograd.Function):
    """The room that fused attention takes."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rows, heads, length, _ = query.shape
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(rows, heads, length, dtype=torch.float32)
        # A mask of truth values becomes one that is added, for each layer anew.
        kept = () if mask is None else (mask.to(query.dtype),)
        ctx.save_for_backward(query, key, value, out, sums, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def backward(loss: Tensor) -> None:
    """Differentiate, under the modes in force: ``Tensor.backward`` would run without them.

    Args:
        loss: a scalar; its gradients add up in its leaves.

    Source: ours.
    """
    engine = torch.autograd.Variable._execution_engine
    ones = torch.ones_like(loss)
    engine.run_backward((loss,), (ones,), False, False, (), True, True)
