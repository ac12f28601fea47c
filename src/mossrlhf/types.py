"""The shape legend, and the containers that travel between the stages.

Shape legend, used in every annotation of this package:

====  =======================================================================
B     sequences in a batch
L     prompt + response length, padding included
T     response length, padding included
V     vocabulary
D     hidden size
N     tokens, flattened: the response tokens that count, over a whole batch
====  =======================================================================

Alignment: a sequence is ``[prompt][response][pad]``, padded on the right, positions from 0.
Per-token quantities of a response are ``[B, T]``: entry t belongs to the response's token t; its
log-probability comes from the logits one position earlier, its value is the critic's for the
state *before* the token. Masks come from lengths, never from ``ids != pad``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A batch of prompts with sampled responses, and everything computed about them.

    Stages of `Trainer` return a new rollout (`dataclasses.replace`) with more of the optional
    fields; nothing is changed in place.

    Args:
        input_ids: ``[B, L]`` token ids, ``[prompt][response][pad]``.
        prompt_lengths: ``[B]`` tokens of each prompt, at least 1.
        response_lengths: ``[B]`` tokens of each response, its end-of-sequence token included.
        truncated: ``[B]`` whether the response hit the length limit instead of ending.
        mask: ``[B, T]`` response tokens that count; may have holes (tool or user turns).
        state_mask: ``[B, T]`` states the critic is trained on and GAE runs over; None for `mask`.
            Different where the state after the end counts too (`with_end_states`).
        columns: the dataset's columns, a list of B values each; they reach the reward.
        weights: ``[B, T]`` weight of each token in the loss; their sum is its denominator.
            None: 1 for every token of the mask (token mean).
        scores: ``[B]`` the reward of the whole response, before shaping.
        token_scores: ``[B, T]`` rewards per token, from rewards that return them.
        sampler_logprobs: ``[B, T]`` log-probs by the sampler, nats.
        logprobs: ``[B, T]`` under the policy that sampled the response ("old"), nats.
        ref_logprobs: ``[B, T]`` under the reference policy, nats.
        entropies: ``[B, T]`` of the policy that sampled the response, nats per token.
        values: ``[B, T]`` the critic's value of the state before each token ("old").
        bootstrap: ``[B]`` the critic's value after a truncated response, 0 after a finished one.
        rewards: ``[B, T]`` shaped scores minus the KL penalty.
        advantages: ``[B, T]``.
        returns: ``[B, T]`` the critic's targets.
        extra: further tensors whose first dimension is B, for custom losses. A second dimension
            of length T is taken for tokens, and cut and padded like those of the fields above.
    """

    input_ids: Int[Tensor, "B L"]
    prompt_lengths: Int[Tensor, " B"]
    response_lengths: Int[Tensor, " B"]
    truncated: Bool[Tensor, " B"]
    mask: Bool[Tensor, "B T"]
    state_mask: Bool[Tensor, "B T"] | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    weights: Float[Tensor, "B T"] | None = None
    scores: Float[Tensor, " B"] | None = None
    token_scores: Float[Tensor, "B T"] | None = None
    sampler_logprobs: Float[Tensor, "B T"] | None = None
    logprobs: Float[Tensor, "B T"] | None = None
    ref_logprobs: Float[Tensor, "B T"] | None = None
    entropies: Float[Tensor, "B T"] | None = None
    values: Float[Tensor, "B T"] | None = None
    bootstrap: Float[Tensor, " B"] | None = None
    rewards: Float[Tensor, "B T"] | None = None
    advantages: Float[Tensor, "B T"] | None = None
    returns: Float[Tensor, "B T"] | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def attention_mask(self) -> Bool[Tensor, "B L"]:
        """``[B, L]``: True on prompt and response, from their lengths."""
        positions = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return positions < (self.prompt_lengths + self.response_lengths)[:, None]

    @property
    def state_index(self) -> Int[Tensor, "B T"]:
        """``[B, T]``: the position in L of the state before each response token."""
        offsets = torch.arange(self.mask.shape[1], device=self.input_ids.device)
        return (self.prompt_lengths[:, None] - 1 + offsets).clamp(max=self.input_ids.shape[1] - 1)

    @property
    def response_ids(self) -> Int[Tensor, "B T"]:
        """``[B, T]``: the tokens of each response; entries past its length are padding."""
        limit = self.input_ids.shape[1] - 1
        return self.input_ids.gather(1, (self.state_index + 1).clamp(max=limit))

    @property
    def states(self) -> Bool[Tensor, "B T"]:
        """``[B, T]``: `state_mask`, or `mask` where there is none."""
        return self.mask if self.state_mask is None else self.state_mask

    @property
    def token_weights(self) -> Float[Tensor, "B T"]:
        """``[B, T]``: `weights`, or 1 for every token of the mask; zero outside the mask."""
        if self.weights is None:
            return self.mask.to(torch.float32)
        return torch.where(self.mask, self.weights, 0.0)

    @property
    def state_weights(self) -> Float[Tensor, "B T"]:
        """``[B, T]``: `token_weights`, or 1 for every state of the state mask."""
        if self.state_mask is None:
            return self.token_weights
        return self.state_mask.to(torch.float32)

    def completions(self) -> list[list[int]]:
        """Return the token ids of each response, padding removed."""
        rows = zip(self.response_ids.tolist(), self.response_lengths.tolist(), strict=True)
        return [ids[:length] for ids, length in rows]

    def prompts(self) -> list[list[int]]:
        """Return the token ids of each prompt."""
        rows = zip(self.input_ids.tolist(), self.prompt_lengths.tolist(), strict=True)
        return [ids[:length] for ids, length in rows]

    def select(self, index: Int[Tensor, " K"]) -> "Rollout":
        """Return the sequences at `index` ``[K]``, in that order, without spare padding."""
        chosen = index.to(self.input_ids.device)
        width = int((self.prompt_lengths + self.response_lengths)[chosen].max())
        length = max(1, int(self.response_lengths[chosen].max()))
        if self.state_mask is not None:
            length += 1
        picked: dict[str, Any] = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, Tensor):
                value = value[chosen]
                if value.ndim == 2:
                    value = value[:, : width if spec.name == "input_ids" else length]
            picked[spec.name] = value
        rows = chosen.tolist()
        picked["columns"] = {
            name: [column[i] for i in rows] for name, column in self.columns.items()
        }
        picked["extra"] = {
            name: value[chosen, :length] if self._per_token(value) else value[chosen]
            for name, value in self.extra.items()
        }
        return Rollout(**picked)

    def with_end_states(self, limit: int) -> "Rollout":
        """Count the state after the last token as well, where a response ended before `limit`.

        Args:
            limit: longest response possible, in tokens.

        Returns:
            the rollout with a state mask, and T one longer.

        Source: TRL 1.12, which adds the score one step after the end of the response.
        """
        positions = torch.arange(self.mask.shape[1] + 1, device=self.mask.device)
        after = (self.response_lengths < limit)[:, None] & (
            positions == self.response_lengths[:, None]
        )
        widened: dict[str, Any] = {
            spec.name: _pad(value, 1)
            for spec in fields(self)
            if isinstance(value := getattr(self, spec.name), Tensor)
            and value.ndim == 2
            and spec.name not in ("input_ids", "state_mask")
        }
        extra = {
            name: _pad(value, 1) if self._per_token(value) else value
            for name, value in self.extra.items()
        }
        return replace(self, **widened, state_mask=widened["mask"] | after, extra=extra)

    def _per_token(self, value: Tensor) -> bool:
        return value.ndim > 1 and value.shape[1] == self.mask.shape[1]

    def to(self, device: torch.device | str) -> "Rollout":
        """Return the rollout with every tensor on `device`."""
        moved: dict[str, Any] = {
            spec.name: value.to(device)
            for spec in fields(self)
            if isinstance(value := getattr(self, spec.name), Tensor)
        }
        return replace(self, **moved, extra={k: v.to(device) for k, v in self.extra.items()})

    @classmethod
    def concat(cls, rollouts: "Sequence[Rollout]") -> "Rollout":
        """Join rollouts into one, padded on the right to the largest L and T among them.

        Raises:
            ValueError: if nothing is given, or a field is None in some rollouts only.
        """
        if not rollouts:
            raise ValueError("rollouts: got none, expected at least one to concatenate")
        if len(rollouts) == 1:
            return rollouts[0]
        joined: dict[str, Any] = {}
        for spec in fields(cls):
            if spec.name not in ("columns", "extra"):
                joined[spec.name] = _join(spec.name, [getattr(r, spec.name) for r in rollouts])
        for name in ("columns", "extra"):
            keys = {frozenset(getattr(r, name)) for r in rollouts}
            if len(keys) > 1:
                raise ValueError(f"rollouts: {name} differ ({sorted(map(sorted, keys))})")
        first = rollouts[0]
        joined["columns"] = {
            key: [value for r in rollouts for value in r.columns[key]] for key in first.columns
        }
        joined["extra"] = {key: _join(key, [r.extra[key] for r in rollouts]) for key in first.extra}
        return cls(**joined)


