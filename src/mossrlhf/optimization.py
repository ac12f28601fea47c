"""Optimizer steps: the roles in turn, one denominator."""

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

from mossrlhf.config import TrainerConfig
from mossrlhf.distributed.processes import on_all
from mossrlhf.distributed.sharding import full, is_sharded, share_of
from mossrlhf.loss import PPOMaxLoss, coupling
from mossrlhf.minibatches import micro_batches
from mossrlhf.models import IGNORED_LABEL, ActorCritic
from mossrlhf.nan_debug import FailedStep, Fault, Suspect, diagnose
from mossrlhf.types import LossOutput, Rollout, TokenStats

ROLES = ("critic", "policy")
"""The order in which roles run: forward and backward of one before the next."""


@dataclass(frozen=True)
class StepOutput:
    """Statistics of an optimizer step.

    `stats` are this process's shares by metric, which add up over processes; `norms` the gradient
    norms; `weights` by role the denominator of its statistics: tokens, states or labels. Scalars.
    """

    stats: dict[str, Tensor]
    norms: dict[str, Tensor]
    weights: dict[str, Tensor]


class TrainingEngine:
    """The trained models with their optimizers and schedules; `step` updates them.

    Source: MOSS-RLHF's scripts (AdamW, β = (0.9, 0.95), ε = 1e-6).
    """

    def __init__(self, model: ActorCritic, args: TrainerConfig, accelerator: Accelerator) -> None:
        self.args = args
        self.accelerator = accelerator
        self.bare = model
        self.steps = 0  # optimizer steps taken
        self.keep_fault: Callable[[Fault], tuple[str, Sequence[Suspect]]] | None = None
        self._coupling: tuple[PPOMaxLoss, str | None] | None = None
        self._last_role = ""  # whose backward is the last of a step
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
            fused=True,  # one pass over the weights, without copies of them
        )

    def _scheduler(self, role: str, optimizer: torch.optim.Optimizer) -> Any:
        # Made before `prepare` and stepped by hand: accelerate would step it once per process.
        total = self.args.optimizer_steps(pretraining=role == "critic")
        warmup = self.args.warmup_steps
        warmup = math.ceil(warmup * total) if warmup < 1 else int(warmup)
        return get_scheduler(self.args.lr_scheduler_type, optimizer, warmup, total)

    def reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor.clone(), reduction="sum")

    def learning_rates(self) -> dict[str, float]:
        """Return the current learning rate of each role."""
        return {r: float(o.param_groups[0]["lr"]) for r, o in self.optimizers.items()}

    def set_learning_rate(self, role: str, rate: float) -> None:
        """Change the peak of a role's schedule, and the current learning rate with it."""
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
        micro-batches and processes, so that neither changes anything but speed (unless the loss
        couples tokens: then it couples those of a micro-batch).

        `minibatch` holds this process's sequences, annotated and estimated; `ptx` is a batch of
        pre-training data for the policy. Raises `NonFiniteError` where a gradient or any statistic
        is not finite: no process has taken the step; the error names samples where it finds them.
        """
        given, minibatch = minibatch, loss.prepare(minibatch, self.reduce)
        parts = self._parts(minibatch)
        stats: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        passes = [role for role in ROLES if role in roles and role in self.optimizers]
        if ptx is not None and "policy" in roles:
            passes.append("ptx")
        self._last_role = passes[-1] if passes else ""
        for role in passes:
            if role == "ptx" and ptx is not None:
                weights[role] = self._backward_ptx(ptx, loss, stats)
            else:
                weights[role] = self._backward(role, parts, loss, stats)
        norms = self._clip(roles)
        if broken := self._not_finite({**stats, **norms}):
            self.zero_grad()
            failed = FailedStep(
                model=self.bare,
                wrapped=self.model,
                accelerator=self.accelerator,
                given=given,
                minibatch=minibatch,
                loss=loss,
                roles=roles,
                ptx=ptx,
                denominators=weights,
            )
            raise on_all(diagnose(failed, broken, self.keep_fault))
        self.steps += 1
        self._move([role for role in roles if role in self.optimizers])
        self.zero_grad()  # of all roles: a critic on the policy's base has reached both
        return StepOutput(stats, norms, weights)

    def _not_finite(self, stats: Mapping[str, Tensor]) -> list[str]:
        values = torch.stack([value.float() for value in stats.values()])
        broken = self.reduce((~torch.isfinite(values)).float()).tolist()
        return [name for name, flag in zip(stats, broken, strict=True) if flag]

    def _move(self, roles: Sequence[str]) -> None:
        for role in roles:
            self.optimizers[role].step()
            self.schedulers[role].step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def _parts(self, minibatch: Rollout) -> list[Rollout]:
        parts = micro_batches(minibatch, self.args.micro_batch_size, self.args.max_tokens)
        return parts + [_weightless(parts[0])] * self._missing(len(parts))

    def _missing(self, count: int) -> int:
        """Return how many micro-batches this process lacks to have as many as any other."""
        if self.accelerator.num_processes == 1:
            return 0
        counts = torch.tensor([count], device=self.accelerator.device)
        return int(self.accelerator.gather(counts).max()) - count

    def in_step(self, parts: list[Any]) -> list[Any]:
        """Repeat the first part until all processes have equally many, if models are sharded."""
        missing = self._missing(len(parts)) if is_sharded(self.bare) else 0
        return parts + parts[:1] * missing

    def pack(self, role: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Split a role's optimizer state into tensors by name and JSON data; collective."""
        return pack_optimizer(self.optimizers[role])

    def unpack(self, role: str, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Load what `pack` returned; all processes pass all of it."""
        unpack_optimizer(self.optimizers[role], tensors, plain)

    def _backward(
        self, role: str, parts: list[Rollout], loss: PPOMaxLoss, stats: dict[str, Tensor]
    ) -> Tensor:
        weights = "token_weights" if role == "policy" else "state_weights"
        sums = torch.stack([getattr(part, weights).sum() for part in parts])
        denominator = self.reduce(sums.sum())
        extra: dict[str, Any] = {}
        if role == "policy":
            fused = self.why_not_fused(loss) is None
            extra = dict(entropy=loss.entropy_coef is not None, fused=fused)
        for index, part in enumerate(parts):
            if extra.get("fused"):
                share = _share_of_tokens(loss, part, denominator)
            else:
                whole = loss.policy if role == "policy" else loss.critic
                share = partial(whole, batch=part, denominator=denominator)
            output = self._accumulate(index == len(parts) - 1, role, part, share, **extra)
            _add(stats, output)
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
        parts += [blank] * self._missing(len(parts))
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            _add(stats, self._accumulate(last, "ptx", part, share, fused=self._may_fuse))
        return denominator

    @property
    def _may_fuse(self) -> bool:
        # The loss must be scaled before its gradient is rounded; a fused one is rounded first.
        return bool(self.accelerator.mixed_precision != "fp16")

    def why_not_fused(self, loss: PPOMaxLoss) -> str | None:
        """Return why a loss's gradient is not made in its forward pass; None where it is."""
        if not self._may_fuse:
            return "float16's scale comes too late"
        if self._coupling is None or self._coupling[0] is not loss:
            self._coupling = loss, coupling(loss)
        return self._coupling[1]

    def _accumulate(
        self, last: bool, role: str, part: Any, share: Any, **extra: Any
    ) -> dict[str, Tensor]:
        # DDP averages gradients once, in the last backward of the last role. FSDP2 must reduce in
        # the last backward of each role: it does not reduce what a backward does not reach.
        averages = last and (role == self._last_role or is_sharded(self.bare))
        with nullcontext() if averages else self.accelerator.no_sync(self.model):
            with self.accelerator.autocast():  # accelerate does not wrap FSDP2's forward in it
                output = self.model(role, part, share, **extra)
            self._differentiate(output.loss)
        stats: dict[str, Tensor] = output.stats
        return stats

    def _differentiate(self, share: Tensor) -> None:
        # DDP averages over processes, and `backward` divides by accumulation steps; our shares
        # are to be added up.
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


def _add(stats: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, value in more.items():
        stats[name] = stats.get(name, 0.0) + value


def _share_of_tokens(
    loss: PPOMaxLoss, part: Rollout, denominator: Tensor
) -> Callable[[TokenStats, slice], LossOutput]:
    """The policy's loss of some tokens of a micro-batch, which is flattened once."""
    rows = loss.rows(part)
    return lambda stats, at: loss.tokens(stats, rows[at], denominator)


def _weightless(part: Rollout) -> Rollout:
    return replace(
        part,
        weights=torch.zeros_like(part.token_weights),
        state_mask=None if part.state_mask is None else torch.zeros_like(part.state_mask),
    )


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors by name and JSON data; collective where sharded."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, slots in state["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = full(value.detach()).cpu().contiguous()
            else:
                plain.setdefault(str(index), {})[name] = value
    return tensors, {"slots": plain, "groups": state["param_groups"]}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> None:
    """Load what `pack_optimizer` returned into an optimizer over the same parameters."""
    slots: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in plain["slots"].items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        slots.setdefault(int(index), {})[name] = share_of(parameters[int(index)], value)
    groups = [dict(group) for group in plain["groups"]]
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        # The implementation is this release's choice, not the checkpoint's.
        group.update({name: own[name] for name in ("fused", "foreach") if name in own})
        group["betas"] = tuple(group["betas"]) if "betas" in group else None
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
