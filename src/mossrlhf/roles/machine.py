"""What the models run on, and switches that any of them has."""

import os
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, LoggerType
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from mossrlhf.config import TrainerConfig
from mossrlhf.distributed.sharding import count
from mossrlhf.models import ActorCritic, as_it_spoke
from mossrlhf.options import suggest


class OwnPrecision(Accelerator):
    """An accelerator that computes in its own precision, though a later one has another.

    Accelerate keeps one precision for the whole process.

    Args:
        args, kwargs: of ``accelerate.Accelerator``.

    Source: ours.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._own = self.mixed_precision

    def autocast(self, autocast_handler: Any = None) -> Any:
        """Return the context to compute in.

        Args:
            autocast_handler: of accelerate; None for the accelerator's.
        """
        if self.mixed_precision != self._own:
            _change_precision(self._own)
        return super().autocast(autocast_handler)


def make_accelerator(args: TrainerConfig, given: Accelerator | None = None) -> Accelerator:
    """Make the accelerator a config asks for; without `bf16` the launcher's choice holds.

    What an earlier trainer or script in this process ran in has no say.

    Args:
        args: precision, trackers, output directory, how long processes wait for each other.
        given: the user's own, to be used instead.

    Raises:
        ValueError: where several processes have begun in another precision, or were launched so
            that each takes itself for the only one; where there is no such tracker; where the
            user's own has DDP take all steps to be alike.

    Source: ours.
    """
    if given is not None:
        return _spreading_later(_in_turn(given))
    known = [str(kind) for kind in LoggerType]
    for tracker in args.report_to:
        if tracker not in known:
            raise ValueError(
                f"TrainerConfig(report_to=): got {tracker!r}, expected trackers of accelerate: "
                f"{', '.join(known)}{suggest(tracker, known)}"
            )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    wanted = "bf16" if args.bf16 else launched
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        begun = AcceleratorState()
        if begun.distributed_type != DistributedType.NO:
            raise ValueError(
                f"TrainerConfig(bf16={args.bf16}): these processes have begun to run in mixed "
                f"precision {begun.mixed_precision!r}, expected {wanted!r}, which several of them "
                "cannot change; pass accelerator= with the one they have, or start anew"
            )
        _change_precision(wanted)
    made = OwnPrecision(
        mixed_precision="bf16" if args.bf16 else None,
        log_with=list(args.report_to) or None,
        project_dir=args.output_dir,
        # Roles run in turn: the other's parameters take no part in a backward. Without the view
        # each gradient is there twice.
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=True, gradient_as_bucket_view=True
            ),
            InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout)),
        ],
    )
    launched_as = os.environ.get("WORLD_SIZE", "1")
    if "MASTER_ADDR" in os.environ and int(launched_as) != made.num_processes:
        raise ValueError(
            f"WORLD_SIZE={launched_as}: this process was launched as one of {launched_as}, and "
            f"accelerate takes it for one of {made.num_processes}; launch with `accelerate launch` "
            "(on CPUs --cpu, or ACCELERATE_USE_CPU=true)"
        )
    return _spreading_later(made)


def _in_turn(accelerator: Accelerator) -> Accelerator:
    """Have the user's own accelerator expect backwards that leave out a role's parameters.

    Otherwise DDP would wait for those and average nothing, which it notices a step too late.
    """
    handler = accelerator.ddp_handler or DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    if handler.static_graph:
        raise ValueError(
            "accelerator: got DistributedDataParallelKwargs(static_graph=True), expected False: "
            "policy and critic run in turn, and not in every step; leave it out"
        )
    handler.find_unused_parameters = True
    accelerator.ddp_handler = handler
    return accelerator


def _spreading_later(accelerator: Accelerator) -> Accelerator:
    """See to it that models are loaded whole, and that losses are computed in float32."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from transformers.integrations import unset_hf_deepspeed_config

        # Loaded in parts they could not be copied, and critic and reference are copies.
        unset_hf_deepspeed_config()
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        # Accelerate's own would round old log-probabilities, losses and gradients to bfloat16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    return accelerator


def _change_precision(wanted: str) -> None:
    # Not _reset_state(): accelerators made before share this state and would lose their device.
    AcceleratorState()._mixed_precision = wanted


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute a model's activations in the backward pass instead of keeping them.

    Args:
        model: a transformers model, with or without adapters.

    Source: ours.
    """
    # Adapters on a frozen base: without a gradient at the input there would be none at all.
    if not all(p.requires_grad for p in model.parameters()):
        model.enable_input_require_grads()  # type: ignore[operator]
    renamed = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.20
    enable: Any = renamed or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": partial(as_it_spoke, model)})


def set_switches(
    args: TrainerConfig, actor_critic: ActorCritic, ref_model: nn.Module | None
) -> None:
    """Set dropout and recomputed activations as a config asks for.

    Args:
        args: says whether.
        actor_critic: what is trained.
        ref_model: the reference; None where it is the policy.

    Source: ours.
    """
    for module in (actor_critic, ref_model):
        if module is not None and args.disable_dropout:
            disable_dropout(module)
    if args.gradient_checkpointing:
        checkpoint_activations(actor_critic.policy)
        if actor_critic.critic is not None:
            checkpoint_activations(actor_critic.critic.backbone)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to zero.

    Args:
        model: any module. Numbers called "…dropout…" count, as attention keeps its own.

    Source: ours; left on, ratios are noise from the first minibatch.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def count_parameters(module: nn.Module | None) -> str:
    """Say how large a model is, how much of it is trained, in which type and where.

    Args:
        module: any; None says so.

    Source: ours.
    """
    if module is None:
        return "none"
    parameters = list(module.parameters())
    total, trained = count(parameters), count(p for p in parameters if p.requires_grad)
    types = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    name = type(module).__name__
    return f"{name}, {total:,} parameters, {trained:,} trained, {types}, {parameters[0].device}"
