"""The accelerator of a run, and errors of one process that reach the others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, LoggerType, gather_object
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy

from mossrlhf.config import TrainerConfig
from mossrlhf.options import suggest


class PeerError(RuntimeError):
    """Another process has failed, or is gone; this one is well, and stops with it."""


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Pass an exception within the block on to all processes, which otherwise would hang.

    All processes reach the end of the block, so nothing within it may be collective.
    """
    if accelerator.num_processes == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    try:
        raised = _exchange(accelerator, own)
    except Exception:
        if own is not None:
            raise own from None  # the cause; that the others are gone matters less
        raise
    if own is not None:
        raise on_all(own)
    if raised:
        raise on_all(PeerError(f"this process stops, since {raised[0]}"))


def on_all(error: Exception) -> Exception:
    """Mark an exception as raised by all processes at this point, and return it."""
    error.__dict__["on_all_processes"] = True
    return error


def is_shared(error: Exception) -> bool:
    """Whether all processes raised at this point, so that they can still act together."""
    return bool(error.__dict__.get("on_all_processes", False))


def is_loss_of_a_peer(error: BaseException) -> bool:
    """Whether an exception of a collective operation means that another process is gone."""
    kinds = (distributed.DistBackendError, distributed.DistNetworkError)
    if isinstance(error, kinds) and distributed.is_initialized():
        return True
    said = str(error)  # gloo raises plain RuntimeErrors
    return isinstance(error, RuntimeError) and any(
        words in said
        for words in ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
    )


def _exchange(accelerator: Accelerator, own: Exception | None) -> list[str]:
    """Gather what processes raised, in their order; nothing is pickled where none did."""
    flag = torch.tensor([float(own is not None)], device=accelerator.device)
    if not float(accelerator.reduce(flag, reduction="sum")):
        return []
    index = accelerator.process_index
    told = None if own is None else f"process {index} raised {type(own).__name__}: {own}"
    return [said for said in gather_object([told]) if said is not None]


class OwnPrecision(Accelerator):
    """An accelerator that keeps its precision when a later one in the process has another."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._own = self.mixed_precision

    def autocast(self, autocast_handler: Any = None) -> Any:
        """Return the context to compute in."""
        if self.mixed_precision != self._own:
            _change_precision(self._own)
        return super().autocast(autocast_handler)


def make_accelerator(args: TrainerConfig, given: Accelerator | None = None) -> Accelerator:
    """Return the user's accelerator, or make one; its precision is `bf16` or the launcher's."""
    if given is not None:
        return _adapt(_require_roles_in_turn(given))
    known = [str(kind) for kind in LoggerType]
    for tracker in args.report_to:
        if tracker not in known:
            raise ValueError(
                f"TrainerConfig(report_to=): got {tracker!r}, expected trackers of accelerate: "
                f"{', '.join(known)}{suggest(tracker, known)}"
            )
    # What an earlier trainer or script in this process ran in does not count.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    wanted = "bf16" if args.bf16 else launched
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        begun = AcceleratorState()
        if begun.distributed_type != DistributedType.NO:
            raise ValueError(
                f"TrainerConfig(bf16={args.bf16}): these processes have begun to run in mixed "
                f"precision {begun.mixed_precision!r}, expected {wanted!r}, which several of them "
                "cannot change; pass accelerator= with the one they have, or start again"
            )
        _change_precision(wanted)
    made = OwnPrecision(
        mixed_precision="bf16" if args.bf16 else None,
        log_with=list(args.report_to) or None,
        project_dir=args.output_dir,
        # Roles run in turn: the other's parameters take no part in a backward. Without the view
        # each gradient would be stored twice.
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
    return _adapt(made)


def _require_roles_in_turn(accelerator: Accelerator) -> Accelerator:
    """Have the user's own accelerator expect backwards that leave out a role's parameters."""
    # Otherwise DDP would wait for those and average nothing, which it notices a step too late.
    handler = accelerator.ddp_handler or DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    if handler.static_graph:
        raise ValueError(
            "accelerator: got DistributedDataParallelKwargs(static_graph=True), expected False: "
            "policy and critic run in turn, and not in every step; leave it out"
        )
    handler.find_unused_parameters = True
    accelerator.ddp_handler = handler
    return accelerator


def _adapt(accelerator: Accelerator) -> Accelerator:
    """Have models loaded whole, and losses computed in float32."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from transformers.integrations import unset_hf_deepspeed_config

        # Critic and reference are copies, and models loaded in parts cannot be copied.
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
