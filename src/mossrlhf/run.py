"""The bookkeeping of a run: counters, callbacks, console, trackers, watchers, checkpoints."""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from mossrlhf.callbacks import CollapseWatch, StillWatch
from mossrlhf.flow import Flow, is_best, is_due, numbers, require_measurable
from mossrlhf.interrupts import Signals
from mossrlhf.leaving import leave, leave_in_error, say_terminated, stop_at_once
from mossrlhf.logging import Completions, ConsoleTable, Trackers
from mossrlhf.processes import together
from mossrlhf.resume import load_checkpoint, save_checkpoint
from mossrlhf.retention import set_aside, sweep
from mossrlhf.rewinding import snapshot
from mossrlhf.settings import judges_of, settings_of
from mossrlhf.types import Rollout

if TYPE_CHECKING:
    from mossrlhf.trainer import Trainer


class Run:
    """What a training run keeps track of, apart from what it computes.

    Args:
        trainer: whose run it is.
        callbacks: the user's.

    Source: ours.
    """

    def __init__(self, trainer: "Trainer", callbacks: Sequence[TrainerCallback] = ()) -> None:
        self.trainer = trainer
        self.args = trainer.args
        self.accelerator = trainer.accelerator
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=self.args.total_steps,
            is_world_process_zero=self.accelerator.is_main_process,
            is_local_process_zero=self.accelerator.is_local_main_process,
        )
        self.pretrained = 0
        self.callbacks = CallbackHandler(
            [Flow, *callbacks],
            trainer.policy,
            trainer.processing_class,
            trainer.engine.optimizers["policy"],
            trainer.engine.schedulers["policy"],
        )
        self.console = ConsoleTable()
        self.trackers = Trackers(self.accelerator)
        self.completions = Completions(trainer.output_dir / "completions.jsonl")
        self.collapse: CollapseWatch | None = None
        self.still = StillWatch(trainer.model.trained_parameters("policy"))
        self.clock: dict[str, float] = {}
        self.bar: tqdm | None = None
        self.interrupted = False
        self.stopping = False
        self.between_iterations = True
        self.before: dict[str, Any] | None = None
        self.steps_before = 0
        self.folder_cleared = False
        self.settings = settings_of(trainer)
        self.judges = judges_of(trainer)
        self._fire("on_init_end")

    def _fire(self, event: str, **kwargs: Any) -> None:
        handler = getattr(self.callbacks, event)
        self.control = handler(self.args, self.state, self.control, **kwargs) or self.control

    def watches(self) -> dict[str, CollapseWatch | StillWatch]:
        """Return the watchers by name, for checkpoints."""
        found = {"collapse": self.collapse, "still": self.still}
        return {name: watch for name, watch in found.items() if watch is not None}

    @property
    def finished(self) -> bool:
        """Whether the run is at its end, or was asked to stop."""
        return self.stopping or self.state.global_step >= self.args.total_steps

    @property
    def quiet(self) -> bool:
        """Whether this process keeps the console to itself."""
        return self.args.disable_tqdm or not self.accelerator.is_local_main_process

    @contextmanager
    def session(self, resume_from_checkpoint: str | Path | bool | None) -> Iterator[None]:
        """Surround a call of `Trainer.train`: resume, watch, draw a bar, stop cleanly, save.

        Args:
            resume_from_checkpoint: as `Trainer.train` takes it.
        """
        require_measurable(self.args, self.trainer.eval_dataset)
        if not self.state.global_step and not self.pretrained:
            # Processes draw from streams of their own.
            set_seed(self.args.seed + self.accelerator.process_index)
        if self.collapse is None:
            variety = self.trainer.reference_distinct_2()
            self.collapse = CollapseWatch(self.args.collapse_kl, variety)
        if resume_from_checkpoint:
            load_checkpoint(self.trainer, resume_from_checkpoint)
            self.folder_cleared = False  # what came after that checkpoint is another run now
        self.control.should_training_stop = self.stopping = self.interrupted = False
        self.before = None
        self._clear_the_folder()
        if self.args.report_to and not self.accelerator.trackers:
            self.trackers.begin(self.args.run_name or "mossrlhf")
        self._fire("on_train_begin")
        signals = Signals(self._asked)
        try:
            with (
                self._bar("PPO", self.args.total_steps, self.state.global_step) as self.bar,
                signals.heeded(),
            ):
                yield
        except Exception as error:
            told = leave_in_error(self, error)
            if told is error:
                raise
            raise told from error
        self._fire("on_train_end")
        saved = leave(self)
        terminated = torch.tensor([float(signals.terminated)], device=self.accelerator.device)
        if bool(self.trainer.engine.reduce(terminated)):
            say_terminated(self, saved)
            signals.leave()

    def _clear_the_folder(self) -> None:
        """Move what another run, or the future of a resumed one, has left in the folder aside."""
        if self.accelerator.is_main_process and not self.folder_cleared:
            step = self.state.global_step
            sweep(self.trainer.output_dir)
            moved = set_aside(self.trainer.output_dir, step if step or self.pretrained else -1)
            self.completions.rewind(step)
            if moved is not None and not self.quiet:
                tqdm.write(f"Checkpoints of an earlier run are now in {moved}.")
        self.folder_cleared = True
        self.accelerator.wait_for_everyone()

    def _bar(self, name: str, total: int, initial: int = 0) -> tqdm:
        hidden = self.quiet or not (sys.stderr.isatty() or "ipykernel" in sys.modules)
        hidden = hidden or total == initial
        return tqdm(total=total, initial=initial, desc=name, disable=hidden, leave=name == "PPO")

    def _asked(self, number: int, at_once: bool) -> None:
        self.control.should_training_stop = self.interrupted = True
        if at_once:
            stop_at_once(self, number)
            return
        again = "press Ctrl-C" if number == signal.SIGINT else "send SIGTERM"
        tqdm.write(f"Stopping after this iteration; {again} again to stop at once.")

    def timed(self, stage: Callable[..., Any], *args: Any) -> Any:
        """Run a stage and note how long it took.

        Args:
            stage: a method of the trainer.
            args: its arguments.
        """
        start = time.perf_counter()
        name = getattr(stage, "__name__", "stage")
        # In these nobody waits for another process; one that raises would leave the others to.
        alone = name in ("collect", "score", "annotate")
        with together(self.accelerator) if alone else nullcontext():
            result = stage(*args)
        self.clock[f"time/{name}_seconds"] = time.perf_counter() - start
        return result

    def pretraining(self, steps: int | None) -> Iterator[int]:
        """Count the iterations of the critic's warm-up that are still to come.

        Args:
            steps: how many; None for what `TrainerConfig` asks for, less what has been done.
        """
        if steps is None:
            steps = self.args.critic_pretrain_steps - self.pretrained
        with self._bar("critic pre-training", steps) as bar:
            for i in range(steps):
                if self.stopping:
                    return
                self.before = snapshot(self.trainer)
                yield i
                bar.update()

    def end_pretraining_step(self, metrics: Any) -> None:
        """Take note of an iteration of the critic's warm-up.

        Args:
            metrics: of it; they go to the history with a ``pretrain/step`` in place of a step,
                and to the trackers with ``pretrain/`` before their names.
        """
        self.pretrained += 1
        self.between_iterations, self.before = True, None
        metrics = numbers(metrics)
        self.state.log_history.append({"pretrain/step": self.pretrained, **metrics})
        self._track({f"pretrain/{name}": value for name, value in metrics.items()})
        self._agree()
        if is_due(self.args.save_steps, self.pretrained):
            save_checkpoint(self.trainer)

    def begin_step(self) -> None:
        """Open an iteration."""
        self.clock = {}
        self.before = snapshot(self.trainer)
        self._fire("on_step_begin")

    def begin_update(self) -> None:
        """Say that from here on the models move."""
        self.steps_before = self.trainer.engine.steps
        self.between_iterations = False

    def end_step(self, rollout: Rollout, metrics: Any) -> None:
        """Close an iteration: watch, log, evaluate, save, as it is due.

        Args:
            rollout: of the iteration.
            metrics: of the iteration.
        """
        metrics = numbers(metrics)
        state = self.state
        state.global_step += 1
        self.between_iterations, self.before = True, None
        prompts = self.trainer.prompts
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
            self.evaluated(self.trainer.evaluate())
        self._save_if_due(metrics)
        self._agree()
        if self.bar is not None:
            self.bar.update()

    def _agree(self) -> None:
        """Let what one process was asked for (a signal, a callback's wish) hold for all of them.

        Whoever stopped, evaluated or saved alone would leave the others waiting.
        """
        wishes = ("should_training_stop", "should_evaluate", "should_save")
        flags = torch.tensor([float(getattr(self.control, wish)) for wish in wishes])
        agreed = self.trainer.engine.reduce(flags.to(self.accelerator.device)) > 0
        for wish, flag in zip(wishes, agreed.tolist(), strict=True):
            setattr(self.control, wish, flag)
        self.stopping = self.control.should_training_stop

    def _track(self, metrics: dict[str, Any]) -> None:
        if self.args.report_to:
            # Iterations of the warm-up count: some trackers drop what is not in order.
            self.trackers(metrics, self.pretrained + self.state.global_step)

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
            tokenizer = self.trainer.processing_class
            columns = {n: v.tolist() for n, v in rollout.extra.items() if n.startswith("reward/")}
            columns["length_tokens"] = rollout.response_lengths.tolist()
            self.completions(
                self.state.global_step,
                tokenizer.batch_decode(rollout.prompts()),
                tokenizer.batch_decode(rollout.completions()),
                columns,
            )
        self.control.should_log = False

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Take note of an evaluation.

        Args:
            metrics: of it.
        """
        entry = {"step": self.state.global_step, **metrics}
        self.state.log_history.append(entry)
        # Callbacks of transformers look for `metric_for_best_model` behind an "eval_".
        aliases = {f"eval_{name}": value for name, value in metrics.items()}
        self._fire("on_evaluate", metrics={**metrics, **aliases})
        self._track(metrics)
        if not self.quiet:
            self.console.evaluation(metrics)
        self.control.should_evaluate = False

    def _save_if_due(self, metrics: dict[str, float]) -> None:
        evaluated = [e for e in self.state.log_history[-1:] if e.get("step") == metrics["step"]]
        latest = {**metrics, **(evaluated[0] if evaluated else {})}
        if is_best(self.args, self.state.best_metric, latest):
            self.state.best_metric = latest[str(self.args.metric_for_best_model)]
            self.state.best_global_step = self.state.global_step
            folder = self.trainer.output_dir / f"checkpoint-{self.state.global_step}"
            self.state.best_model_checkpoint = str(folder)
            self.control.should_save = True
        if self.control.should_save:
            save_checkpoint(self.trainer)
            self._fire("on_save")
            self.control.should_save = False
