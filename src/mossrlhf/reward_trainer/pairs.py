"""Pairs in training: a batch of them, the model that scores it, the loss of the scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mossrlhf import kernels
from mossrlhf.functional.losses import ranking_loss
from mossrlhf.models import IGNORED_LABEL, RewardModel, logit_scaling
from mossrlhf.strict import check_range, strict
from mossrlhf.types import LossOutput


@dataclass(frozen=True)
class PairRows:
    """Lays out what a pair collator makes one row per pair: who splits a batch splits it by pairs.

    Args:
        collator: from P records to ``input_ids`` and ``attention_mask`` ``[2P, L]``, all chosen,
            then all rejected, and ``chosen_labels`` ``[P, L]``, as `PairCollator` does.
        margin_column: the records' number m, in units of score; None for 0.

    Source: ours.
    """

    collator: Callable[..., Mapping[str, Tensor]]
    margin_column: str | None = None

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return ids and mask ``[P, 2, L]``, ``chosen_labels`` ``[P, L]``, ``margin`` ``[P]``.

        Raises:
            ValueError: where a record has no margin, and it should.
        """
        batch = self.collator(records)
        rows = {
            name: rearrange(batch[name], "(side pair) length -> pair side length", side=2)
            for name in ("input_ids", "attention_mask")
        }
        margin = torch.tensor([self._margin(record) for record in records])
        return {**rows, "chosen_labels": batch["chosen_labels"], "margin": margin}

    def _margin(self, record: Mapping[str, Any]) -> float:
        if self.margin_column is None:
            return 0.0
        margin = record.get(self.margin_column)
        if margin is None:
            raise ValueError(
                f"margin_column: a record has no {self.margin_column!r}, only {sorted(record)}; "
                "give every record its margin (0 asks for nothing)"
            )
        return float(margin)


class PairScores(NamedTuple):
    """What is known about P pairs: ``[P]`` each, the columns of ``[P, 5]`` when gathered."""

    chosen: Float[Tensor, " P"]  # scores of the preferred responses
    rejected: Float[Tensor, " P"]  # and of the others
    margin: Float[Tensor, " P"]  # by how much the former should lead, in units of score
    nll: Float[Tensor, " P"]  # −Σ log p of the preferred response, nats; 0 where not asked for
    tokens: Float[Tensor, " P"]  # how many tokens that is


def count_tokens(labels: Int[Tensor, "P L"]) -> Float[Tensor, " P"]:
    """Return how many tokens of each row of labels are predicted: all labeled but the first."""
    return (labels[:, 1:] != IGNORED_LABEL).sum(1).float()


def totals(tokens: Float[Tensor, " P"]) -> Float[Tensor, "2"]:
    """Return ``[2]``: the number of pairs, and of their tokens; what losses are divided by."""
    return torch.stack([torch.ones_like(tokens).sum(), tokens.sum()])


@strict
@dataclass(frozen=True, kw_only=True)
class RankingLoss:
    """L = mean over pairs of −log σ(r_w − r_l − m) + β · mean over tokens of −log p(y_w | x).

    Args:
        lm_coef: β, factor on the language-model loss of the chosen responses (P1: 1; 0 in C's
            script); None for none.
        label_smoothing: α, the share of labels believed to be flipped, in [0, 0.5).

    Raises:
        ValueError: where a number is outside its range.

    Source: P1 eq. 2, the sign of its LM term put right; its mean over tokens: C; m, α: P2 §3.
    """

    lm_coef: float | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_range("RankingLoss", "lm_coef", self.lm_coef, 0, above=True)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"RankingLoss(label_smoothing=): got {self.label_smoothing}, expected a number in "
                "[0, 0.5): where half of the labels are flipped, pairs say nothing"
            )

    def __call__(self, scores: PairScores, counts: Float[Tensor, "2"] | None = None) -> LossOutput:
        """Return the share that these pairs have in the loss and its statistics.

        Args:
            scores: of P pairs, ``[P]`` each.
            counts: ``[2]`` `totals` of the whole optimizer step; None where these pairs are it.
        """
        pairs, tokens = totals(scores.tokens) if counts is None else counts
        lead = (scores.chosen - scores.rejected).detach()
        right = (lead > 0).float() + 0.5 * (lead == 0)
        loss = ranking_loss(scores.chosen, scores.rejected, scores.margin, self.label_smoothing)
        loss = loss.sum() / pairs
        stats = {
            "accuracy": right.sum() / pairs,
            "margin": lead.sum() / pairs,
            "ranking_loss": loss.detach(),
        }
        if self.lm_coef is not None:
            lm_loss = scores.nll.sum() / tokens.clamp(min=1)
            stats["lm_loss"] = lm_loss.detach()
            loss = loss + self.lm_coef * lm_loss
        return LossOutput(loss, stats)


