"""The trained modules: a value head, a reward model that is also the critic, and their union."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from mossrlhf.functional.logprobs import token_stats
from mossrlhf.functional.losses import lm_loss
from mossrlhf.functional.reduce import upcast
from mossrlhf.signature import accepts
from mossrlhf.types import LossOutput, Rollout, TokenStats

IGNORED_LABEL = -100
"""The label of tokens that a language-model loss skips."""


class ValueHead(nn.Linear):
    """One number per position: V = w·h (+ b), computed in float32.

    Args:
        hidden_size: D of the backbone.
        bias: whether to add b.
        zero: start from w = 0, so that an untrained critic says 0 everywhere.

    Source: P1 §3.2 (the critic); C's `reward_head` has no bias either.
    """

    def __init__(self, hidden_size: int, bias: bool = False, zero: bool = True) -> None:
        super().__init__(hidden_size, 1, bias=bias)
        if zero:
            nn.init.zeros_(self.weight)
            if bias:
                nn.init.zeros_(self.bias)

    def forward(self, hidden: Float[Tensor, "B L D"]) -> Float[Tensor, "B L"]:
        """Map hidden states to values.

        Args:
            hidden: ``[B, L, D]`` last hidden states, any floating type.

        Returns:
            ``[B, L]`` in float32 at least, autocast or not.
        """
        hidden = upcast(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(hidden)
            return nn.functional.linear(hidden, self.weight.to(hidden), bias).squeeze(-1)


class RewardModel(nn.Module):
    """A transformer backbone with a `ValueHead`: reward model and critic alike.

    Its weights carry the names of transformers' ``…ForSequenceClassification`` with one label
    (``model.*``, ``score.weight``), which is also the layout on disk: what it saves is served by
    any tool that loads such a classifier, and any such classifier loads here.

    Args:
        backbone: a bare transformer (``AutoModel``).
        head: its value head; None for a new one that says 0 everywhere.

    Source: P1 §3.1; C's `LlamaRewardModel`.
    """

    def __init__(self, backbone: PreTrainedModel, head: ValueHead | None = None) -> None:
        super().__init__()
        self._prefix = backbone.base_model_prefix
        self.config = backbone.config
        hidden_size = backbone.config.get_text_config().hidden_size
        self.add_module(self._prefix, backbone)
        self.score = head if head is not None else ValueHead(hidden_size)
        self._known = {name for name in ("position_ids", "use_cache") if accepts(backbone, name)}

    @property
    def backbone(self) -> PreTrainedModel:
        """The bare transformer."""
        return self.get_submodule(self._prefix)

    @property
    def device(self) -> torch.device:
        """Where the head lives."""
        return self.score.weight.device

    def token_values(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Shaped[Tensor, "B L"]
    ) -> Float[Tensor, "B L"]:
        """Return the head's value at every position; positions count attended tokens only.

        Args:
            input_ids: ``[B, L]``.
            attention_mask: ``[B, L]`` 1 on tokens, 0 on padding, on either side.

        Returns:
            ``[B, L]`` float32, in units of reward; meaningless on padding.
        """
        mask = attention_mask.long()
        extra = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": False}
        known = {name: value for name, value in extra.items() if name in self._known}
        output = self.backbone(input_ids, attention_mask=mask, **known)
        return self.score(output.last_hidden_state)

    def forward(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Shaped[Tensor, "B L"]
    ) -> Float[Tensor, " B"]:
        """Score each sequence: the value at its last attended token, either padding side.

        Args:
            input_ids: ``[B, L]``.
            attention_mask: ``[B, L]`` 1 on tokens, 0 on padding.

        Returns:
            ``[B]`` scores, float32.

        Source: P1 §3.1; C: the head at the last token.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (attention_mask.long() * positions).argmax(dim=1)
        values = self.token_values(input_ids, attention_mask)
        return values.gather(1, last[:, None]).squeeze(1)

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> "RewardModel":
        """Load a one-label sequence classifier whose head is called ``score``.

        Args:
            path: folder or hub name.
            kwargs: passed to ``AutoModelForSequenceClassification.from_pretrained``.

        Raises:
            ValueError: where the checkpoint has no ``score`` head, more than one label, or
                lacks weights.
        """
        kwargs = {"num_labels": 1, "dtype": torch.float32, **kwargs}
        model, info = AutoModelForSequenceClassification.from_pretrained(
            str(path), output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        head = getattr(model, "score", None)
        lost = sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]
        if head is None or lost:
            raise ValueError(
                f"path: {str(path)!r} holds no one-label classifier with a head called 'score' "
                f"(missing or of another shape: {lost[:3]}); to start a reward model from a "
                "language model, use RewardModel.from_language_model(path)"
            )
        bias = head.bias is not None
        reward_model = cls(model.base_model, ValueHead(head.in_features, bias=bias))
        reward_model.score.load_state_dict(head.state_dict())
        return reward_model.to(head.weight.dtype)

    @classmethod
    def from_language_model(
        cls, model: PreTrainedModel | str | Path, **kwargs: Any
    ) -> "RewardModel":
        """Put a zero head on (a copy of) a causal language model's backbone.

        Args:
            model: the language model, which is copied, or a folder or hub name.
            kwargs: passed to ``AutoModelForCausalLM.from_pretrained``.

        Source: P1 §4.2: the reward model starts from the SFT model, its head replaced.
        """
        if isinstance(model, (str, Path)):
            kwargs = {"dtype": torch.float32, **kwargs}
            return cls(AutoModelForCausalLM.from_pretrained(str(model), **kwargs).base_model)
        return cls(copy.deepcopy(model.base_model))

    def save_pretrained(self, path: str | Path, **kwargs: Any) -> None:
        """Write config and weights in the layout of transformers' sequence classifiers.

        Args:
            path: folder, made where absent.
            kwargs: passed to ``PreTrainedModel.save_pretrained`` (``max_shard_size`` …).

        Raises:
            ValueError: where transformers has no sequence classifier for this family, or none
                with a head like this one.
        """
        self._shell().save_pretrained(
            str(path), state_dict=kwargs.pop("state_dict", self.state_dict()), **kwargs
        )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Upload what `save_pretrained` writes to the hub.

        Args:
            repo_id: ``owner/name``.
            kwargs: passed to ``PreTrainedModel.push_to_hub``.
        """
        shell = self._shell().to_empty(device="cpu")
        shell.load_state_dict(self.state_dict())
        shell.push_to_hub(repo_id, **kwargs)

    def _shell(self) -> PreTrainedModel:
        config: PreTrainedConfig = copy.deepcopy(self.config)
        config.num_labels = 1
        family = type(config)
        if family not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise ValueError(
                f"transformers has no sequence classifier for {family.__name__}, so there is no "
                "layout to save this reward model in; save its state_dict() yourself"
            )
        architecture = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[family]
        config.architectures = [architecture.__name__]
        with torch.device("meta"):
            shell = architecture(config).to(self.backbone.dtype)
        different = sorted(self.state_dict().keys() ^ shell.state_dict().keys())
        if different:
            raise ValueError(
                f"transformers' {architecture.__name__} and this reward model differ in "
                f"{different[:3]}, so saving would lose weights; save its state_dict() yourself"
            )
        return shell


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
