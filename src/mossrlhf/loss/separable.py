"""Whether a policy's loss is a sum over tokens, so that it may be computed a few at a time."""

import torch
from torch import Tensor

from mossrlhf.loss.ppo_max import PPOMaxLoss
from mossrlhf.signature import call_with


def coupling(loss: PPOMaxLoss) -> str | None:
    """Say what makes a policy's loss more than a sum over tokens; None where it is one.

    `policy_loss` is asked about six made-up tokens at once and one by one.

    Args:
        loss: a `PPOMaxLoss` or a subclass of it.

    Returns:
        a clause, for people to read; or None.

    Source: ours.
    """
    for name in ("policy", "tokens"):
        if getattr(type(loss), name) is not getattr(PPOMaxLoss, name):
            return f"{type(loss).__name__} overrides {name}"
    numbers = torch.linspace(-1.5, 1.5, 6, dtype=torch.float64)
    tokens = torch.stack([numbers.roll(shift) - shift * 0.1 for shift in range(4)])
    try:
        whole = _asked(loss, tokens)
        alone = torch.cat([_asked(loss, token) for token in tokens.split(1, dim=1)])
        same = torch.allclose(whole, alone, rtol=1e-9, atol=1e-9, equal_nan=True)
    except Exception as error:  # it is the user's code: whatever it may raise on made-up tokens
        return f"policy_loss raises {type(error).__name__} on a few tokens alone"
    return None if same else "policy_loss gives a token another loss in other company"


def _asked(loss: PPOMaxLoss, tokens: Tensor) -> Tensor:
    logprob, old_logprob, advantage, entropy = tokens
    given = None if loss.entropy_coef is None else entropy
    answer: Tensor = call_with(loss.policy_loss, logprob, old_logprob, advantage, entropy=given)
    return answer
