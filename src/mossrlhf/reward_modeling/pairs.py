"""Preference pairs in training: their collator, the model that computes rewards, and the loss."""

import json
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import CONFIG_NAME

from mossrlhf import kernels
from mossrlhf.functional import ranking_loss
from mossrlhf.models import (
    IGNORED_LABEL,
    SCORE_MOMENTS,
    RewardModel,
    is_adapted,
    load_adapters,
    logit_scaling,
    save_adapters,
)
from mossrlhf.options import check_range, strict
from mossrlhf.serialization import write_json
from mossrlhf.types import LossOutput

# Parts of a checkpoint beside the classifier; transformers ignores subfolders when loading it.
LM_HEAD = Path("lm_head") / "model.safetensors"
ADAPTER = "adapter"  # adapters and value head, in PEFT's layout
MOMENTS = "score_moments.json"  # in that folder: mean and standard deviation of the rewards


@dataclass(frozen=True)
class PairwiseCollator:
    """Give each pair one row of the batch, so that splitting a batch keeps pairs together."""

    collator: Callable[..., Mapping[str, Tensor]]  # a `PairCollator`, or one that returns the same
    margin_column: str | None = None  # of m, in units of reward; None for m = 0
    smoothing_column: str | None = None  # of α; None for the loss's α
    optional: bool = False  # whether records may lack these columns, as evaluation records may

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return ids and mask ``[P, 2, L]``, labels ``[P, L]``, margin and smoothing ``[P]``."""
        batch = self.collator(records)
        rows = {
            name: rearrange(batch[name], "(side pair) length -> pair side length", side=2)
            for name in ("input_ids", "attention_mask")
        }
        alphas = self._numbers(records, "smoothing_column", torch.nan)
        if bool(((alphas < 0) | (alphas >= 0.5)).any()):
            raise ValueError(
                f"smoothing_column: {self.smoothing_column!r} holds {alphas.tolist()}, expected "
                "numbers in [0, 0.5); flip a label that is more likely wrong than right "
                "(FlipLabels)"
            )
        return {
            **rows,
            "chosen_labels": batch["chosen_labels"],
            "margin": self._numbers(records, "margin_column", 0.0),
            "smoothing": alphas,
        }

    def lengths(self, dataset: Sequence[Mapping[str, Any]], quiet: bool = True) -> list[int]:
        """Return the tokens in each pair's longer sequence; `quiet` hides the progress bar."""
        indices = tqdm(range(len(dataset)), "measuring pairs", disable=quiet, leave=False)
        masks = (self.collator([dataset[i]])["attention_mask"] for i in indices)  # cached there
        return [int(mask.sum(1).max()) for mask in masks]

    def _numbers(
        self, records: Sequence[Mapping[str, Any]], argument: str, default: float
    ) -> Float[Tensor, " P"]:
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
                    f"{sorted(record)}; give every record a number (0 for no effect)"
                )
            if not absent and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
                raise ValueError(
                    f"{argument}: a record's {column!r} is {value!r}, a "
                    f"{type(value).__name__}, expected a number"
                )
            found.append(default if absent else float(value))
        return torch.tensor(found)


class PairRewards(NamedTuple):
    """The inputs of the loss for P pairs: ``[P]`` each, the columns of ``[P, 6]`` if gathered."""

    chosen: Float[Tensor, " P"]  # rewards of the chosen responses
    rejected: Float[Tensor, " P"]  # rewards of the rejected responses
    margin: Float[Tensor, " P"]  # m, by which chosen should exceed rejected, in units of reward
    nll: Float[Tensor, " P"]  # −Σ log p of the chosen response, nats; 0 without that loss term
    tokens: Float[Tensor, " P"]  # number of tokens in that sum
    smoothing: Float[Tensor, " P"]  # α of each pair; NaN for the loss's α


def count_tokens(labels: Int[Tensor, "P L"]) -> Float[Tensor, " P"]:
    """Return the number of labels per row that are predicted: all but the first position's."""
    return (labels[:, 1:] != IGNORED_LABEL).sum(1).float()


