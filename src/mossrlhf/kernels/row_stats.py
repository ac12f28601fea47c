"""Statistics of rows of logits, differentiable: one read forward; one read, one write backward.

With x = z/τ, m = max x and d = Σ exp(x − m):

    log p(a) = (x_a − m) − log d        H = log d − Σ exp(x − m)(x − m) / d

The gradient of whatever is computed from these numbers is, for each row,

    dz_v = (g 1[v = a] + p_v (α + β (x_v − m) + γ (r_v − m_r))) / τ

with r the reference's logits over τ, so a backend needs only g, α, β and γ. The torch backend is
at the end of this file, the triton backend in `triton_rows`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mossrlhf.types import TokenStats

BACKENDS = ("triton", "torch")

_forced: list[str] = []
"""Set by `use_backend` for all threads: autograd on CUDA runs in a separate thread."""


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
    def functions(self) -> tuple[Callable[..., Any], Callable[..., None]]:
        """What computes `row_stats` and `row_gradient`."""
        if self.name == "torch":
            return torch_stats, torch_gradient
        from mossrlhf.kernels import triton_rows

        return triton_rows.stats, triton_rows.gradient


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
    """Return the backend of a device: triton on CUDA if it is installed, else torch in blocks.

    Args:
        device: device of the logits.
        dtype: dtype of the logits.
    """
    if _forced:
        return Backend(_forced[-1], "by use_backend()")
    return _chosen(torch.device(device).type, dtype)


def stats_of(
    logits: Tensor, ids: Tensor, tau: Tensor, ref_logits: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `row_stats` by the backend of these logits."""
    stats, _ = backend(logits.device, logits.dtype).functions
    found: tuple[Tensor, ...] = stats(logits, ids, tau, ref_logits, entropy)
    return found  # type: ignore[return-value]


def write_gradient(out: Tensor, logits: Tensor, *args: Any) -> None:
    """Compute `row_gradient` by the backend of these logits."""
    _, gradient = backend(logits.device, logits.dtype).functions
    gradient(out, logits, *args)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend within the block, whatever the device; for tests and measurements.

    Args:
        name: one of `BACKENDS`. "triton" on CPU tensors needs ``TRITON_INTERPRET=1`` in the
            environment before triton is imported.

    Raises:
        ValueError: if there is no such backend.
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
        or ``[0]`` if left out; last ``[4, N]``: max z and d of policy and reference.

    Source: the online softmax, arXiv 1805.02867.
    """
    return stats_of(logits, ids, temperature, ref_logits, entropy)


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

    Rows that are ignored, or whose coefficients are all zero, become zeros even if they are NaN.

    `norms` ``[4, N]`` are of `row_stats`; `coefs` ``[4, N]`` are g, α, β, γ of the formula above;
    `softcap` is c if the logits are c·tanh(y/c) and the gradient is for y, else None.
    """
    write_gradient(out, logits, ids, temperature, ref_logits, norms, coefs, softcap)


def coefficients(
    norms: Float[Tensor, "4 N"],
    g_logprob: Float[Tensor, " N"],
    *,
    entropy: tuple[Float[Tensor, " N"], Float[Tensor, " N"]] | None = None,
    kl: tuple[Float[Tensor, " N"], Float[Tensor, " N"]] | None = None,
    g_logsumexp: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "4 N"]:
    """Combine the gradients of all statistics into g, α, β, γ of the formula above.

    `entropy` and `kl` are pairs of value and gradient; None if the loss does not use them.

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
    """g·x, and 0 for g = 0, even for an infinite x."""
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
    """Return ``[N]`` temperatures in the dtype of the statistics, on the logits' device.

    On a GPU they are not checked to be positive, since that would synchronize.
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
    triton kernel for each direction, elsewhere by torch, a few rows at a time. Computed in float32
    (float64 logits in float64). Differentiable in the logits; the reference is a constant.

    Args:
        logits: ``[..., V]`` any floating dtype; copied once if rows are not evenly spaced, as in
            ``logits[:, :-1]`` of several sequences.
        ids: ``[...]`` token ids; `IGNORED_ID` (any negative id) ignores a row.
        temperature: τ the tokens were sampled at, one for all or ``[...]``.
        entropy: False leaves the entropy out.
        ref_logits: ``[..., V]`` of the reference, for its log-probability and the exact KL
            divergence from it; at the same τ.
        in_place: whether the gradient overwrites the logits, which saves their memory once more;
            a second backward pass then raises.

    Returns:
        `TokenStats` of ``[...]``, nats.

    Raises:
        ValueError: if shapes do not match, a temperature is not positive, or the reference
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


# ------------------------------------------------------------------------------- the torch backend

BLOCK_BYTES = 2**20
"""Bytes of one block of rows in float32; scratch memory is two or three blocks."""

LOWEST = -1e4
"""Replaces x − m = −∞ in the product with exp(x − m) = 0, which would be NaN."""


def torch_stats(
    logits: Tensor, ids: Tensor, temperature: Tensor, ref_logits: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `row_stats`, block by block."""
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


def torch_gradient(
    out: Tensor,
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    norms: Tensor,
    coefs: Tensor,
    softcap: float | None,
) -> None:
    """Compute `row_gradient`, block by block."""
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
        # Into `out` directly, unless that would round an intermediate result.
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


def _for_each_block(
    work: Callable[[slice, Tensor, Tensor, Tensor], None], logits: Tensor, like: Tensor, count: int
) -> None:
    """Call `work` for each block with three scratch tensors; with two the last is passed twice."""
    total, width = logits.shape
    size = max(1, BLOCK_BYTES // (4 * max(1, width)))
    scratch = [like.new_empty(min(size, total), width) for _ in range(count)]
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        x, e, *rest = (block[: rows.stop - start] for block in scratch)
        work(rows, x, e, rest[0] if rest else e)


def _may_differ_from_one(temperature: Tensor) -> bool:
    """Whether to divide by the temperatures; always on a GPU, since a check would synchronize."""
    return temperature.device.type != "cpu" or bool((temperature != 1).any())


def _shifted(
    out: Tensor, logits: Tensor, temperature: Tensor, divide: bool, highest: Tensor | None = None
) -> Tensor:
    """Write x − max x into `out`, with x = z/τ, and return max z of each row."""
    # The difference is taken before it is divided: logits far from zero keep their digits.
    if highest is None:
        highest = logits.amax(-1).to(out)
    torch.sub(logits, highest[:, None], out=out)
    if divide:
        out.div_(temperature[:, None])
    return highest


def _expected(e: Tensor, x: Tensor) -> Tensor:
    """Σ e·x over each row, with 0 for e = 0 times x = −∞; x is overwritten."""
    total = x.mul_(e).sum(-1)
    if total.device.type != "cpu" or bool(total.isnan().any()):
        total = x.masked_fill_(e == 0, 0.0).sum(-1)
    return total
