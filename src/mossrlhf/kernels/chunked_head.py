"""The output head and a loss over tokens, a chunk of logits at a time.

A chunk is computed, reduced to token statistics, overwritten by its gradient and multiplied by the
weight and the hidden states. A loss that couples tokens computes each chunk twice
(`linear_token_stats`). Full logits exist only of a sharded head that is no linear layer.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules import module
from torch.utils.checkpoint import checkpoint

from mossrlhf.functional import upcast
from mossrlhf.kernels.row_stats import (
    coefficients,
    stats_of,
    temperatures,
    token_stats,
    write_gradient,
)
from mossrlhf.types import LossOutput, TokenStats

CPU_CHUNK_BYTES = 2**25
CUDA_CHUNK_BYTES = 2**30
"""Most bytes of a chunk of float32 logits: little memory, but enough rows for a fast product."""

MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 64, 4096


def chunks(count: int, width: int, cuda: bool) -> Iterator[slice]:
    """Split N = `count` rows of V = `width` logits into chunks of similar size; at least one."""
    budget = CUDA_CHUNK_BYTES if cuda else CPU_CHUNK_BYTES
    most = max(MIN_CHUNK_ROWS, min(MAX_CHUNK_ROWS, budget // (4 * max(1, width))))
    number = max(1, math.ceil(count / most))
    size = max(1, math.ceil(count / number))
    for start in range(0, max(1, count), size):
        yield slice(start, min(start + size, count))


def capped(logits: Tensor, scale: float, softcap: float | None, in_place: bool = False) -> Tensor:
    """Return c·tanh(s·z / c), or s·z without c (Gemma 2, arXiv 2408.00118)."""
    if scale == 1.0 and softcap is None:
        return logits
    if not in_place:
        z = upcast(logits) * scale
        return z if softcap is None else softcap * torch.tanh(z / softcap)
    logits.mul_(scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


class Head:
    """z = c·tanh(s (x Wᵀ + b) / c), one chunk of x after the other, and its gradients.

    The product is computed in autocast's dtype, or without autocast in the operands', and
    accumulated and kept in float32; on the CPU half-precision operands become float32 first.
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
        """Split the N rows into chunks."""
        return chunks(len(self.hidden), len(self.weight), self.hidden.is_cuda)

    def logits(self, rows: slice) -> Tensor:
        """Compute the logits ``[n, V]`` of a chunk."""
        x = self.hidden[rows]
        z = _product(x, self.weight.t(), self.wide, self._room(len(x)))
        if self.bias is not None:
            z += self.bias
        return capped(z, self.scale, self.softcap, in_place=True)

    def _room(self, count: int) -> Tensor | None:
        """A buffer that all chunks share; CUDA's caching allocator needs none."""
        if self.hidden.is_cuda or self.dtype != self.wide:
            return None
        if self._logits is None:
            self._logits = self.hidden.new_empty(count, len(self.weight))
        return self._logits[:count]

    def want(self, hidden: bool, weight: bool, bias: bool) -> None:
        """Allocate the gradients that are needed, of hidden states, weight and bias."""
        for i, wanted in enumerate((hidden, weight, bias)):
            given = self._inputs[i]
            if wanted and given is not None:
                self.gradients[i] = given.new_zeros(given.shape, dtype=self.wide), given.dtype

    def add_gradient(
        self, rows: slice, z: Tensor, ids: Tensor, tau: Tensor, norms: Tensor, coefs: Tensor
    ) -> None:
        """Add a chunk's gradients; its logits are overwritten if their dtype allows it."""
        dz = z if self.dtype == z.dtype else torch.empty_like(z, dtype=self.dtype)
        scaled = coefs * self.scale
        write_gradient(dz, z, ids[rows], tau[rows], None, norms, scaled, self.softcap)
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
    """Convert a gradient, times a factor, from its accumulation dtype to its tensor's."""
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
    """A·B, accumulated in float32 and rounded once, to `dtype`."""
    if a.dtype == dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=dtype)  # half precision, only on CUDA


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add A·B to `total` in its dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