def denominators(tokens: Float[Tensor, " P"]) -> Float[Tensor, "2"]:
    """Return the numbers of pairs and tokens, ``[2]``, from the tokens of each pair."""
    return torch.stack([torch.ones_like(tokens).sum(), tokens.sum()])


def correctness(margins: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Return 1 where r_w > r_l, 0 where r_w < r_l and a half for ties, from r_w − r_l."""
    return (margins > 0).to(margins) + 0.5 * (margins == 0)


@strict
@dataclass(frozen=True, kw_only=True)
class RankingLoss:
    """L = mean over pairs of −log σ(r_w − r_l − m) + β · mean over tokens of −log p(y_w | x).

    Args:
        lm_coef: β, factor on the language-model loss of the chosen responses (P1: 1; 0 in C's
            script); None for no such term.
        label_smoothing: α, the assumed share of flipped labels, in [0, 0.5); a pair with its own α
            keeps that.
        centering_coef: λ, adds λ · mean over pairs of (r_w + r_l)², which centers the rewards on
            zero, since pairs do not determine their level; None for no such term.

    Raises:
        ValueError: if a number is out of range.

    Source: P1 eq. 2, with the sign of its LM term corrected; its mean over tokens: C; m, α: P2 §3;
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
                "[0, 0.5): if half of the labels are flipped, pairs carry no information"
            )

    def __call__(self, pairs: PairRewards, counts: Float[Tensor, "2"] | None = None) -> LossOutput:
        """Return the contribution of these pairs to the loss and its statistics.

        Args:
            pairs: P pairs, ``[P]`` each.
            counts: ``[2]`` pairs and tokens of the whole optimizer step (`denominators`); None if
                these pairs are the whole step.
        """
        count, tokens = denominators(pairs.tokens) if counts is None else counts
        margins = (pairs.chosen - pairs.rejected).detach()
        alpha = pairs.smoothing.nan_to_num(self.label_smoothing)
        loss = ranking_loss(pairs.chosen, pairs.rejected, pairs.margin, alpha).sum() / count
        stats = {
            "accuracy": correctness(margins).sum() / count,
            "margin": margins.sum() / count,
            "ranking_loss": loss.detach(),
        }
        if self.centering_coef is not None:
            off_center = (pairs.chosen + pairs.rejected).square().sum() / count
            stats["centering_loss"] = off_center.detach()
            loss = loss + self.centering_coef * off_center
        if self.lm_coef is not None:
            lm_loss = pairs.nll.sum() / tokens.clamp(min=1)
            stats["lm_loss"] = lm_loss.detach()
            loss = loss + self.lm_coef * lm_loss
        return LossOutput(loss, stats)


