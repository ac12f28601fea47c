"""Optimizer steps under DeepSpeed, ZeRO-2 and ZeRO-3."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from mossrlhf.config import TrainerConfig
from mossrlhf.distributed.sharding import note_hooks
from mossrlhf.loss import PPOMaxLoss
from mossrlhf.models import ActorCritic
from mossrlhf.optimization import StepOutput, TrainingEngine, unpack_optimizer
from mossrlhf.types import Rollout


def make_engine(
    model: ActorCritic, args: TrainerConfig, accelerator: Accelerator
) -> TrainingEngine:
    """Return a `TrainingEngine`, or under DeepSpeed a `ZeroEngine`."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return TrainingEngine(model, args, accelerator)
    zero = accelerator.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
    stage, offload = zero.get("stage"), (zero.get("offload_optimizer") or {}).get("device", "none")
    if stage not in (2, 3):
        raise ValueError(
            f"deepspeed: got stage {stage} of ZeRO, expected 2 or 3; without sharding, launch with "
            "a configuration of kind MULTI_GPU"
        )
    if stage == 2 and offload != "none":
        # It would lose the gradients of all but the last role's backward.
        raise ValueError(
            f"deepspeed: got ZeRO-2 with its optimizer on {offload!r}, expected 'none'; ZeRO-3 and "
            "FSDP2 can keep it there"
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            "mixed_precision: got 'fp16' under DeepSpeed, whose loss scale would have to overflow "
            "to be found, and a gradient that is not finite stops the run; expected 'bf16' or 'no'"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "model: ZeRO-3 has partitioned its parameters as it was loaded; pass its folder or hub "
            "name, or load it before the Accelerator is made, so that it can be copied and prepared"
        )
    return ZeroEngine(model, args, accelerator)


MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter."""


class ZeroEngine(TrainingEngine):
    """`TrainingEngine` under DeepSpeed: one optimizer with a group of parameters for each role.

    The schedules change the learning rates of optimizers that never step; DeepSpeed's optimizer
    copies them. Norms are clipped here, role by role: DeepSpeed would clip all at once, inside the
    step, where a gradient that is not finite can no longer stop it.
    """

    def _prepare(self) -> None:
        config = self.accelerator.deepspeed_plugin.deepspeed_config
        # DeepSpeed requires these numbers; `TrainingEngine` makes the micro-batches itself.
        config["train_micro_batch_size_per_gpu"] = 1
        config["gradient_accumulation_steps"] = 1
        config["gradient_clipping"] = 0.0
        groups = [
            {**optimizer.param_groups[0], "role": role, "skipped": False}
            for role, optimizer in self.optimizers.items()
        ]
        joint = torch.optim.AdamW(groups)
        self.model, _ = self.accelerator.prepare(self.bare, joint)
        self.zero: Any = self.model.optimizer
        note_hooks(self.bare, self.model)
        inner: torch.optim.Optimizer = self.zero.optimizer
        inner.register_step_pre_hook(_leave_out_skipped)
        self.groups: dict[str, dict[str, Any]] = {g["role"]: g for g in inner.param_groups}

    def step(
        self,
        minibatch: Rollout,
        loss: PPOMaxLoss,
        roles: Sequence[str] = ("critic", "policy"),
        ptx: Mapping[str, Tensor] | None = None,
    ) -> StepOutput:
        """Take one optimizer step, as `TrainingEngine.step` does."""
        stale: Tensor | None = getattr(self.zero, "grad_partitions_flat_buffer", None)
        if stale is not None:
            # ZeRO-3 overwrites it in a step's first backward, and only where that one reaches.
            stale.zero_()
        return super().step(minibatch, loss, roles, ptx)

    def _accumulate(
        self, last: bool, role: str, part: Any, share: Any, **extra: Any
    ) -> dict[str, Tensor]:
        # A step has one last backward, not one per role; but an optimizer kept off the device sees
        # only what a last backward has reached.
        offloads = getattr(self.zero, "offload_optimizer", False)
        boundary = last and (role == self._last_role or offloads)
        self.model.set_gradient_accumulation_boundary(boundary)
        output = self.model(role, part, share, **extra)
        self._differentiate(output.loss)
        stats: dict[str, Tensor] = output.stats
        return stats

    def _differentiate(self, share: Tensor) -> None:
        # DeepSpeed averages over processes; our shares are to be added up. Not through accelerate,
        # whose `backward` takes a step as well.
        self.model.backward(share * self.accelerator.num_processes)

    def _clip(self, roles: Sequence[str]) -> dict[str, Tensor]:
        found = {role: self._gradients(role) for role in roles if role in self.groups}
        if self.args.clip_grad_jointly:
            found = {"joint": [g for gradients in found.values() for g in gradients]}
        limit = math.inf if self.args.max_grad_norm is None else self.args.max_grad_norm
        norms = {}
        for name, gradients in found.items():
            squares = [g.detach().float().pow(2).sum() for g in gradients]
            total = torch.stack(squares).sum() if squares else torch.zeros((), device=self._device)
            dist.all_reduce(total, group=self.zero.dp_process_group)
            norm = total.sqrt()
            factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch's
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.dtype))
            norms[f"{name}/grad_norm"] = norm
        return norms

    @property
    def _device(self) -> torch.device:
        return self.accelerator.device

    def _gradients(self, role: str) -> list[Tensor]:
        """This process's share of a role's gradient; changed in place."""
        zero, index = self.zero, list(self.groups).index(role)
        if not hasattr(zero, "fp16_groups"):  # stage 2: a group is a group
            return list(zero.averaged_gradients[index])
        parts = [i for i, group in zero.sub_group_to_group_id.items() if group == index]
        if zero.offload_optimizer:
            return [zero.fp32_partitioned_groups_flat[part].grad for part in parts]
        return [gradient for part in parts for gradient in zero.averaged_gradients[part]]

    def _move(self, roles: Sequence[str]) -> None:
        for role, group in self.groups.items():
            group["lr"] = self.optimizers[role].param_groups[0]["lr"]
            group["skipped"] = role not in roles
        self.model.step()
        for role in roles:
            # torch warns of a schedule whose optimizer has not stepped; this one never does.
            self.optimizers[role]._opt_called = True  # type: ignore[attr-defined]
            self.schedulers[role].step()

    def pack(self, role: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Split a role's optimizer state as `TrainingEngine.pack` does, with the same names."""
        from deepspeed.utils import safe_get_full_optimizer_state

        carrier, tensors = self.optimizers[role], {}
        steps = [state["step"] for state in self._states(role) if "step" in state]
        if steps:
            self._link()
        for index, parameter in enumerate(carrier.param_groups[0]["params"] if steps else ()):
            tensors[f"{index}.step"] = torch.tensor(float(steps[0]))
            for name in MOMENTS:
                moment = safe_get_full_optimizer_state(parameter, name)
                tensors[f"{index}.{name}"] = moment.detach().cpu().clone()
        return tensors, {"slots": {}, "groups": carrier.state_dict()["param_groups"]}

    def unpack(self, role: str, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Load what `pack`, or `TrainingEngine.pack`, returned."""
        from deepspeed.utils import safe_set_full_optimizer_state

        carrier = self.optimizers[role]
        unpack_optimizer(carrier, {}, plain)
        if not tensors:
            return
        for flat, state in zip(self._flats(role), self._states(role), strict=True):
            state["step"] = tensors["0.step"].clone()
            for name in MOMENTS:
                state.setdefault(name, torch.zeros_like(flat))
        self._link()
        for index, parameter in enumerate(carrier.param_groups[0]["params"]):
            for name in MOMENTS:
                value = tensors[f"{index}.{name}"].to(self.accelerator.device)
                safe_set_full_optimizer_state(parameter, value, name)

    def _link(self) -> None:
        # ZeRO-2 links states after its first step, when a skipped role has none yet.
        if hasattr(self.zero, "_hp_optimizer_states_linked"):
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _flats(self, role: str) -> list[Tensor]:
        """The inner optimizer's parameters of a role: this process's flat shares."""
        zero, index = self.zero, list(self.groups).index(role)
        if not hasattr(zero, "fp16_groups"):
            return [zero.single_partition_of_fp32_groups[index]]
        parts = [i for i, group in zero.sub_group_to_group_id.items() if group == index]
        return [zero.fp32_partitioned_groups_flat[part] for part in parts]

    def _states(self, role: str) -> list[dict[str, Any]]:
        state = self.zero.optimizer.state
        return [state[flat] for flat in self._flats(role)]

    def zero_grad(self) -> None:
        """Drop all gradients, DeepSpeed's copies included."""
        self.zero.zero_grad()
        for index in list(self.zero.averaged_gradients):
            self.zero.averaged_gradients[index] = None
        super().zero_grad()


def _leave_out_skipped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # A step without a gradient would still advance Adam's count and decay its moments.
    groups = [group for group in optimizer.param_groups if not group.get("skipped")]
    if len(groups) == len(optimizer.param_groups):
        return
    everything, optimizer.param_groups = optimizer.param_groups, groups

    def restored(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        optimizer.param_groups = everything
        handle.remove()

    handle = optimizer.register_step_post_hook(restored)
