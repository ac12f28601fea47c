"""When a run logs, evaluates, saves and stops, and which of its checkpoints is the best."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback

from mossrlhf.config import TrainerConfig


class Flow(DefaultFlowCallback):
    """Decides when to log, evaluate, save and stop, from `TrainerConfig`. Source: ours."""

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Set the wishes of an iteration."""
        step = state.global_step
        control.should_log = step == 1 or is_due(args.logging_steps, step)
        control.should_evaluate = is_due(args.eval_steps, step)
        control.should_save = is_due(args.save_steps, step)
        if step >= args.total_steps:
            control.should_training_stop = True
            control.should_log = True
        return control


def is_due(every: int | None, step: int) -> bool:
    """Whether something that happens every so many iterations happens after this one.

    Args:
        every: iterations; None for never.
        step: the iteration, from 1.

    Source: ours.
    """
    return every is not None and step % every == 0


def numbers(metrics: Any) -> dict[str, float]:
    """Return the metrics of an update as plain numbers, which is what can be written down.

    Args:
        metrics: what `Trainer.update` returned.

    Raises:
        TypeError: where it is no dict.

    Source: ours.
    """
    if not isinstance(metrics, dict):
        raise TypeError(
            f"update: returned {type(metrics).__name__}, expected a dict of metrics; an override "
            "ends with the metrics of super().update(rollout)"
        )
    return {name: float(value) for name, value in metrics.items()}


def require_measurable(args: TrainerConfig, eval_dataset: Any) -> None:
    """Refuse settings that ask for measurements nobody will take.

    Args:
        args: of the run.
        eval_dataset: of the trainer, or None.

    Raises:
        ValueError: which setting, and what to do.

    Source: ours.
    """
    if args.eval_steps is not None and eval_dataset is None:
        raise ValueError(
            f"TrainerConfig(eval_steps={args.eval_steps}): there is nothing to evaluate on; pass "
            "Trainer(eval_dataset=), or set eval_steps=None"
        )
    best = args.metric_for_best_model
    if best is not None and best.startswith("eval/") and args.eval_steps is None:
        raise ValueError(
            f"TrainerConfig(metric_for_best_model={best!r}): it is measured by evaluations, of "
            "which there are none; set eval_steps="
        )


def is_best(args: TrainerConfig, best: float | None, latest: Mapping[str, float]) -> bool:
    """Whether the latest metrics are the best so far.

    Args:
        args: with ``metric_for_best_model`` and ``greater_is_better``.
        best: the best so far, or None.
        latest: metrics of an iteration, and of its evaluation if there was one.

    Raises:
        ValueError: where there is no such metric; it names close ones.

    Source: ours.
    """
    name = args.metric_for_best_model
    if name is None:
        return False
    if name not in latest:
        if name.startswith("eval/") and not any(key.startswith("eval/") for key in latest):
            return False
        close = difflib.get_close_matches(name, latest, n=3) or sorted(latest)
        raise ValueError(
            f"TrainerConfig(metric_for_best_model={name!r}): there is no such metric; the closest "
            f"are {close}"
        )
    if math.isnan(latest[name]):
        return False  # nothing would ever be better
    if best is None:
        return True
    return latest[name] > best if args.greater_is_better else latest[name] < best
