"""Whether a policy's loss is a sum over tokens, so that it may be computed a few at a time."""

import copy

import torch
from torch import Tensor

from mossrlhf.loss.ppo_max import PPOMaxLoss
from mossrlhf.signature import call_with

SCALES = (0.1, 1.0, 4.0, 30.0)
"""Of made-up log-ratios and advantages: in a clip, beyond it, far beyond any threshold."""


def coupling(loss: PPOMaxLoss) -> str | None:
    """Say what makes a policy's loss more than a sum over tokens; None where it is one.

    A copy of `policy_loss` is asked about six made-up tokens at once and one by one, for losses
    and gradients, at several scales. What no such question shows a subclass says itself, by
    ``couples_tokens = True``.

    Args:
        loss: a `PPOMaxLoss` or a subclass of it.

    Returns:
        a clause, for people to read; or None.

    Source: ours.
    """
    if loss.couples_tokens:
        return f"{type(loss).__name__}.couples_tokens is set"
    for name in ("policy", "tokens"):
        if getattr(type(loss), name) is not getattr(PPOMaxLoss, name):
            return f"{type(loss).__name__} overrides {name}"
    if type(loss).policy_loss is PPOMaxLoss.policy_loss:
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            return next((why for scale in SCALES if (why := _asked(loss, scale))), None)
    except Exception as error:  # it is the user's code: whatever it may raise on made-up tokens
        return f"policy_loss raises {type(error).__name__} on a few made-up tokens"


def _asked(loss: PPOMaxLoss, scale: float) -> str | None:
    numbers = torch.linspace(-1.0, 1.0, 6)
    old_logprob = -torch.linspace(3.0, 0.5, 6) - scale
    logprob = (old_logprob + scale * numbers.roll(1)).clamp(max=-0.01)
    entropy = numbers.roll(2) + 1.5
    tokens = torch.stack([logprob, old_logprob, scale * numbers.roll(4), entropy])
    whole = _answer(loss, tokens)
    alone = [_answer(loss, token) for token in tokens.split(1, dim=1)]
    apart = [torch.cat(parts, -1) for parts in zip(*alone, strict=True)]
    pairs = zip(whole, apart, strict=True)
    if all(torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True) for a, b in pairs):
        return None
    return "policy_loss gives a token another loss in other company"


def _answer(loss: PPOMaxLoss, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of some tokens, and the gradient of their weighted sum."""
    asked = copy.deepcopy(loss)  # what it remembers is not to be of made-up tokens
    given = tokens.clone().requires_grad_()
    logprob, old_logprob, advantage, entropy = given
    more = {} if loss.entropy_coef is None else {"entropy": entropy}
    answer: Tensor = call_with(
        asked.policy_loss, logprob, old_logprob.detach(), advantage.detach(), **more
    )
    found = torch.zeros_like(tokens)
    if answer.requires_grad:
        (found,) = torch.autograd.grad(answer.sum(), given)
    return answer.detach(), found
