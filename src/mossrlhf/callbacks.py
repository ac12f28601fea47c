"""Watches on a run: a policy that has collapsed, and a policy that does not move."""

import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mossrlhf.distributed.sharding import local

LATELY = 10
"""Iterations that `CollapseWatch.lately` looks back."""


class CollapseWarning(UserWarning):
    """The policy has collapsed into repeating what the reward likes."""


class StillPolicyWarning(UserWarning):
    """Optimizer steps leave the policy's parameters unchanged."""


class CollapseWatch:
    """Warn when responses are monotonous and far from the reference, at any length.

    Collapsed: KL per sequence above a bound *and* distinct-2 below half of the reference's.
    Score and loss do not show it, and length shows only one of its forms.

    Args:
        kl_bound: nats per sequence.
        reference_distinct_2: of as many responses of the reference; None switches the watch off.

    Source: P1 §5.2 (pattern collapse: KL explodes, diversity goes); the rule is ours.
    """

    def __init__(self, kl_bound: float, reference_distinct_2: float | None) -> None:
        self.kl_bound = kl_bound
        self.reference_distinct_2 = reference_distinct_2
        self.flags: deque[bool] = deque(maxlen=LATELY)

    def state_dict(self) -> dict[str, Any]:
        """Return the flags of the last iterations, for JSON."""
        return {"flags": list(self.flags)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state.

        Args:
            state: what `state_dict` returned.
        """
        self.flags = deque(state["flags"], maxlen=LATELY)

    @property
    def lately(self) -> bool:
        """Whether the policy was collapsed in one of the last ten iterations."""
        return any(self.flags)

    def __call__(self, metrics: Mapping[str, float]) -> bool:
        """Check the metrics of one iteration; warn unless the policy was collapsed `lately`.

        Args:
            metrics: with ``kl/ref_per_sequence`` and ``response/distinct_2``.

        Returns:
            whether the policy has collapsed.
        """
        kl = metrics.get("kl/ref_per_sequence")
        distinct = metrics.get("response/distinct_2")
        if kl is None or distinct is None or self.reference_distinct_2 is None:
            return False
        collapsed = kl > self.kl_bound and distinct < 0.5 * self.reference_distinct_2
        if collapsed and not self.lately:
            warnings.warn(
                f"the policy has collapsed: KL to the reference {kl:.1f} nats per sequence "
                f"(bound {self.kl_bound:g}) and distinct-2 {distinct:.3f}, under half of the "
                f"reference's {self.reference_distinct_2:.3f}. A rising score means nothing now; "
                "raise RewardShaper(kl_coef=), clip the reward, or lower the learning rate",
                CollapseWarning,
                stacklevel=3,
            )
        self.flags.append(collapsed)
        return collapsed


class StillWatch:
    """Warn when the policy's parameters do not change, iteration after iteration.

    In pure bfloat16 a learning rate of 5e-7 is rounded away: AdamW changes hardly any weight and
    nothing fails. A sample of the parameters is compared before and after each iteration.

    Args:
        parameters: of the policy; only the trained ones are compared.
        patience: iterations in a row before the warning.
        least: share of the sampled weights that must change.
        sample: weights compared in each parameter.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        patience: int = 3,
        least: float = 0.05,
        sample: int = 256,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.patience, self.least, self.sample = patience, least, sample
        self.still = 0
        self._before = self._sampled()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of iterations without a change, for JSON."""
        return {"still": self.still}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state, after the parameters have been restored.

        Args:
            state: what `state_dict` returned.
        """
        self.still = int(state["still"])
        self._before = self._sampled()

    def _sampled(self) -> Tensor:
        # A parameter may have no element in this process's shard.
        held = [local(p.detach()) for p in self.parameters]
        parts = [p.flatten()[: self.sample].float() for p in held if p.numel()]
        return torch.cat(parts) if parts else torch.zeros(0)

    def __call__(self, learning_rate: float) -> float:
        """Compare with the last call; warn once when the patience runs out.

        Args:
            learning_rate: of the policy; at 0 no change is expected.

        Returns:
            share of the sampled weights that changed.
        """
        now = self._sampled()
        changed = float((now != self._before).float().mean()) if now.numel() else 1.0
        self._before = now
        self.still = self.still + 1 if changed < self.least and learning_rate > 0 else 0
        if self.still == self.patience:
            warnings.warn(
                f"the policy is not moving: {changed:.1%} of its weights changed in the last "
                f"iteration, {self.patience} iterations in a row under {self.least:.0%}, at a "
                f"learning rate of {learning_rate:g}. Train float32 parameters (with bf16=True for "
                "the arithmetic), check requires_grad, or raise learning_rate",
                StillPolicyWarning,
                stacklevel=3,
            )
        return changed