class PairModel(nn.Module):
    """A reward model in training: both scores and the language-model loss in one forward pass.

    Args:
        reward_model: shared, not copied.
        lm_head: from hidden states to logits; None for the input embeddings, transposed.

    Source: P1 eq. 2, where r′ is the reward model with its head replaced.
    """

    accepts_loss_kwargs = True  # says to `Trainer`: the loss is divided by the whole step already

    def __init__(self, reward_model: RewardModel, lm_head: nn.Module | None = None) -> None:
        super().__init__()
        self.config = reward_model.config
        self.reward_model = reward_model
        self.lm_head = lm_head
        self._no_split_modules = reward_model.backbone._no_split_modules  # the units of FSDP

    def forward(
        self,
        input_ids: Int[Tensor, "P 2 L"],
        attention_mask: Int[Tensor, "P 2 L"],
        chosen_labels: Int[Tensor, "P L"] | None = None,
    ) -> tuple[Float[Tensor, "P 2"], Float[Tensor, " P"]]:
        """Score P pairs.

        Args:
            input_ids: ``[P, 2, L]`` chosen, rejected.
            attention_mask: ``[P, 2, L]``.
            chosen_labels: ``[P, L]`` ids of the chosen response, `IGNORED_LABEL` elsewhere; None
                for no language-model loss.

        Returns:
            ``[P, 2]`` scores; ``[P]`` −Σ log p of the chosen responses, nats, 0 without labels.
        """
        given: list[Tensor] = []  # to the value head: the hidden states
        head = self.reward_model.score
        with head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0])):
            scores = self.reward_model(input_ids.flatten(0, 1), attention_mask.flatten(0, 1))
        scores = rearrange(scores, "(pair side) -> pair side", side=2)
        if chosen_labels is None:
            return scores, torch.zeros_like(scores[:, 0])
        targets = chosen_labels[:, 1:]
        counted = targets != IGNORED_LABEL
        hidden = rearrange(given[0], "(pair side) length d -> pair side length d", side=2)
        hidden = hidden[:, 0, :-1]  # of the chosen
        nll = -self._logprobs(hidden[counted], targets[counted])
        return scores, nll.new_zeros(targets.shape).masked_scatter(counted, nll).sum(1)

    def _logprobs(self, hidden: Float[Tensor, "N D"], ids: Int[Tensor, " N"]) -> Tensor:
        scale, softcap = logit_scaling(self.reward_model)
        options: dict[str, Any] = dict(entropy=False, scale=scale, softcap=softcap)
        if self.lm_head is not None:
            return kernels.head_token_stats(self.lm_head, hidden, ids, **options).logprob
        weight = self.get_input_embeddings().weight
        return kernels.linear_token_stats(hidden, weight, ids, **options).logprob

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the backbone's token embeddings."""
        return self.reward_model.backbone.get_input_embeddings()

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Do with the backbone what `TrainingArguments` ask for."""
        self.reward_model.backbone.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Do the same, as older releases of transformers call it."""
        self.reward_model.backbone.gradient_checkpointing_enable(**kwargs)
