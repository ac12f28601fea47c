"""`Run`: counters, callbacks, console, trackers; when to log, evaluate, save and stop."""

import difflib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from mossrlhf.checkpoint.folders import move_later_checkpoints, sweep
from mossrlhf.checkpoint.save_load import load_checkpoint, save_checkpoint
from mossrlhf.checkpoint.state import RunState
from mossrlhf.config import TrainerConfig
from mossrlhf.distributed.processes import together
from mossrlhf.logging import Completions, ConsoleTable, Trackers
from mossrlhf.metrics import CollapseWatch, StillWatch
from mossrlhf.shutdown import (
    Signals,
    print_terminated,
    save_after_error,
    save_at_exit,
    stop_at_once,
)
from mossrlhf.types import Rollout

LOCAL_STAGES = ("collect", "score", "annotate")
"""Stages in which no process waits for another: an error of one must be passed on."""


class FlowCallback(DefaultFlowCallback):
    """Decides when to log, evaluate, save and stop, from `TrainerConfig`."""

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Set the flags after an iteration."""
        step = state.global_step
        control.should_log = step == 1 or is_due(args.logging_steps, step)
        control.should_evaluate = is_due(args.eval_steps, step)
        control.should_save = is_due(args.save_steps, step)
        if step >= args.total_steps:
            control.should_training_stop = True
            control.should_log = True
        return control


def is_due(every: int | None, step: int) -> bool:
    """Whether something done every so many iterations (None: never) is due after this one."""
    return every is not None and step % every == 0


def plain_numbers(metrics: Any) -> dict[str, float]:
    """Return the metrics of an update as floats; raise TypeError where they are no dict."""
    if not isinstance(metrics, dict):
        raise TypeError(
            f"update: returned {type(metrics).__name__}, expected a dict of metrics; an override "
            "ends with the metrics of super().update(rollout)"
        )
    return {name: float(value) for name, value in metrics.items()}


def require_measurable(args: TrainerConfig, eval_dataset: Any) -> None:
    """Raise ValueError where settings ask for evaluations that will not take place."""
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
    """Whether the latest metrics are the best so far, by ``metric_for_best_model``."""
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
        return False  # as the best it could never be beaten
    if best is None:
        return True
    return latest[name] > best if args.greater_is_better else latest[name] < best


class Run:
    """Everything about a training run but its computations.

    Args:
        run_state: the parts that the run changes, and how far it has come.
        callbacks: the user's.
        tokenizer: for the log of completions.
        eval_dataset: or None.
        evaluate: returns the metrics of an evaluation.
        reference_distinct_2: returns the variety of the reference's responses.
    """

    def __init__(
        self,
        run_state: RunState,
        callbacks: Sequence[TrainerCallback],
        tokenizer: PreTrainedTokenizerBase,
        eval_dataset: Any,
        *,
        evaluate: Callable[[], dict[str, float]],
        reference_distinct_2: Callable[[], float],
    ) -> None:
        self.run_state = run_state
        self.args, self.accelerator = run_state.args, run_state.accelerator
        engine = run_state.engine
        self.tokenizer, self.eval_dataset = tokenizer, eval_dataset
        self.evaluate, self.reference_distinct_2 = evaluate, reference_distinct_2
        self.control = TrainerControl()
        self.state.max_steps = self.args.total_steps
        self.state.is_world_process_zero = self.accelerator.is_main_process
        self.state.is_local_process_zero = self.accelerator.is_local_main_process
        self.callbacks = CallbackHandler(
            [FlowCallback, *callbacks],
            engine.bare.policy,
            tokenizer,
            engine.optimizers["policy"],
            engine.schedulers["policy"],
        )
        run_state.callbacks = self.callbacks.callbacks
        self.console = ConsoleTable()
        self.trackers = Trackers(self.accelerator)
        self.completions = Completions(run_state.output_dir / "completions.jsonl")
        self.still = StillWatch(engine.bare.trained_parameters("policy"))
        run_state.watches["still"] = self.still
        self.clock: dict[str, float] = {}
        self.bar: tqdm | None = None
        self.interrupted = False
        self.stopping = False
        self.folder_swept = False
        self._fire("on_init_end")

    @property
    def state(self) -> TrainerState:
        """Step, history and best metric, as callbacks see them."""
        return self.run_state.progress

    @property
    def collapse(self) -> CollapseWatch | None:
        """The watch for a collapsed policy; None before training has begun."""
        return self.run_state.watches.get("collapse")

    def _fire(self, event: str, **kwargs: Any) -> None:
        handler = getattr(self.callbacks, event)
        self.control = handler(self.args, self.state, self.control, **kwargs) or self.control

    @property
    def finished(self) -> bool:
        """Whether the run is at its end, or was asked to stop."""
        return self.stopping or self.state.global_step >= self.args.total_steps

    @property
    def quiet(self) -> bool:
        """Whether this process prints nothing."""
        return self.args.disable_tqdm or not self.accelerator.is_local_main_process

    @contextmanager
    def session(self, resume_from_checkpoint: str | Path | bool | None) -> Iterator[None]:
        """Surround a call of `Trainer.train`: resume, handle signals, show progress, save."""
        run_state = self.run_state
        require_measurable(self.args, self.eval_dataset)
        if not self.state.global_step and not run_state.pretrained:
            # Each process samples from its own stream.
            set_seed(self.args.seed + self.accelerator.process_index)
        if self.collapse is None:
            variety = self.reference_distinct_2()
            run_state.watches["collapse"] = CollapseWatch(self.args.collapse_kl, variety)
        if resume_from_checkpoint:
            load_checkpoint(run_state, resume_from_checkpoint)
            self.folder_swept = False  # later checkpoints belong to another run now
        self.control.should_training_stop = self.stopping = self.interrupted = False
        run_state.before = None
        self._sweep_folder()
        if self.args.report_to and not self.accelerator.trackers:
            self.trackers.begin(self.args.run_name or "mossrlhf")
        self._fire("on_train_begin")
        signals = Signals(self._on_signal)
        try:
            with (
                self._bar("PPO", self.args.total_steps, self.state.global_step) as self.bar,
                signals.handled(),
            ):
                yield
        except Exception as error:
            raised = save_after_error(run_state, error)
            if raised is error:
                raise
            raise raised from error
        self._fire("on_train_end")
        saved = save_at_exit(run_state)
        terminated = torch.tensor([float(signals.terminated)], device=self.accelerator.device)
        if bool(run_state.engine.reduce(terminated)):
            print_terminated(run_state, saved)
            signals.exit()

    def _sweep_folder(self) -> None:
        """Move what another run, or the future of a resumed one, left in the folder."""
        if self.accelerator.is_main_process and not self.folder_swept:
            folder, step = self.run_state.output_dir, self.state.global_step
            sweep(folder)
            begun = step or self.run_state.pretrained
            moved = move_later_checkpoints(folder, step if begun else -1)
            self.completions.rewind(step)
            if moved is not None and not self.quiet:
                tqdm.write(f"Checkpoints of an earlier run are now in {moved}.")
        self.folder_swept = True
        self.accelerator.wait_for_everyone()

    def _bar(self, name: str, total: int, initial: int = 0) -> tqdm:
        hidden = self.quiet or not (sys.stderr.isatty() or "ipykernel" in sys.modules)
        hidden = hidden or total == initial
        return tqdm(total=total, initial=initial, desc=name, disable=hidden, leave=name == "PPO")

    def _on_signal(self, number: int, at_once: bool) -> None:
        self.control.should_training_stop = self.interrupted = True
        if at_once:
            stop_at_once(self.run_state, number)
            return
        again = "press Ctrl-C" if number == signal.SIGINT else "send SIGTERM"
        tqdm.write(f"Stopping after this iteration; {again} again to stop at once.")

    def timed(self, stage: Callable[..., Any], *args: Any) -> Any:
        """Run a stage (a method of the trainer), and record how long it took."""
        start = time.perf_counter()
        name = getattr(stage, "__name__", "stage")
        with together(self.accelerator) if name in LOCAL_STAGES else nullcontext():
            result = stage(*args)
        self.clock[f"time/{name}_seconds"] = time.perf_counter() - start
        return result

    def pretraining(self, steps: int | None) -> Iterator[int]:
        """Count the iterations of critic warm-up; None for those of the config not yet taken."""
        if steps is None:
            steps = self.args.critic_pretrain_steps - self.run_state.pretrained
        with self._bar("critic pre-training", steps) as bar:
            for i in range(steps):
                if self.stopping:
                    return
                self.run_state.before = self.run_state.snapshot()
                yield i
                bar.update()

    def end_pretraining_step(self, metrics: Any) -> None:
        """Record an iteration of critic warm-up."""
        run_state = self.run_state
        run_state.pretrained += 1
        run_state.updating, run_state.before = False, None
        metrics = plain_numbers(metrics)
        self.state.log_history.append({"pretrain/step": run_state.pretrained, **metrics})
        self._track({f"pretrain/{name}": value for name, value in metrics.items()})
        self._agree()
        if is_due(self.args.save_steps, run_state.pretrained):
            save_checkpoint(run_state)

    def begin_step(self) -> None:
        """Open an iteration."""
        self.clock = {}
        self.run_state.before = self.run_state.snapshot()
        self._fire("on_step_begin")

    def begin_update(self) -> None:
        """Record that models change from here on."""
        self.run_state.steps_before = self.run_state.engine.steps
        self.run_state.updating = True

    def end_step(self, rollout: Rollout, metrics: Any) -> None:
        """Close an iteration: watch, log, evaluate and save as they are due."""
        metrics = plain_numbers(metrics)
        state = self.state
        state.global_step += 1
        self.run_state.updating, self.run_state.before = False, None
        prompts = self.run_state.prompts
        state.epoch = prompts.position / len(prompts.dataset)
        seconds = sum(self.clock.values())
        tokens = metrics.get("response/length_tokens", 0.0) * self.args.rollout_size
        metrics = {
            "step": state.global_step,
            **metrics,
            **self.clock,
            "time/step_seconds": seconds,
            "time/tokens_per_second": tokens / max(seconds, 1e-9),
        }
        self._watch(metrics)
        self._fire("on_step_end")
        self._agree()
        if self.control.should_log or self.stopping:
            with together(self.accelerator):
                self._log(rollout, metrics)
        if self.control.should_evaluate:
            self.evaluated(self.evaluate())
        self._save_if_due(metrics)
        self._agree()
        if self.bar is not None:
            self.bar.update()

    def _agree(self) -> None:
        """Make flags set on one process (by a signal, a callback) hold on all."""
        names = ("should_training_stop", "should_evaluate", "should_save")
        flags = torch.tensor([float(getattr(self.control, name)) for name in names])
        agreed = self.run_state.engine.reduce(flags.to(self.accelerator.device)) > 0
        for name, flag in zip(names, agreed.tolist(), strict=True):
            setattr(self.control, name, flag)
        self.stopping = self.control.should_training_stop

    def _track(self, metrics: dict[str, Any]) -> None:
        if self.args.report_to:
            # Warm-up iterations count as steps: some trackers drop what is out of order.
            self.trackers(metrics, self.run_state.pretrained + self.state.global_step)

    def _watch(self, metrics: dict[str, float]) -> None:
        rate = metrics.get("policy/learning_rate", 0.0)
        metrics["policy/moved_fraction"] = self.still(rate)
        assert self.collapse is not None
        metrics["policy/collapsed"] = float(self.collapse(metrics))
        limit = self.args.max_kl
        if limit is not None and metrics.get("kl/ref_per_sequence", 0.0) > limit:
            tqdm.write(
                f"KL to the reference {metrics['kl/ref_per_sequence']:.1f} nats per sequence is "
                f"beyond max_kl={limit:g}: stopping."
            )
            self.control.should_training_stop = True

    def _log(self, rollout: Rollout, metrics: dict[str, float]) -> None:
        self.state.log_history.append(metrics)
        self._fire("on_log", logs=metrics)
        if not self.quiet:
            self.console(metrics)
        self._track(metrics)
        if self.accelerator.is_main_process:
            columns = {n: v.tolist() for n, v in rollout.extra.items() if n.startswith("reward/")}
            columns["length_tokens"] = rollout.response_lengths.tolist()
            self.completions(
                self.state.global_step,
                self.tokenizer.batch_decode(rollout.prompts()),
                self.tokenizer.batch_decode(rollout.completions()),
                columns,
            )
        self.control.should_log = False

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Record an evaluation."""
        self.state.log_history.append({"step": self.state.global_step, **metrics})
        # Callbacks of transformers look for `metric_for_best_model` behind an "eval_".
        aliases = {f"eval_{name}": value for name, value in metrics.items()}
        self._fire("on_evaluate", metrics={**metrics, **aliases})
        self._track(metrics)
        if not self.quiet:
            self.console.evaluation(metrics)
        self.control.should_evaluate = False

    def _save_if_due(self, metrics: dict[str, float]) -> None:
        state = self.state
        evaluated = [e for e in state.log_history[-1:] if e.get("step") == metrics["step"]]
        latest = {**metrics, **(evaluated[0] if evaluated else {})}
        if is_best(self.args, state.best_metric, latest):
            state.best_metric = latest[str(self.args.metric_for_best_model)]
            state.best_global_step = state.global_step
            state.best_model_checkpoint = str(self.run_state.checkpoint)
            self.control.should_save = True
        if self.control.should_save:
            save_checkpoint(self.run_state)
            self._fire("on_save")
            self.control.should_save = False
