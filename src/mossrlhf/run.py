"""The bookkeeping of a run: counters, callbacks, console, trackers, watchers, checkpoints."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from mossrlhf.monitor import CollapseWatch, StillWatch
from mossrlhf.resume import load_checkpoint, save_checkpoint
from mossrlhf.tracking import Completions, ConsoleTable
from mossrlhf.types import Rollout

if TYPE_CHECKING:
    from mossrlhf.trainer import Trainer


class _Flow(DefaultFlowCallback):
    """Decides when to log, evaluate, save and stop, from `TrainerConfig`."""

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        def due(every: int | None) -> bool:
            return every is not None and state.global_step % every == 0

        control.should_log = state.global_step == 1 or due(args.logging_steps)
        control.should_evaluate = due(args.eval_steps)
        control.should_save = due(args.save_steps)
        if state.global_step >= args.total_steps:
            control.should_training_stop = True
            control.should_log = True
        return control


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
            [_Flow, *callbacks],
            trainer.policy,
            trainer.processing_class,
            trainer.engine.optimizers["policy"],
            trainer.engine.schedulers["policy"],
        )
        self.console = ConsoleTable()
        self.completions = Completions(trainer.output_dir / "completions.jsonl")
        self.collapse: CollapseWatch | None = None
        self.still = StillWatch(trainer.policy)
        self.clock: dict[str, float] = {}
        self.bar: tqdm | None = None
        self._fire("on_init_end")

    def _fire(self, event: str, **kwargs: Any) -> None:
        handler = getattr(self.callbacks, event)
        self.control = handler(self.args, self.state, self.control, **kwargs) or self.control

    @property
    def finished(self) -> bool:
        """Whether the run is at its end, or was asked to stop."""
        return self.control.should_training_stop or self.state.global_step >= self.args.total_steps

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
        if not self.state.global_step and not self.pretrained:
            # Processes draw from streams of their own.
            set_seed(self.args.seed + self.accelerator.process_index)
        if resume_from_checkpoint:
            load_checkpoint(self.trainer, resume_from_checkpoint)
        self.control.should_training_stop = False
        if self.collapse is None:
            variety = self.trainer.reference_distinct_2()
            self.collapse = CollapseWatch(self.args.collapse_kl, variety)
        if self.args.eval_steps is not None and self.trainer.eval_dataset is None:
            raise ValueError(
                f"TrainerConfig(eval_steps={self.args.eval_steps}): there is nothing to evaluate "
                "on; pass Trainer(eval_dataset=), or set eval_steps=None"
            )
        if self.args.report_to and not self.accelerator.trackers:
            self.accelerator.init_trackers(self.args.run_name or "mossrlhf")
        self._fire("on_train_begin")
        hidden = self.quiet or not (sys.stderr.isatty() or "ipykernel" in sys.modules)
        with (
            tqdm(
                total=self.args.total_steps,
                initial=self.state.global_step,
                desc="PPO",
                disable=hidden,
            ) as self.bar,
            self._interruptible(),
        ):
            yield
        self._fire("on_train_end")
        if self.state.global_step and self.control.should_save is not None:
            save_checkpoint(self.trainer)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C end the run after its iteration, and the second at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask_to_stop(number: int, frame: Any) -> None:
            # Not `before`: a shell starts its background jobs with interrupts ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.control.should_training_stop = True
            tqdm.write("Stopping after this iteration; press Ctrl-C again to stop at once.")

        before = signal.signal(signal.SIGINT, ask_to_stop)
        try:
            yield
        except KeyboardInterrupt:
            for optimizer in self.trainer.engine.optimizers.values():
                optimizer.zero_grad()
            self.control.should_training_stop = True
            tqdm.write(
                f"Stopped within iteration {self.state.global_step + 1}. train() goes on from here."
            )
        finally:
            signal.signal(signal.SIGINT, before)

    def timed(self, stage: Callable[..., Any], *args: Any) -> Any:
        """Run a stage and note how long it took.

        Args:
            stage: a method of the trainer.
            args: its arguments.
        """
        start = time.perf_counter()
        result = stage(*args)
        name = f"time/{getattr(stage, '__name__', 'stage')}_seconds"
        self.clock[name] = time.perf_counter() - start
        return result

    def pretraining(self, steps: int | None) -> Iterator[int]:
        """Count the iterations of the critic's warm-up that are still to come.

        Args:
            steps: how many; None for what `TrainerConfig` asks for, less what has been done.
        """
        if steps is None:
            steps = self.args.critic_pretrain_steps - self.pretrained
        hidden = self.quiet or not (sys.stderr.isatty() or "ipykernel" in sys.modules)
        for i in tqdm(range(steps), desc="critic pre-training", disable=hidden, leave=False):
            if self.control.should_training_stop:
                return
            yield i

    def end_pretraining_step(self, metrics: dict[str, float]) -> None:
        """Take note of an iteration of the critic's warm-up.

        Args:
            metrics: of it; they go to the history with a ``pretrain/step`` in place of a step.
        """
        self.pretrained += 1
        self.state.log_history.append({"pretrain/step": self.pretrained, **metrics})

    def begin_step(self) -> None:
        """Open an iteration."""
        self.clock = {}
        self._fire("on_step_begin")

    def end_step(self, rollout: Rollout, metrics: dict[str, float]) -> None:
        """Close an iteration: watch, log, evaluate, save, as it is due.

        Args:
            rollout: of the iteration.
            metrics: of the iteration.
        """
        state = self.state
        state.global_step += 1
        prompts = self.trainer.prompts
        state.epoch = prompts.position / len(prompts.dataset)
        seconds = sum(self.clock.values())
        tokens = metrics["response/length_tokens"] * self.args.rollout_size
        metrics = {
            "step": state.global_step,
            **metrics,
            **self.clock,
            "time/step_seconds": seconds,
            "time/tokens_per_second": tokens / max(seconds, 1e-9),
        }
        self._watch(metrics)
        self._fire("on_step_end")
        if self.control.should_log:
            self._log(rollout, metrics)
        if self.control.should_evaluate:
            self.evaluated(self.trainer.evaluate())
        self._save_if_due(metrics)
        if self.bar is not None:
            self.bar.update()

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
        if self.args.report_to:
            self.accelerator.log(metrics, step=self.state.global_step)
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
        self._fire("on_evaluate", metrics=metrics)
        if self.args.report_to:
            self.accelerator.log(metrics, step=self.state.global_step)
        self.control.should_evaluate = False

    def _save_if_due(self, metrics: dict[str, float]) -> None:
        name = self.args.metric_for_best_model
        evaluated = [e for e in self.state.log_history[-1:] if e.get("step") == metrics["step"]]
        latest = {**metrics, **(evaluated[0] if evaluated else {})}
        best = self.state.best_metric
        if name is not None and name in latest and (best is None or latest[name] > best):
            self.state.best_metric = latest[name]
            self.state.best_global_step = self.state.global_step
            folder = self.trainer.output_dir / f"checkpoint-{self.state.global_step}"
            self.state.best_model_checkpoint = str(folder)
            self.control.should_save = True
        if self.control.should_save:
            save_checkpoint(self.trainer)
            self._fire("on_save")
            self.control.should_save = False