def _join(name: str, parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if len(present) < len(parts):
        raise ValueError(
            f"rollouts: {name} is filled in {len(present)} of {len(parts)} rollouts; "
            "bring all of them through the same stages before joining them"
        )
    if present[0].ndim == 1:
        return torch.cat(present)
    width = max(part.shape[1] for part in present)
    return torch.cat([_pad(part, width - part.shape[1]) for part in present])


def _pad(value: Tensor, more: int) -> Tensor:
    """Append zeros along the second dimension."""
    return torch.nn.functional.pad(value, (0, 0) * (value.ndim - 2) + (0, more))


@dataclass(frozen=True)
class Advantages:
    """What an advantage estimator returns.

    Args:
        advantages: ``[B, T]``, zero outside the mask.
        returns: ``[B, T]`` the critic's targets, zero outside the mask.
    """

    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]


@dataclass(frozen=True)
class TokenStats:
    """Log-probs and other statistics of tokens over the vocabulary.

    Args:
        logprob: log-probability of each token, nats, at least float32.
        entropy: entropy of each token's distribution, nats; None if not requested.
        logsumexp: log Σ_v exp(z_v/τ), nats; None if not computed.
        ref_logprob: log-probability under the reference, nats; None without one.
        kl: exact KL divergence from the reference, nats; None without one.
    """

    logprob: Float[Tensor, "..."]
    entropy: Float[Tensor, "..."] | None = None
    logsumexp: Float[Tensor, "..."] | None = None
    ref_logprob: Float[Tensor, "..."] | None = None
    kl: Float[Tensor, "..."] | None = None


@dataclass(frozen=True)
class LossOutput:
    """A loss and its statistics.

    Both are *shares*: sums over some tokens divided by the denominator of the whole optimizer
    step, so that micro-batches and processes add up to the token mean exactly.

    Args:
        loss: scalar, to be differentiated.
        stats: detached scalars by metric name; added up like the loss.
    """

    loss: Float[Tensor, ""]
    stats: dict[str, Tensor] = field(default_factory=dict)
