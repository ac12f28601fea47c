"""Statistics of rows of logits, differentiable: one read forward; one read, one write backward.

With x = z/τ, m = max x and d = Σ exp(x − m):

    log p(a) = (x_a − m) − log d        H = log d − Σ exp(x − m)(x − m) / d

The gradient of whatever is computed from these numbers is, for each row,

    dz_v = (g 1[v = a] + p_v (α + β (x_v − m) + γ (r_v − m_r))) / τ

with r the reference's logits over τ, so a backend needs only g, α, β and γ.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mossrlhf.types import TokenStats

BACKENDS = {"triton": "triton_rows", "torch": "torch_rows"}
"""Backends and their modules, which have two functions: ``stats`` and ``gradient``."""

_forced: list[str] = []
"""Set by `use_backend` for all threads: autograd on CUDA runs in another."""


@dataclass(frozen=True)
class Backend:
    """The backend that computes over rows of logits, and why.

    Args:
        name: one of `BACKENDS`.
        reason: a clause to follow "since".
    """

    name: str
    reason: str

    @property
    def module(self) -> ModuleType:
        """The module with the functions ``stats`` and ``gradient``."""
        return import_module(f"mossrlhf.kernels.{BACKENDS[self.name]}")


@cache
def _chosen(device_type: str, dtype: torch.dtype) -> Backend:
    if device_type != "cuda":
        return Backend("torch", f"the device is {device_type!r}, and triton's kernels need CUDA")
    if find_spec("triton") is None:
        return Backend("torch", "triton is not installed")
    if dtype == torch.float64:
        return Backend("torch", "triton's kernels do not compute in float64")
    return Backend("triton", "the device is CUDA, and triton is installed")


def backend(device: torch.device | str, dtype: torch.dtype = torch.float32) -> Backend:
    """Return the backend of a device: triton on CUDA where it is installed, else torch in blocks.

    Args:
        device: where the logits live.
        dtype: of the logits.
    """
    if _forced:
        return Backend(_forced[-1], "use_backend() says so")
    return _chosen(torch.device(device).type, dtype)


def backend_of(logits: Tensor) -> ModuleType:
    """Return the backend's module for these logits."""
    return backend(logits.device, logits.dtype).module


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend within the block, whatever the device; for tests and measurements.

    Args:
        name: one of `BACKENDS`. "triton" on CPU tensors needs ``TRITON_INTERPRET=1`` in the
            environment before triton is imported.

    Raises:
        ValueError: where there is no such backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(BACKENDS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


IGNORED_ID = -100
"""The id of a row to ignore: its statistics and its gradient are zero."""


@torch.library.custom_op("mossrlhf::row_stats", mutates_args=())
def row_stats(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    entropy: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the statistics of N rows of logits ``[N, V]``, of any strides.

    Rows with a negative id are ignored; `in_place` lets the gradient overwrite the logits.

    Returns:
        log-prob, log Σ exp x, entropy, the reference's log-prob, KL(π‖π_ref): ``[N]`` each, nats,
        or ``[0]`` where left out; last ``[4, N]``: max z and d of policy and reference.

    Source: the online softmax, arXiv 1805.02867.
    """
    return backend_of(logits).stats(logits, ids, temperature, ref_logits, entropy)


@row_stats.register_fake
def _(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    entropy: bool,
    in_place: bool,
) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    left_out = 0 if ref_logits is None else rows
    sizes = [(rows,), (rows,), (rows if entropy else 0,), (left_out,), (left_out,), (4, rows)]
    return tuple(temperature.new_empty(size) for size in sizes)


@torch.library.custom_op("mossrlhf::row_gradient", mutates_args={"out"})
def row_gradient(
    out: Tensor,
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    norms: Tensor,
    coefs: Tensor,
    softcap: float | None,
) -> None:
    """Write the gradient for N rows of logits into `out`, which may be `logits` itself.

    Rows that are ignored, or whose coefficients are all zero, become zeros whatever they hold.

    Args:
        out: ``[N, V]`` any floating type.
        logits: ``[N, V]``.
        ids: ``[N]``.
        temperature: ``[N]``.
        ref_logits: ``[N, V]`` or None.
        norms: ``[4, N]`` of `row_stats`.
        coefs: ``[4, N]``: g, α, β, γ of the formula above.
        softcap: c, where the logits are c·tanh(y/c) and the gradient is for y; else None.
    """
    backend_of(logits).gradient(out, logits, ids, temperature, ref_logits, norms, coefs, softcap)


def coefficients(
    norms: Float[Tensor, "4 N"],
    g_logprob: Float[Tensor, " N"],
    *,
    entropy: tuple[Float[Tensor, " N"], Float[Tensor, " N"]] | None = None,
    kl: tuple[Float[Tensor, " N"], Float[Tensor, " N"]] | None = None,
    g_logsumexp: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "4 N"]:
    """Combine the gradients of all statistics into g, α, β, γ of the formula above.

    `entropy` and `kl` are pairs of value and gradient; None where the loss does not use them.

    Source: ∂log p(a) = 1_a − p, ∂H = −p (log p + H), ∂KL = p (log p − log q − KL).
    """
    log_d = norms[1].log()
    alpha = -g_logprob if g_logsumexp is None else g_logsumexp - g_logprob
    beta = gamma = torch.zeros_like(alpha)
    if entropy is not None:
        value, g = entropy
        alpha = alpha - _times(g, value - log_d)
        beta = -g
    if kl is not None:
        value, g = kl
        alpha = alpha + _times(g, norms[3].log() - log_d - value)
        beta, gamma = beta + g, -g
    return torch.stack([g_logprob, alpha, beta, gamma])


def _times(g: Tensor, x: Tensor) -> Tensor:
    """g·x, and 0 where g = 0, even for an infinite x."""
    return torch.where(g == 0, 0.0, g * x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, temperature, ref_logits, ctx.entropy, ctx.in_place = inputs
    _, _, entropies, _, kl, norms = output
    ctx.mark_non_differentiable(norms)
    ctx.save_for_backward(logits, ids, temperature, ref_logits, norms, entropies, kl)


@once_differentiable
def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    logits, ids, temperature, ref_logits, norms, entropies, kl = ctx.saved_tensors
    g_logprob, g_logsumexp, g_entropy, _, g_kl, _ = grads
    coefs = coefficients(
        norms,
        g_logprob,
        entropy=(entropies, g_entropy) if ctx.entropy else None,
        kl=None if ref_logits is None else (kl, g_kl),
        g_logsumexp=g_logsumexp,
    )
    out = logits.detach() if ctx.in_place else torch.empty_like(logits)
    row_gradient(out, logits, ids, temperature, ref_logits, norms, coefs, None)
    return out, None, None, None, None, None


row_stats.register_autograd(_backward, setup_context=_setup_context)


def temperatures(
    temperature: float | Float[Tensor, " N"], logits: Tensor, rows: int
) -> Float[Tensor, " N"]:
    """Return ``[N]`` temperatures in the type statistics are computed in, on the logits' device.

    Raises:
        ValueError: where there is neither one nor N of them, one requires a gradient, or one is
            not positive (not checked on a GPU, where that would synchronize).
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        if temperature.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "temperature: it requires a gradient, which it does not get; detach it"
            )
        checked = temperature.device.type == "cpu" and not torch.compiler.is_compiling()
        if checked and not bool((temperature > 0).all()):
            raise ValueError(
                f"temperature: got {temperature.min().item()}, expected numbers above 0"
            )
        if temperature.shape not in ((), (rows,)):
            raise ValueError(
                f"temperature: got {tuple(temperature.shape)}, expected a number or one for each "
                f"of {rows} tokens"
            )
        return temperature.to(logits.device, dtype).expand(rows)
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a number above 0")
    return torch.full((1,), temperature, dtype=dtype, device=logits.device).expand(rows)


def token_stats(
    logits: Float[Tensor, "*shape V"],
    ids: Int[Tensor, "*shape"],
    temperature: float | Float[Tensor, "*shape"] = 1.0,
    entropy: bool = True,
    ref_logits: Float[Tensor, "*shape V"] | None = None,
    *,
    in_place: bool = False,
) -> TokenStats:
    """Compute log-prob, log-sum-exp and, on request, entropy and exact KL of every token.

    The same numbers as `functional.token_stats`, without its copies of the logits: on CUDA by one
    triton kernel each way, elsewhere by torch, a few rows at a time. Computed in float32 (float64
    logits in float64). Differentiable in the logits; the reference is a constant.

    Args:
        logits: ``[..., V]`` any floating type; copied once where rows are not evenly spaced, as in
            ``logits[:, :-1]`` of several sequences.
        ids: ``[...]``; `IGNORED_ID` (any negative id) where a row is to be ignored.
        temperature: τ the tokens were sampled at, one for all or ``[...]``.
        entropy: False leaves the entropy out.
        ref_logits: ``[..., V]`` of the reference, for its log-probability and the exact KL
            divergence from it; at the same τ.
        in_place: whether the gradient overwrites the logits, which saves their memory once more;
            a second backward pass then raises.

    Returns:
        `TokenStats` of ``[...]``, nats.

    Raises:
        ValueError: where shapes do not fit, a temperature is not positive, or the reference
            requires a gradient.

    Source: P1 §3.2, §5.2 (KL), §5.3.1 (entropy).
    """
    if ids.shape != logits.shape[:-1]:
        raise ValueError(
            f"ids: got {tuple(ids.shape)}, expected {tuple(logits.shape[:-1])}, one for each row "
            "of logits"
        )
    rows = ids.numel()
    flat, flat_ref = logits.reshape(rows, logits.shape[-1]), None
    if ref_logits is not None:
        if ref_logits.shape != logits.shape:
            raise ValueError(
                f"ref_logits: got {tuple(ref_logits.shape)}, expected {tuple(logits.shape)}"
            )
        if ref_logits.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "ref_logits: they require a gradient, which the reference does not get; detach "
                "them, or use functional.exact_kl"
            )
        flat_ref = ref_logits.reshape(flat.shape)
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(ids.shape).reshape(rows)
    taus = temperatures(temperature, logits, rows)
    logprob, logsumexp, entropies, ref_logprob, kl, _ = row_stats(
        flat, ids.reshape(rows), taus, flat_ref, entropy, in_place
    )
    return TokenStats(
        logprob=logprob.view(ids.shape),
        entropy=entropies.view(ids.shape) if entropy else None,
        logsumexp=logsumexp.view(ids.shape),
        ref_logprob=None if flat_ref is None else ref_logprob.view(ids.shape),
        kl=None if flat_ref is None else kl.view(ids.shape),
    )
