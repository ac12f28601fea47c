"""Policy and critic as one module, and what is asked of them: log-probabilities, values, losses."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from mossrlhf.functional.logprobs import token_stats
from mossrlhf.functional.losses import lm_loss
from mossrlhf.models.reward_model import RewardModel
from mossrlhf.signature import accepts
from mossrlhf.types import LossOutput, Rollout, TokenStats

IGNORED_LABEL = -100
"""The label of tokens that a language-model loss skips."""


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that a wrapper of either is a wrapper of both.

    `forward` is the one door to the trained models while training: the hooks of
    ``DistributedDataParallel`` and its like hang there. Roles go through it in turn, forward
    and backward of one before the next.

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
        self, role: str, batch: Any, loss_fn: Callable[..., LossOutput], **kwargs: Any
    ) -> LossOutput:
        """Run one role on a micro-batch and hand what it says to that role's loss.

        Args:
            role: "policy", "critic" or "ptx".
            batch: a `Rollout`; for "ptx" a mapping of input_ids, attention_mask, labels.
            loss_fn: takes the role's output: `TokenStats` ``[N]``, values ``[N]``, or the summed
                language-model loss and its token count.
            kwargs: for the role (``entropy=True``).

        Returns:
            what `loss_fn` returns: a dataclass, in which DDP finds the tensors.

        Raises:
            ValueError: where the role is unknown.
        """
        match role:
            case "policy":
                return loss_fn(policy_stats(self.policy, batch, self.temperature, **kwargs))
            case "critic":
                return loss_fn(self.values(batch)[0][batch.states], **kwargs)
            case "ptx":
                return loss_fn(*language_model_loss(self.policy, batch), **kwargs)
        raise ValueError(f"role: got {role!r}, expected 'policy', 'critic' or 'ptx'")

    def values(self, batch: Rollout) -> tuple[Float[Tensor, "B T"], Float[Tensor, " B"]]:
        """Return the values of the states before each token, and of the state after the last.

        Args:
            batch: B sequences.

        Returns:
            ``[B, T]`` values, meaningless past the response, and ``[B]`` the value after it.

        Raises:
            ValueError: where there is no critic.

        Source: P1 §3.2: V(s_t), with s_t everything before token t.
        """
        if self.critic is None:
            raise ValueError("critic: there is none (critic=False), so there are no values")
        values = self.critic.token_values(batch.input_ids, batch.attention_mask)
        last = batch.prompt_lengths + batch.response_lengths - 1
        return values.gather(1, batch.state_index), values.gather(1, last[:, None]).squeeze(1)


def policy_stats(
    policy: nn.Module, batch: Rollout, temperature: float = 1.0, entropy: bool = False
) -> TokenStats:
    """Log-probability (and entropy) of every response token that counts.

    Args:
        policy: a causal language model: trained policy or reference.
        batch: B sequences with N tokens in their mask.
        temperature: τ the tokens were drawn at.
        entropy: whether to compute the entropy too.

    Returns:
        `TokenStats` of ``[N]``, in the order of ``batch.mask``.

    Source: ours; logits of one position earlier, prompts left out of the head where the model
        knows ``logits_to_keep``.
    """
    extra: dict[str, Any] = {}
    if accepts(policy, "logits_to_keep"):
        extra["logits_to_keep"] = batch.input_ids.shape[1] - int(batch.prompt_lengths.min()) + 1
    logits = policy(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        use_cache=False,
        **extra,
    ).logits
    skipped = batch.input_ids.shape[1] - logits.shape[1]
    rows, columns = batch.mask.nonzero(as_tuple=True)
    picked = logits[rows, batch.state_index[rows, columns] - skipped]
    return token_stats(picked, batch.response_ids[rows, columns], temperature, entropy)


def language_model_loss(
    policy: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Return the summed next-token loss of labeled tokens, nats, and their number.

    Args:
        policy: a causal language model.
        batch: input_ids, attention_mask and labels, ``[B, L]`` each.

    Source: P1 eq. 17.
    """
    output = policy(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )
    return lm_loss(output.logits, batch["labels"], IGNORED_LABEL)
