"""Policy and critic as one module, and its outputs: log-probabilities, values, losses."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mossrlhf.models.lora import unwrap_peft
from mossrlhf.models.reward_model import RewardModel
from mossrlhf.models.token_logprobs import language_model_loss, policy_loss, policy_stats
from mossrlhf.types import Rollout, TokenStats

Values = tuple[Float[Tensor, "B T"], Float[Tensor, " B"]]


class ActorCritic(nn.Module):
    """Hold policy and critic as one module, so that one wrapper (DDP, FSDP2) covers both.

    All training and scoring go through `forward`, where such wrappers have their hooks. Roles run
    in turn: forward and backward of one before the next.

    Args:
        policy: a causal language model, adapters included.
        critic: a model with ``token_values``; None where there is no critic.
        temperature: τ that responses are sampled at, and so scored at.
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
        """Run one role on a micro-batch and pass its output to that role's loss.

        Args:
            role: "policy", "critic", "ptx" or "values".
            batch: a `Rollout`; for "ptx" a mapping of input_ids, attention_mask, labels.
            loss_fn: takes the role's output: `TokenStats` ``[N]``, values ``[N]``, the summed
                language-model loss and its token count, or what `values` returns.
            entropy: whether the policy's loss needs entropies.
            fused: whether to compute the output head's gradient along with the loss, which must
                then be a sum over tokens: the policy's `loss_fn` gets a few tokens at a time, and
                their slice of the N.

        Returns:
            what `loss_fn` returns: a dataclass, in which DDP finds the tensors.

        Raises:
            ValueError: where the role is unknown, or there is no critic.
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
        # Accelerate looks here for the blocks that FSDP2 shards one by one.
        backbone = None if self.critic is None else self.critic.backbone
        models = unwrap_peft(self.policy), backbone
        return sorted(
            {name for m in models for name in getattr(m, "_no_split_modules", None) or ()}
        )

    def trained_parameters(self, role: str) -> list[nn.Parameter]:
        """Return the parameters of a role's optimizer; each belongs to one role.

        Args:
            role: "policy" or "critic".
        """
        found = {} if self.critic is None else self.critic.own_parameters()
        if role == "policy":
            others = {id(parameter) for parameter in found.values()}
            found = {n: p for n, p in self.policy.named_parameters() if id(p) not in others}
        return [parameter for parameter in found.values() if parameter.requires_grad]

    def score(
        self, batch: Rollout, entropy: bool = False, policy: nn.Module | None = None
    ) -> TokenStats:
        """Return `policy_stats` of the policy, or of another model, at the policy's temperature.

        Args:
            batch: B sequences with N tokens in their mask.
            entropy: whether to compute the entropy too.
            policy: the reference model; None for the policy.
        """
        if policy is None or policy is self.policy:
            return self("policy", batch, lambda stats: stats, entropy=entropy)
        return policy_stats(policy, batch, self.temperature, entropy)

    def values(self, batch: Rollout) -> Values:
        """Return the value of the state before each token, and of the state after the last.

        Args:
            batch: B sequences.

        Returns:
            ``[B, T]`` values, meaningless after the response, and ``[B]`` the value after it.

        Raises:
            ValueError: where there is no critic.

        Source: P1 §3.2: V(s_t), with s_t everything before token t.
        """
        return self("values", batch, lambda values: values)

    def _values(self, batch: Rollout) -> Values:
        if self.critic is None:
            raise ValueError("critic: there is none (critic=False), so there are no values")
        values = self.critic.token_values(batch.input_ids, batch.attention_mask, True)
        last = batch.prompt_lengths + batch.response_lengths - 1
        return values.gather(1, batch.state_index), values.gather(1, last[:, None]).squeeze(1)
