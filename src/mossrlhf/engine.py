"""Optimizer steps: roles in turn, one denominator, one place where accelerate's divisions end."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_scheduler

from mossrlhf.buffer import micro_batches
from mossrlhf.checkpoint import pack_optimizer, unpack_optimizer
from mossrlhf.config import TrainerConfig
from mossrlhf.faults import Fault, Suspect
from mossrlhf.loss import PPOMaxLoss, coupling
from mossrlhf.models import IGNORED_LABEL, ActorCritic
from mossrlhf.processes import on_all
from mossrlhf.sharding import full, is_sharded
from mossrlhf.suspects import not_finite, report
from mossrlhf.types import LossOutput, Rollout, TokenStats

ROLES = ("critic", "policy")
"""The order in which roles run: forward and backward of one before the next."""


@dataclass(frozen=True)
class StepOutput:
    """What there is to say about an optimizer step.

    Args:
        stats: this process's shares by metric name (they add up over processes), scalars.
        norms: gradient norms, alike on all processes, scalars.
        weights: by role, what its statistics are means over: tokens, states or labels of all
            processes, scalars.

    Source: ours.
    """

    stats: dict[str, Tensor]
    norms: dict[str, Tensor]
    weights: dict[str, Tensor]


class Engine:
    """The trained models with their optimizers, and the one way to move them.

    Args:
        model: policy and critic.
        args: learning rates, clipping, micro-batches.
        accelerator: places the models and reduces over processes.

    Source: ours; optimizers as in C (AdamW, β = (0.9, 0.95), ε = 1e-6).
    """

    def __init__(self, model: ActorCritic, args: TrainerConfig, accelerator: Accelerator) -> None:
        self.args = args
        self.accelerator = accelerator
        self.bare = model
        self._asked: tuple[PPOMaxLoss, str | None] | None = None
        self._last = ""  # whose backward is the last of a step
        self.steps = 0  # taken so far
        self.keep_fault: Callable[[Fault], tuple[str, Sequence[Suspect]]] = _not_kept
        rates = {"policy": args.learning_rate}
        if model.critic is not None:
            rates["critic"] = args.critic_learning_rate
        self.optimizers = {
            role: self._optimizer(model.trained_parameters(role), rate)
            for role, rate in rates.items()
        }
        self.schedulers = {role: self._scheduler(role, o) for role, o in self.optimizers.items()}
        self._prepare()

    def _prepare(self) -> None:
        prepared = self.accelerator.prepare(self.bare, *self.optimizers.values())
        self.model = prepared[0]
        self.optimizers = dict(zip(self.optimizers, prepared[1:], strict=True))

    def _optimizer(self, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        args = self.args
        return torch.optim.AdamW(
            parameters,
            lr=rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            fused=True,  # in one pass over the weights, without copies of them
        )

    def _scheduler(self, role: str, optimizer: torch.optim.Optimizer) -> Any:
        # Made before `prepare`, and stepped by hand: accelerate would step it once a process.
        total = self.args.optimizer_steps(pretraining=role == "critic")
        warmup = self.args.warmup_steps
        warmup = math.ceil(warmup * total) if warmup < 1 else int(warmup)
        return get_scheduler(self.args.lr_scheduler_type, optimizer, warmup, total)

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes.

        Args:
            tensor: any shape; left as it is.
        """
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor.clone(), reduction="sum")

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate of each role."""
        return {r: float(o.param_groups[0]["lr"]) for r, o in self.optimizers.items()}

    def set_learning_rate(self, role: str, rate: float) -> None:
        """Change the learning rate a schedule starts from, and with it the one in force.

        Args:
            role: "policy" or "critic".
            rate: at the peak of the schedule.
        """
        scheduler, groups = self.schedulers[role], self.optimizers[role].param_groups
        scheduler.base_lrs = [rate] * len(groups)
        for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
            group["initial_lr"] = rate
            group["lr"] = rate * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in groups]

    def step(
        self,
        minibatch: Rollout,
        loss: PPOMaxLoss,
        roles: Sequence[str] = ("critic", "policy"),
        ptx: Mapping[str, Tensor] | None = None,
    ) -> StepOutput:
        """Take one optimizer step of the given roles.

        Every loss is a sum over tokens divided by the tokens of the whole step, over all
        micro-batches and processes, so that neither changes anything but speed.

        Args:
            minibatch: this process's sequences, annotated and estimated.
            loss: what to minimize.
            roles: "policy" and "critic" as wanted; roles without an optimizer are passed over.
            ptx: a batch of pre-training data for the policy, or None.

        Returns:
            statistics, gradient norms, and what the statistics are means over.

        Raises:
            NonFiniteError: (a FloatingPointError) where a loss or gradient is not finite; nothing
                has moved, on no process. It names samples, and where the batch has been left.
        """
        given, minibatch = minibatch, loss.prepare(minibatch, self.reduce)
        parts = self._parts(minibatch)
        stats: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        passes = [role for role in ROLES if role in roles and role in self.optimizers]
        if ptx is not None and "policy" in roles:
            passes.append("ptx")
        self._last = passes[-1] if passes else ""
        for role in passes:
            if role == "ptx" and ptx is not None:
                weights[role] = self._backward_ptx(ptx, loss, stats)
            else:
                weights[role] = self._backward(role, parts, loss, stats)
        norms = self._clip(roles)
        if broken := not_finite(self, {**stats, **norms}):
            raise on_all(report(self, broken, given, minibatch, loss, roles, ptx, weights))
        self.steps += 1
        self._move([role for role in roles if role in self.optimizers])
        self.forget()  # all: a head on the policy has reached beneath it
        return StepOutput(stats, norms, weights)

    def _move(self, roles: Sequence[str]) -> None:
        for role in roles:
            self.optimizers[role].step()
            self.schedulers[role].step()

    def forget(self) -> None:
        """Drop all gradients: of a step that was taken, or given up."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def _parts(self, minibatch: Rollout) -> list[Rollout]:
        parts = micro_batches(minibatch, self.args.micro_batch_size, self.args.max_tokens)
        return parts + [_weightless(parts[0])] * self._spare(len(parts))

    def _spare(self, count: int) -> int:
        """How many micro-batches of weight zero this process adds to its own.

        Under a token budget processes may split differently, and wait for each other in every
        backward.
        """
        if self.accelerator.num_processes == 1:
            return 0
        counts = torch.tensor([count], device=self.accelerator.device)
        return int(self.accelerator.gather(counts).max()) - count

    def pack(self, role: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a role's optimizer, as `pack_optimizer` does; all processes ask for it together.

        Args:
            role: "policy" or "critic".
        """
        return pack_optimizer(self.optimizers[role])

    def unpack(self, role: str, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Put back what `pack` returned.

        Args:
            role: "policy" or "critic".
            tensors: by name, all of them on all processes.
            plain: the rest.
        """
        unpack_optimizer(self.optimizers[role], tensors, plain)

    def in_step(self, parts: list[Any]) -> list[Any]:
        """Let all processes run as many forwards, where a forward takes all of them.

        Args:
            parts: what this process runs, one by one.

        Returns:
            them, the first again as often as the busiest process has more.
        """
        spare = self._spare(len(parts)) if is_sharded(self.bare) else 0
        return parts + parts[:1] * spare

    def _backward(
        self, role: str, parts: list[Rollout], loss: PPOMaxLoss, stats: dict[str, Tensor]
    ) -> Tensor:
        weights = "token_weights" if role == "policy" else "state_weights"
        sums = torch.stack([getattr(part, weights).sum() for part in parts])
        denominator = self.reduce(sums.sum())
        extra: dict[str, Any] = {}
        if role == "policy":
            extra = dict(entropy=loss.entropy_coef is not None, fused=self._fuses(loss))
        for index, part in enumerate(parts):
            if extra.get("fused"):
                share = _share_of_tokens(loss, part, denominator)
            else:
                whole = loss.policy if role == "policy" else loss.critic
                share = partial(whole, batch=part, denominator=denominator)
            output = self._accumulate(index == len(parts) - 1, role, part, share, **extra)
            for name, value in output.items():
                stats[name] = stats.get(name, 0.0) + value
        return denominator

    def _backward_ptx(
        self, batch: Mapping[str, Tensor], loss: PPOMaxLoss, stats: dict[str, Tensor]
    ) -> Tensor:
        denominator = self.reduce((batch["labels"][:, 1:] != IGNORED_LABEL).sum().float())
        share = partial(loss.ptx, denominator=denominator)
        rows, width = batch["labels"].shape
        size = min(rows, self.args.micro_batch_size or rows)
        if self.args.max_tokens is not None:
            size = max(1, min(size, self.args.max_tokens // width))
        chunks = [value.split(size) for value in batch.values()]
        parts = [dict(zip(batch, part, strict=True)) for part in zip(*chunks, strict=True)]
        blank = {**parts[0], "labels": torch.full_like(parts[0]["labels"], IGNORED_LABEL)}
        parts += [blank] * self._spare(len(parts))
        for index, part in enumerate(parts):
            for name, value in self._accumulate(
                index == len(parts) - 1, "ptx", part, share, fused=self._may_fuse
            ).items():
                stats[name] = stats.get(name, 0.0) + value
        return denominator

    @property
    def _may_fuse(self) -> bool:
        # A scale that comes after the gradient has been rounded to float16 saves nothing.
        return bool(self.accelerator.mixed_precision != "fp16")

    def _fuses(self, loss: PPOMaxLoss) -> bool:
        """Whether a loss is a sum over tokens, whose gradient can be made along with it."""
        return self.why_not_fused(loss) is None

    def why_not_fused(self, loss: PPOMaxLoss) -> str | None:
        """Say why the gradient of a loss is not made along with it; None where it is.

        Args:
            loss: asked once, and remembered.
        """
        if not self._may_fuse:
            return "float16's scale comes too late"
        if self._asked is None or self._asked[0] is not loss:
            self._asked = loss, coupling(loss)
        return self._asked[1]

    def _accumulate(
        self, sync: bool, role: str, part: Any, share: Any, **extra: Any
    ) -> dict[str, Tensor]:
        # Gradients wait for the last micro-batch of the last role to be averaged with it; where
        # each process has a share of them, for the last of their role: what a backward does not
        # reach would not be handed out.
        averages = sync and (role == self._last or is_sharded(self.bare))
        with nullcontext() if averages else self.accelerator.no_sync(self.model):
            with self.accelerator.autocast():  # as scored: FSDP2 is not wrapped in it
                output = self.model(role, part, share, **extra)
            self._differentiate(output.loss)
        stats: dict[str, Tensor] = output.stats
        return stats

    def _differentiate(self, share: Tensor) -> None:
        # Processes average gradients and `backward` divides by accumulation steps; shares are to
        # be added up.
        accelerator = self.accelerator
        factor = accelerator.num_processes * accelerator.gradient_accumulation_steps
        accelerator.backward(share * factor)

    def _clip(self, roles: Sequence[str]) -> dict[str, Tensor]:
        groups = {
            role: [p for group in self.optimizers[role].param_groups for p in group["params"]]
            for role in roles
            if role in self.optimizers
        }
        if self.args.clip_grad_jointly:
            groups = {"joint": [p for parameters in groups.values() for p in parameters]}
        bound = self.args.max_grad_norm
        limit = math.inf if bound is None else bound
        return {
            f"{name}/grad_norm": full(self.accelerator.clip_grad_norm_(parameters, limit).detach())
            for name, parameters in groups.items()
        }


def _share_of_tokens(
    loss: PPOMaxLoss, part: Rollout, denominator: Tensor
) -> Callable[[TokenStats, slice], LossOutput]:
    """The policy's loss of some tokens of a micro-batch, flattened once for all of them."""
    rows = loss.rows(part)
    return lambda stats, at: loss.tokens(stats, rows[at], denominator)


def _not_kept(fault: Fault) -> tuple[str, Sequence[Suspect]]:
    """For an engine without a trainer, which has no folder for it."""
    return "", fault.suspects


def _weightless(part: Rollout) -> Rollout:
    return replace(
        part,
        weights=torch.zeros_like(part.token_weights),
        state_mask=None if part.state_mask is None else torch.zeros_like(part.state_mask),
    )