LossFn = Callable[[TokenStats, slice], LossOutput]
"""Statistics of n tokens and their slice of N → their share of the loss."""


class _LinearStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        tau: Tensor,
        settings: tuple[float, float | None],
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = Head(hidden, weight, bias, *settings)
        found: list[tuple[Tensor, ...]] = []
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in head.chunks():
                z = head.logits(rows)
                found.append(stats_of(z, ids[rows], tau[rows], None, entropy))
                del z  # before the next chunk is allocated
        logprob, logsumexp, entropies, _, _, norms = (
            torch.cat(parts, -1) for parts in zip(*found, strict=True)
        )
        ctx.save_for_backward(hidden, weight, bias, ids, tau, norms, entropies)
        ctx.settings, ctx.entropy, ctx.dtype = settings, entropy, head.dtype
        return logprob, logsumexp, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, tau, norms, entropies = ctx.saved_tensors
        g_logprob, g_logsumexp, g_entropy = grads
        coefs = coefficients(
            norms,
            g_logprob,
            entropy=(entropies, g_entropy) if ctx.entropy else None,
            g_logsumexp=g_logsumexp,
        )
        scale, softcap = ctx.settings
        head = Head(hidden, weight, bias, scale, softcap, ctx.dtype)
        head.want(*ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in head.chunks():
                z = head.logits(rows)
                head.add_gradient(rows, z, ids, tau, norms[:, rows], coefs[:, rows])
                del z
        return *(rounded(g) for g in head.gradients), None, None, None, None


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        tau: Tensor,
        settings: tuple[float, float | None],
        entropy: bool,
        loss_fn: LossFn,
        stats: dict[str, Tensor],
    ) -> Tensor:
        head = Head(hidden, weight, bias, *settings)
        needed = ctx.needs_input_grad[:3]
        head.want(*needed)
        total = tau.new_zeros(())
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in head.chunks():
                z = head.logits(rows)
                logprob, logsumexp, entropies, _, _, norms = stats_of(
                    z, ids[rows], tau[rows], None, entropy
                )
                given = TokenStats(logprob, entropies if entropy else None, logsumexp)
                share, grads = _differentiated(loss_fn, given, rows, any(needed))
                total = total + share.loss.detach()
                for name, value in share.stats.items():
                    value = value.detach()
                    stats[name] = stats[name] + value if name in stats else value
                if grads is not None:
                    coefs = coefficients(
                        norms,
                        grads[0],
                        entropy=(entropies, grads[2]) if entropy else None,
                        g_logsumexp=grads[1],
                    )
                    head.add_gradient(rows, z, ids, tau, norms, coefs)
                del z  # before the next chunk is allocated
        ctx.gradients = head.gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_token_loss: its gradient was computed once and is freed; for a second "
                "backward pass call it again, or use linear_token_stats"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (rounded(g, upstream) for g in gradients)
        return *scaled, None, None, None, None, None, None


def _differentiated(
    loss_fn: LossFn, given: TokenStats, rows: slice, wanted: bool
) -> tuple[LossOutput, list[Tensor] | None]:
    """Return a chunk's loss and its gradients for log-prob, log-sum-exp and entropy."""
    leaves = [x for x in (given.logprob, given.logsumexp, given.entropy) if x is not None]
    with torch.set_grad_enabled(wanted):
        for leaf in leaves:
            leaf.requires_grad_(wanted)
        share = loss_fn(given, rows)
        if share.loss.shape != ():
            raise ValueError(
                f"loss_fn: returned {tuple(share.loss.shape)}, expected the sum over the tokens it "
                "was given, a scalar"
            )
        if not wanted:
            return share, None
        found: Any = [None] * len(leaves)
        if share.loss.requires_grad:
            found = torch.autograd.grad(share.loss, leaves, allow_unused=True)
    pairs = zip(found, leaves, strict=True)
    return share, [torch.zeros_like(leaf) if g is None else g for g, leaf in pairs]


