"""What befalls whole processes: forked from this one, which has imported everything already.

Writes ``results.json``: by scenario, for each process its exit code (None where it had to be
killed after `LIMIT` seconds), how long it took, and what it printed.
"""

import importlib
import json
import os
import random
import resource
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM

from mossrlhf import AdvantageEstimator, RewardModel, ToyWorld, Trainer, TrainerConfig

LIMIT = 60.0


class Waits(Trainer):
    """In its second iteration the last process says so, and waits for the parent to strike."""

    here: Path

    def annotate(self, rollout):
        """Wait before the models move."""
        done = super().annotate(rollout)
        last = self.accelerator.process_index == self.accelerator.num_processes - 1
        if self.run.state.global_step == 1 and last:
            (self.here / "waiting").write_text("")
            wait_for(lambda: (self.here / "struck").exists())
        return done


def wait_for(condition) -> None:
    """Wait for something to be so; not for ever."""
    deadline = time.monotonic() + LIMIT
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def build(folder: Path, kind: type[Trainer] = Waits, reward=None, **options) -> Trainer:
    """A trainer of tiny models."""
    world = ToyWorld()
    torch.manual_seed(0)
    policy = LlamaForCausalLM(world.model_config(hidden_size=16, num_layers=1))
    settings = dict(total_steps=3, rollout_size=8, minibatch_size=4, warmup_steps=0)
    settings |= dict(learning_rate=1e-3, critic_learning_rate=1e-3, disable_tqdm=True)
    trainer = kind(
        policy,
        reward=reward or world.reward,
        critic=RewardModel.from_language_model(policy),
        train_dataset=world.prompts(40),
        processing_class=world.tokenizer(),
        generation_config=GenerationConfig(max_new_tokens=8),
        advantage=options.pop("advantage", None),
        args=TrainerConfig(output_dir=str(folder / "run"), **{**settings, **options}),
    )
    trainer.here = folder
    return trainer


def sigterm(folder: Path) -> None:
    """Told to end in its second iteration."""
    build(folder).train()
    (folder / "after").write_text("train() returned")


def full_disk(folder: Path) -> None:
    """No file may grow beyond what the first checkpoint needed."""

    class Fills(Trainer):
        def collect(self, prompts=None):
            if self.run.state.global_step == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            return super().collect(prompts)

    build(folder, Fills, save_steps=1).train()


def judge(fails_in: int = 0):
    """A reward that raises at a call of its, on process 1 alone."""
    world, calls = ToyWorld(), []

    def judged(**arguments):
        calls.append(0)
        if len(calls) == fails_in and os.environ["RANK"] == "1":
            raise ConnectionError("the judge is out")
        return [score + random.random() for score in world.reward(**arguments)]

    return judged


def reward_raises(folder: Path) -> None:
    """On process 1 alone, in the second iteration."""
    build(folder, Trainer, judge(2)).train()


def resumed(folder: Path) -> None:
    """Goes on from what `reward_raises` has left."""
    build(folder, Trainer, judge()).train(folder.parent / "reward_raises/run/checkpoint-1")


def whole(folder: Path) -> None:
    """What neither of the two would have been without the fault."""
    build(folder, Trainer, judge()).train()


def raises_alone(folder: Path) -> None:
    """Process 1, where the other already waits for it."""

    class Fails(Trainer):
        def estimate(self, rollout):
            if self.run.state.global_step == 1 and self.accelerator.process_index == 1:
                raise LookupError("only here")
            return super().estimate(rollout)

    build(folder, Fails, save_steps=1).train()


def killed(folder: Path) -> None:
    """Process 1 is killed in its second iteration."""
    build(folder, save_steps=1).train()


def stopped(folder: Path) -> None:
    """Process 1 stops to answer in its second iteration."""
    build(folder, save_steps=1, ddp_timeout=6.0).train()


