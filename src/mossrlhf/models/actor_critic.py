"""Policy and critic as one module, and what is asked of them: log-probabilities, values, losses."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mossrlhf.models.reward_model import RewardModel
from mossrlhf.models.scoring import language_model_loss, policy_loss, policy_stats
from mossrlhf.options import inside
from mossrlhf.types import Rollout, TokenStats

Values = tuple[Float[Tensor, "B T"], Float[Tensor, " B"]]


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that a wrapper of either is a wrapper of both.

    `forward` is the one door to the trained models, in training and scoring: the hooks of whoever
    averages their gradients or shards their weights hang there. Roles go through it in turn,
    forward and backward of one before the next.

    Args:
        policy: a causal language model, adapters included.
        critic: gives ``token_values``; None where there is no critic.
        temperature: τ the responses are drawn at, and so scored at.

    Source: ours.
    """

    def __init__(
        self, policy: nn.Module, critic: RewardModel | None = None, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.temperature = temperature

    def forward(
        self,
        role: str,
        batch: Any,
        loss_fn: Callable[..., Any],
        *,
        entropy: bool = False,
        fused: bool = False,
    ) -> Any:
        """Run one role on a micro-batch and hand what it says to that role's loss.

        Args:
            role: "policy", "critic", "ptx" or "values".
            batch: a `Rollout`; for "ptx" a mapping of input_ids, attention_mask, labels.
            loss_fn: takes the role's output: `TokenStats` ``[N]``, values ``[N]``, the summed
                language-model loss and its token count, or what `values` returns.
            entropy: whether the policy's loss wants entropies.
            fused: whether the gradient at the output head is made along with the loss, which must
                be a sum over tokens then: the policy's `loss_fn` gets a few tokens at a time, and
                the slice of the N they are.

        Returns:
            what `loss_fn` returns: a dataclass, in which DDP finds the tensors.

        Raises:
            ValueError: where the role is unknown.
        """
        match role:
            case "policy" if fused:
                return policy_loss(self.policy, batch, loss_fn, self.temperature, entropy)
            case "policy":
                return loss_fn(policy_stats(self.policy, batch, self.temperature, entropy))
            case "critic":
                return loss_fn(self._values(batch)[0][batch.states])
            case "ptx":
                return loss_fn(*language_model_loss(self.policy, batch, fused))
            case "values":
                return loss_fn(self._values(batch))
        raise ValueError(f"role: got {role!r}, expected 'policy', 'critic', 'ptx' or 'values'")

    @property
    def _no_split_modules(self) -> list[str]:
        # Where FSDP2 looks for the blocks that it shards one by one.
        backbone = None if self.critic is None else self.critic.backbone
        models = [model for model in (inside(self.policy), backbone) if model is not None]
        return sorted(
            {name for m in models for name in getattr(m, "_no_split_modules", None) or ()}
        )

    def trained_parameters(self, role: str) -> list[nn.Parameter]:
        """Return the parameters that a role's optimizer moves; two on one base are told apart.

        Args:
            role: "policy" or "critic".

        Source: ours.
        """
        found = {} if self.critic is None else self.critic.own_parameters()
        if role == "policy":
            others = {id(parameter) for parameter in found.values()}
            found = {n: p for n, p in self.policy.named_parameters() if id(p) not in others}
        return [parameter for parameter in found.values() if parameter.requires_grad]

    def score(
        self, batch: Rollout, entropy: bool = False, policy: nn.Module | None = None
    ) -> TokenStats:
        """Return what `policy_stats` says, of the policy or of another at its temperature.

        Args:
            batch: B sequences with N tokens in their mask.
            entropy: whether to compute the entropy too.
            policy: the reference; None for the policy.

        Source: ours.
        """
        if policy is None or policy is self.policy:
            return self("policy", batch, _as_is, entropy=entropy)
        return policy_stats(policy, batch, self.temperature, entropy)

    def values(self, batch: Rollout) -> Values:
        """Return the values of the states before each token, and of the state after the last.

        Args:
            batch: B sequences.

        Returns:
            ``[B, T]`` values, meaningless past the response, and ``[B]`` the value after it.

        Raises:
            ValueError: where there is no critic.

        Source: P1 §3.2: V(s_t), with s_t everything before token t.
        """
        return self("values", batch, _as_is)

    def _values(self, batch: Rollout) -> Values:
        if self.critic is None:
            raise ValueError("critic: there is none (critic=False), so there are no values")
        values = self.critic.token_values(batch.input_ids, batch.attention_mask, True)
        last = batch.prompt_lengths + batch.response_lengths - 1
        return values.gather(1, batch.state_index), values.gather(1, last[:, None]).squeeze(1)


def _as_is(output: Any) -> Any:
    return output