@torch.compiler.disable
def linear_token_stats(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    ids: Int[Tensor, " N"],
    *,
    temperature: float | Float[Tensor, " N"] = 1.0,
    entropy: bool = True,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    """Compute `token_stats` of z = c·tanh(s (x Wᵀ + b) / c) from the hidden states x, in chunks.

    It takes one matrix product; four with a gradient, since logits are computed again.

    Args:
        hidden: ``[N, D]`` hidden states at the positions before each token.
        weight: ``[V, D]`` of the output head; its gradient is accumulated in float32.
        ids: ``[N]`` token ids; `IGNORED_ID` (any negative id) ignores a row.
        temperature: τ the tokens were sampled at, one for all or ``[N]``.
        entropy: False leaves the entropy out.
        bias: ``[V]`` b, or None.
        scale: s, a factor on the logits.
        softcap: c, or None for no cap.

    Returns:
        `TokenStats` of ``[N]``, nats.

    Raises:
        ValueError: if shapes do not fit.

    Source: P1 §3.2; softcap: Gemma 2 (arXiv 2408.00118 §2).
    """
    _require_shapes(hidden, weight, ids)
    logprob, logsumexp, entropies = _LinearStats.apply(
        hidden,
        weight,
        bias,
        ids,
        temperatures(temperature, hidden, len(ids)),
        (scale, softcap),
        entropy,
    )
    return TokenStats(logprob, entropies if entropy else None, logsumexp)


@torch.compiler.disable
def linear_token_loss(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    ids: Int[Tensor, " N"],
    loss_fn: LossFn,
    *,
    temperature: float | Float[Tensor, " N"] = 1.0,
    entropy: bool = True,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> LossOutput:
    """Compute a loss that is a sum over tokens, in three matrix products instead of four.

    `loss_fn` is called once for each chunk of tokens; autograd runs only through it, on ``[n]``
    numbers. Losses that couple tokens (a mean over a sequence's ratios) need
    `linear_token_stats`. Other tensors that `loss_fn` uses get no gradient. Not for losses scaled
    in float16: the gradient is rounded before the scale is applied.

    Args: those of `linear_token_stats`, and:
        loss_fn: maps `TokenStats` of n tokens and their slice of N to their contribution to the
            loss and its statistics; the contributions are added.

    Returns:
        the sum of the contributions; a second backward pass through it raises.

    Raises:
        ValueError: if shapes do not match, or `loss_fn` returns no scalar.
    """
    _require_shapes(hidden, weight, ids)
    if not torch.is_grad_enabled():  # which an autograd function cannot see
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    stats: dict[str, Tensor] = {}
    loss = _LinearLoss.apply(
        hidden,
        weight,
        bias,
        ids,
        temperatures(temperature, hidden, len(ids)),
        (scale, softcap),
        entropy,
        loss_fn,
        stats,
    )
    return LossOutput(loss, stats)


def _require_shapes(hidden: Tensor, weight: Tensor, ids: Tensor) -> None:
    if hidden.ndim != 2 or ids.shape != hidden.shape[:1] or weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            f"hidden, weight, ids: got {tuple(hidden.shape)}, {tuple(weight.shape)} and "
            f"{tuple(ids.shape)}, expected [N, D], [V, D] and [N]; gather the rows of tokens first"
        )


def is_linear(head: nn.Module) -> bool:
    """Whether a head is exactly x Wᵀ + b: no adapter, quantization, parametrization or hook."""
    weight = head._parameters.get("weight")  # attribute access would gather it under ZeRO-3
    plain = type(head) is nn.Linear and "forward" not in vars(head)
    if not plain or weight is None or weight.is_meta or hasattr(head, "_hf_hook"):
        return False
    if _is_partitioned(weight):
        return True  # its hooks are ZeRO-3's
    # A sharded head has DTensors; other subclasses (quantized ones) redefine the product.
    if type(weight) not in (nn.Parameter, Tensor) and type(weight.data).__name__ != "DTensor":
        return False
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks)
    return not any(hooks) and not head._backward_pre_hooks and not _global_hooks()


