"""What the tests of kernels hold rows of logits to: `functional.token_stats`, in float64."""

import torch
from torch import Tensor

from mossrlhf import functional, kernels
from mossrlhf.types import TokenStats

BLOCK = 64
"""Logits in a block of triton's under the fixture `backend`, so that few words make several."""

V = 2 * BLOCK + 5
"""Words, where nothing else is said."""

GRADED = ("logprob", "logsumexp", "entropy", "kl")
"""The statistics that have a gradient."""


def drawn(device, *shape, width=V, dtype=torch.float32, scale=2.0):
    """Logits, ids (the first of them 0, the last V − 1) and a reference's logits."""
    logits, ref = (scale * torch.randn(2, *shape, width, device=device)).to(dtype)
    ids = torch.randint(width, shape, device=device)
    if ids.numel() > 1:
        ids.view(-1)[0], ids.view(-1)[-1] = 0, width - 1
    return logits, ids, ref


def score(ids, temperature=1.0, ref=None, **options):
    return lambda z: kernels.token_stats(z, ids, temperature, ref_logits=ref, **options)


def oracle(
    logits: Tensor, ids: Tensor, temperature: float | Tensor = 1.0, ref: Tensor | None = None
) -> TokenStats:
    """The statistics in float64, at one temperature (as float32 has it) or one for each token."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    taus = torch.as_tensor(temperature, dtype=dtype, device=logits.device).double()
    scaled = logits.double() / taus[..., None]
    return functional.token_stats(
        scaled, ids, ref_logits=None if ref is None else ref.double() / taus[..., None]
    )


def off(got: Tensor, expected: Tensor, floor: float = 1e-6) -> float:
    """Distance over length, L2; lengths below `floor` count as that."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp(min=floor)).item()


def upstream(stats: TokenStats, names: tuple[str, ...] = GRADED) -> Tensor:
    """A sum with a signed random weight for each number, the same on every call."""
    generator, total = torch.Generator().manual_seed(1), 0.0
    for name in GRADED:
        value = getattr(stats, name)
        weight = torch.randn(stats.logprob.shape, generator=generator, dtype=torch.float64)
        if name in names and value is not None:
            total = total + (weight.to(value) * value).sum()
    return total


def gradient(logits: Tensor, score, names: tuple[str, ...] = GRADED) -> tuple[TokenStats, Tensor]:
    """The statistics that `score` finds for logits, and the gradient of some, mixed."""
    leaf = logits.detach().requires_grad_()
    stats = score(leaf)
    (found,) = torch.autograd.grad(upstream(stats, names), leaf)
    return stats, found


def check(
    logits: Tensor,
    ids: Tensor,
    temperature: float | Tensor = 1.0,
    ref: Tensor | None = None,
    *,
    names: tuple[str, ...] = GRADED,
    within: float = 1e-6,
    slope_within: float = 1e-6,
) -> None:
    """Hold `kernels.token_stats` to the oracle: every number, and the gradient of some."""
    stats, slope = gradient(
        logits, lambda z: kernels.token_stats(z, ids, temperature, ref_logits=ref), names
    )
    expected, true_slope = gradient(logits, lambda z: oracle(z, ids, temperature, ref), names)
    for name in GRADED[:3] if ref is None else (*GRADED, "ref_logprob"):
        assert off(getattr(stats, name), getattr(expected, name), 1.0) <= within, name
    assert slope.dtype == logits.dtype
    assert off(slope, true_slope, 1e-2) <= slope_within