class PairModel(nn.Module):
    """A reward model in training: rewards and the language-model loss in one forward pass.

    ``lm_head`` None uses the input embeddings. A batch is computed in ``groups`` of similar length,
    each padded to its own longest sequence; always as many, as sharded processes wait for others.
    """

    accepts_loss_kwargs = True  # for `Trainer`: the loss is already divided by the whole step

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
        """Return the rewards of chosen and rejected, and −Σ log p of chosen, 0 without labels."""
        ids, mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)
        labels = None
        if chosen_labels is not None:
            ignored = torch.full_like(chosen_labels, IGNORED_LABEL)
            labels = torch.stack([chosen_labels, ignored], dim=1).flatten(0, 1)
        compute = self._compute if self.groups == 1 else self._compute_in_groups
        rewards, nll = compute(ids, mask, labels)
        rewards = rearrange(rewards, "(pair side) -> pair side", side=2)
        return rewards, rearrange(nll, "(pair side) -> pair side", side=2)[:, 0]

    def _compute_in_groups(
        self, ids: Int[Tensor, "R L"], mask: Int[Tensor, "R L"], labels: Int[Tensor, "R L"] | None
    ) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
        order = mask.sum(1).argsort(stable=True)
        # With fewer rows than groups, a row is computed again and counted once.
        groups = [part if len(part) else order[:1] for part in order.tensor_split(self.groups)]
        rewards, nll = mask.new_zeros(2, len(ids), dtype=torch.float32).unbind()
        for part in groups:
            used = mask[part].any(0).nonzero()
            columns = slice(int(used.min()), int(used.max()) + 1)
            of_labels = None if labels is None else labels[part][:, columns]
            of_part = self._compute(ids[part][:, columns], mask[part][:, columns], of_labels)
            rewards = rewards.to(of_part[0]).index_copy(0, part, of_part[0])
            nll = nll.to(of_part[1]).index_copy(0, part, of_part[1])
        return rewards, nll

    def _compute(
        self, ids: Int[Tensor, "R L"], mask: Int[Tensor, "R L"], labels: Int[Tensor, "R L"] | None
    ) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
        """Return the reward and the summed −log p of the labels, both of each row."""
        hidden: list[Tensor] = []  # what the value head reads
        head = self.reward_model.score
        with head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0])):
            rewards = self.reward_model(ids, mask)
        if labels is None:
            return rewards, torch.zeros_like(rewards)
        targets = labels[:, 1:]
        counted = targets != IGNORED_LABEL
        nll = -self._logprobs(hidden[0][:, :-1][counted], targets[counted])
        return rewards, nll.new_zeros(targets.shape).masked_scatter(counted, nll).sum(1)

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
        """Enable activation checkpointing in the backbone, as `TrainingArguments` configure it."""
        self.reward_model.backbone.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Do the same, by the name in older releases of transformers."""
        self.reward_model.backbone.gradient_checkpointing_enable(**kwargs)

    def save(self, folder: Path, state: Any = None, *, adapters_only: bool = False) -> None:
        """Write classifier, adapters and output head; ``state`` holds gathered weights, if any."""
        adapted = is_adapted(self.reward_model)
        if adapted:
            save_adapters(self.reward_model, folder / ADAPTER)
            moments = {name: getattr(self.config, name, None) for name in SCORE_MOMENTS}
            write_json(moments, folder / ADAPTER / MOMENTS)
        if not (adapted and adapters_only):
            # Adapters exclude sharding, so they are merged from the model itself.
            gathered = None if state is None or adapted else _below("reward_model.", state)
            self.reward_model.save_pretrained(folder, state_dict=gathered)
        if head := _below("lm_head.", self.state_dict() if state is None else state):
            (folder / LM_HEAD).parent.mkdir(parents=True, exist_ok=True)
            save_file(head, folder / LM_HEAD)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote, every key: transformers would only log missing ones."""
        adapted, saved_adapters = is_adapted(self.reward_model), (folder / ADAPTER).is_dir()
        alone = saved_adapters and not (folder / CONFIG_NAME).is_file()
        if adapted > saved_adapters or alone > adapted:
            has = ("adapters alone", "none") if alone else ("no adapters", "some")
            raise ValueError(
                f"{folder}: it holds {has[0]}, and the model in training has {has[1]}; give "
                "RewardTrainer the peft_config that the checkpoint was trained with"
            )
        if adapted:
            with _readable(folder / ADAPTER):
                load_adapters(self.reward_model, folder / ADAPTER)
            with _readable(folder / ADAPTER / MOMENTS) as path:
                moments = dict(json.loads(path.read_text(encoding="utf-8")))
        else:
            with _readable(folder):
                saved = RewardModel.from_pretrained(folder)
            self.reward_model.load_state_dict(saved.state_dict())
            moments = vars(saved.config)
        set_moments(self.config, moments)
        if self.lm_head is not None:
            with _readable(folder / LM_HEAD) as path:
                self.lm_head.load_state_dict(load_file(path))


def set_moments(config: Any, moments: Mapping[str, Any]) -> None:
    """Set mean and standard deviation of the rewards in a configuration; None if unknown."""
    for name in SCORE_MOMENTS:
        setattr(config, name, moments.get(name))


@contextmanager
def _readable(path: Path) -> Iterator[Path]:
    """Name the part of a checkpoint that cannot be read."""
    try:
        yield path
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: cannot be read ({type(error).__name__}: {error!s:.200}); it is missing or "
            "damaged, resume from another checkpoint"
        ) from error


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