def not_finite(folder: Path) -> None:
    """One sample of process 1 has an infinite advantage in the second iteration."""
    calls = []

    def estimate(rewards, values, mask):
        done = AdvantageEstimator()(rewards, values, mask)
        calls.append(0)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            done.advantages[2, 0] = torch.inf
        return done

    build(folder, Trainer, advantage=estimate, minibatch_size=8).train()


def one_is_told(folder: Path) -> None:
    """SIGTERM reaches process 1 alone."""
    build(folder).train()


def cannot_save(folder: Path) -> None:
    """Process 0, which writes, cannot."""
    from mossrlhf import serialization as checkpoint

    trainer = build(folder, Trainer, save_steps=2)

    def full(tensors, path):
        raise OSError(28, "No space left on device")

    checkpoint.save_file = full
    trainer.train()


SCENARIOS = {
    "sigterm": (sigterm, 1, [signal.SIGTERM]),
    "sigterm_twice": (sigterm, 1, [signal.SIGTERM, signal.SIGTERM]),
    "full_disk": (full_disk, 1, []),
    "reward_raises": (reward_raises, 2, []),
    "resumed": (resumed, 2, []),
    "whole": (whole, 2, []),
    "raises_alone": (raises_alone, 2, []),
    "killed": (killed, 2, [signal.SIGKILL]),
    "stopped": (stopped, 2, [signal.SIGSTOP]),
    "not_finite": (not_finite, 2, []),
    "one_is_told": (one_is_told, 2, [signal.SIGTERM]),
    "cannot_save": (cannot_save, 2, []),
}
"""By name: what a process does, how many there are, and the signals that the last of them gets."""


AS_SCRIPTS = ("sigterm", "killed")
"""Those whose processes end as the interpreter does, which takes seconds where it was forked, and
with gloo's threads now and then aborts it."""


def spawn(name: str, rank: int, port: int, folder: Path) -> int:
    """Fork a process, which acts and ends."""
    act, processes, _ = SCENARIOS[name]
    pid = os.fork()
    if pid:
        return pid
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if processes > 1:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if name in AS_SCRIPTS:
        act(folder)
        raise SystemExit(0)
    try:
        act(folder)
    except SystemExit as end:
        os._exit(end.code)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def free_port() -> int:
    """A port nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def strike(pid: int, signals: list[int], folder: Path, output: Path) -> None:
    """Send signals once the process is in its second iteration, each when the last was heard."""
    wait_for(lambda: (folder / "waiting").exists())
    for number in signals:
        os.kill(pid, number)
        if number == signal.SIGTERM:
            wait_for(lambda: "Stopping" in output.read_text())
    (folder / "struck").write_text("")


def play(name: str, folder: Path) -> list[dict]:
    """Run a scenario, and say how its processes ended."""
    folder.mkdir()
    _, processes, signals = SCENARIOS[name]
    port = free_port()
    pids = [spawn(name, rank, port, folder) for rank in range(processes)]
    if signals:
        strike(pids[-1], signals, folder, folder / f"output-{processes - 1}")
    began = time.monotonic()
    ended: dict[int, dict] = {}
    while len(ended) < processes:
        late = time.monotonic() - began > LIMIT
        for rank in set(range(processes)) - set(ended):
            # Whoever was stopped for good never ends by itself.
            if late or (name == "stopped" and ended):
                os.kill(pids[rank], signal.SIGKILL)
            if (status := os.waitpid(pids[rank], os.WNOHANG))[0]:
                code = None if late else os.waitstatus_to_exitcode(status[1])
                ended[rank] = dict(code=code, seconds=time.monotonic() - began)
        time.sleep(0.01)
    for rank, row in ended.items():
        row["output"] = (folder / f"output-{rank}").read_text()
    return [ended[rank] for rank in range(processes)]


def main(folder: Path, names: list[str]) -> None:
    """Run scenarios one after the other."""
    with suppress(ImportError):  # or every process would import it for itself
        importlib.import_module("deepspeed")
    results = {name: play(name, folder / name) for name in names or SCENARIOS}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
