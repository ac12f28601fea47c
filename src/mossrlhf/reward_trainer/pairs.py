"""Pairs in training: a batch of them, the model that scores it, the loss of the scores."""

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mossrlhf import kernels
from mossrlhf.functional import ranking_loss
from mossrlhf.models import IGNORED_LABEL, RewardModel, logit_scaling
from mossrlhf.options import check_range, strict
from mossrlhf.types import LossOutput


@dataclass(frozen=True)
class PairRows:
    """Lays out what a pair collator makes one row per pair: who splits a batch splits it by pairs.

    Args:
        collator: from P records to ``input_ids`` and ``attention_mask`` ``[2P, L]``, all chosen,
            then all rejected, and ``chosen_labels`` ``[P, L]``, as `PairCollator` does.
        margin_column: the records' number m, in units of score; None for 0.
        smoothing_column: the records' number α; None for the loss's.
        optional: whether a record may lack these numbers, as those held out do.

    Source: ours.
    """

    collator: Callable[..., Mapping[str, Tensor]]
    margin_column: str | None = None
    smoothing_column: str | None = None
    optional: bool = False

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Lay out P records.

        Returns:
            ids and mask ``[P, 2, L]``, ``chosen_labels`` ``[P, L]``, ``margin`` and ``smoothing``
            ``[P]`` (the latter NaN where the loss's is to be used).

        Raises:
            ValueError: where a record has not the number that it should, or one out of range.
        """
        batch = self.collator(records)
        rows = {
            name: rearrange(batch[name], "(side pair) length -> pair side length", side=2)
            for name in ("input_ids", "attention_mask")
        }
        return {
            **rows,
            "chosen_labels": batch["chosen_labels"],
            "margin": self._numbers(records, "margin_column", 0.0),
            "smoothing": self._smoothing(records),
        }

    def _smoothing(self, records: Sequence[Mapping[str, Any]]) -> Float[Tensor, " P"]:
        alphas = self._numbers(records, "smoothing_column", torch.nan)
        if bool(((alphas < 0) | (alphas >= 0.5)).any()):
            raise ValueError(
                f"smoothing_column: {self.smoothing_column!r} holds {alphas.tolist()}, expected "
                "numbers in [0, 0.5); a label likelier wrong than right is to be flipped "
                "(FlipLabels)"
            )
        return alphas

    def _numbers(
        self, records: Sequence[Mapping[str, Any]], argument: str, default: float
    ) -> Float[Tensor, " P"]:
        """A number of each record, or the default where none is asked for."""
        column = getattr(self, argument)
        if column is None:
            return torch.full((len(records),), default)
        found = []
        for record in records:
            value: Any = record.get(column)
            absent = value is None or value != value
            if absent and not self.optional:
                raise ValueError(
                    f"{argument}: a record has no {column!r} (or None, or NaN), only "
                    f"{sorted(record)}; give every record its number (0 asks for nothing)"
                )
            if not absent and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
                raise ValueError(
                    f"{argument}: a record's {column!r} is {value!r}, a "
                    f"{type(value).__name__}, expected a number"
                )
            found.append(default if absent else float(value))
        return torch.tensor(found)


class PairScores(NamedTuple):
    """What is known about P pairs: ``[P]`` each, the columns of ``[P, 6]`` when gathered."""

    chosen: Float[Tensor, " P"]  # scores of the preferred responses
    rejected: Float[Tensor, " P"]  # and of the others
    margin: Float[Tensor, " P"]  # by how much the former should lead, in units of score
    nll: Float[Tensor, " P"]  # −Σ log p of the preferred response, nats; 0 where not asked for
    tokens: Float[Tensor, " P"]  # how many tokens that is
    smoothing: Float[Tensor, " P"]  # α of each pair; NaN where it is the loss's


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
        label_smoothing: α, the share of labels believed to be flipped, in [0, 0.5); pairs that
            have one of their own keep it.
        centering_coef: λ, adds λ · mean over pairs of (r_w + r_l)², which keeps the scores about
            zero, since pairs alone say nothing of their level; None for none.

    Raises:
        ValueError: where a number is outside its range.

    Source: P1 eq. 2, the sign of its LM term put right; its mean over tokens: C; m, α: P2 §3;
        centering: Eisenstein et al., arXiv 2312.09244 §2 (they take λ = 0.01).
    """

    lm_coef: float | None = None
    label_smoothing: float = 0.0
    centering_coef: float | None = None

    def __post_init__(self) -> None:
        check_range("RankingLoss", "lm_coef", self.lm_coef, 0, above=True)
        check_range("RankingLoss", "centering_coef", self.centering_coef, 0, above=True)
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
        alpha = scores.smoothing.nan_to_num(self.label_smoothing)
        loss = ranking_loss(scores.chosen, scores.rejected, scores.margin, alpha)
        loss = loss.sum() / pairs
        stats = {
            "accuracy": right.sum() / pairs,
            "margin": lead.sum() / pairs,
            "ranking_loss": loss.detach(),
        }
        if self.centering_coef is not None:
            off_center = (scores.chosen + scores.rejected).square().sum() / pairs
            stats["centering_loss"] = off_center.detach()
            loss = loss + self.centering_coef * off_center
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
        groups: in how many groups of like length the sequences are computed, each padded to its
            own longest; always as many, as processes that share weights wait for each other.

    Source: P1 eq. 2, where r′ is the reward model with its head replaced.
    """

    accepts_loss_kwargs = True  # says to `Trainer`: the loss is divided by the whole step already

    def __init__(
        self, reward_model: RewardModel, lm_head: nn.Module | None = None, groups: int = 1
    ) -> None:
        super().__init__()
        self.groups = groups
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
        ids, mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)
        labels = None
        if chosen_labels is not None:
            ignored = torch.full_like(chosen_labels, IGNORED_LABEL)
            labels = torch.stack([chosen_labels, ignored], dim=1).flatten(0, 1)
        scores, nll = self._read_in_groups(ids, mask, labels)
        scores = rearrange(scores, "(pair side) -> pair side", side=2)
        return scores, rearrange(nll, "(pair side) -> pair side", side=2)[:, 0]

    def _read_in_groups(
        self, ids: Int[Tensor, "R L"], mask: Int[Tensor, "R L"], labels: Int[Tensor, "R L"] | None
    ) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
        """Score rows, and sum −log p of their labels, a group of like length after the other."""
        if self.groups == 1:
            return self._read(ids, mask, labels)
        order = mask.sum(1).argsort(stable=True)
        # Not fewer where there are few rows: a row is read twice, and counts once.
        groups = [part if len(part) else order[:1] for part in order.tensor_split(self.groups)]
        scores, nll = mask.new_zeros(2, len(ids), dtype=torch.float32).unbind()
        for part in groups:
            used = mask[part].any(0).nonzero()
            columns = slice(int(used.min()), int(used.max()) + 1)
            of_labels = None if labels is None else labels[part][:, columns]
            of_part = self._read(ids[part][:, columns], mask[part][:, columns], of_labels)
            scores = scores.to(of_part[0]).index_copy(0, part, of_part[0])
            nll = nll.to(of_part[1]).index_copy(0, part, of_part[1])
        return scores, nll

    def _read(
        self, ids: Int[Tensor, "R L"], mask: Int[Tensor, "R L"], labels: Int[Tensor, "R L"] | None
    ) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
        given: list[Tensor] = []  # to the value head: the hidden states
        head = self.reward_model.score
        with head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0])):
            scores = self.reward_model(ids, mask)
        if labels is None:
            return scores, torch.zeros_like(scores)
        targets = labels[:, 1:]
        counted = targets != IGNORED_LABEL
        nll = -self._logprobs(given[0][:, :-1][counted], targets[counted])
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