def applied(head: nn.Module, hidden: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape V"]:
    """Apply a head as `head_token_stats` does: only its weight if it is linear."""
    if not is_linear(head):
        return head(hidden)
    return _within(head, lambda x: nn.Linear.forward(head, x), hidden)  # type: ignore[arg-type]


def head_token_stats(
    head: nn.Module,
    hidden: Float[Tensor, "N D"],
    ids: Int[Tensor, " N"],
    *,
    temperature: float | Float[Tensor, " N"] = 1.0,
    entropy: bool = True,
    scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    """Compute `linear_token_stats` of any head; one that is not linear runs twice for a gradient.

    A sharded head that is not linear runs once, on all N tokens.

    Args: those of `linear_token_stats`, but a head that maps ``[n, D]`` to ``[n, V]``.

    Source: recomputed chunks: Chen et al. (arXiv 1604.06174).
    """
    if is_linear(head):
        options: dict[str, Any] = dict(temperature=temperature, entropy=entropy)
        options |= dict(scale=scale, softcap=softcap)

        def by_weight(x: Tensor) -> tuple[Tensor | None, ...]:
            stats = linear_token_stats(x, head.weight, ids, bias=head.bias, **options)
            return stats.logprob, stats.entropy, stats.logsumexp

        return TokenStats(*_within(head, by_weight, hidden))

    def score(x: Tensor, tokens: Tensor, tau: Any) -> tuple[Any, ...]:
        logits = capped(head(x), scale, softcap)
        stats = token_stats(logits, tokens, tau, entropy)
        return stats.logprob, stats.entropy, stats.logsumexp

    if any(map(_is_partitioned, head.parameters())) or isinstance(head, FSDPModule):
        # Each call is collective, so all processes must make equally many.
        return TokenStats(*score(hidden, ids, temperature))
    parts = []
    for rows in chunks(len(ids), _width(head), hidden.is_cuda):
        tau = temperature
        if isinstance(tau, Tensor) and tau.ndim:
            tau = tau[rows]
        given = hidden[rows], ids[rows], tau
        if torch.is_grad_enabled():
            parts.append(checkpoint(score, *given, use_reentrant=False))
        else:
            parts.append(score(*given))
    logprob, entropies, logsumexp = (
        None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)
    )
    assert logprob is not None
    return TokenStats(logprob, entropies, logsumexp)


def head_token_loss(
    head: nn.Module,
    hidden: Float[Tensor, "N D"],
    ids: Int[Tensor, " N"],
    loss_fn: LossFn,
    **options: Any,
) -> LossOutput:
    """Compute `linear_token_loss` of any head; one that is not linear costs a fourth product.

    Args: those of `linear_token_loss`, but a head that maps ``[n, D]`` to ``[n, V]``.
    """
    if is_linear(head):
        found: dict[str, Tensor] = {}

        def by_weight(x: Tensor) -> Tensor:
            output = linear_token_loss(x, head.weight, ids, loss_fn, bias=head.bias, **options)
            found.update(output.stats)
            return output.loss

        return LossOutput(_within(head, by_weight, hidden), found)
    return loss_fn(head_token_stats(head, hidden, ids, **options), slice(0, len(ids)))


def _is_partitioned(weight: Tensor | None) -> bool:
    """Whether ZeRO-3 has partitioned a weight, and gathers it only in calls of its module."""
    return hasattr(weight, "ds_id")


def _within(head: Any, work: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """Call `work` with a head's weight; within a call of the head, which ZeRO-3's hooks see."""
    if not _is_partitioned(head._parameters["weight"]):
        return work(hidden)
    head.forward = work
    try:
        return head(hidden)
    finally:
        del head.forward


def _global_hooks() -> bool:
    """Whether global module hooks are registered."""
    known = (module._global_forward_hooks, module._global_forward_pre_hooks)
    return any(known) or bool(module._global_backward_hooks)


def _width(head: nn.Module) -> int:
    """V of a head, or 65,536 if unknown."""
    return int(getattr(head, "out_features", 2**16))
