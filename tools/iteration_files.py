"""Count the source files that one PPO iteration runs through: `python tools/iteration_files.py`.

A reader who wants to follow an iteration must open these files. Counted are files of src/mossrlhf
with a function called during one iteration of `Trainer.train` on the toy world (collect, score,
annotate, estimate, update, logging), by `sys.setprofile`.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import GenerationConfig, LlamaForCausalLM

import mossrlhf
from mossrlhf import ToyWorld, Trainer, presets

SOURCE = Path(mossrlhf.__file__).resolve().parent


def make_trainer(folder: str) -> Trainer:
    """Return README's first example, made small, with two iterations to run."""
    world = ToyWorld(lang="en")
    preset = presets.ppo_max(
        total_steps=2, rollout_size=8, minibatch_size=8, critic_pretrain_steps=0, output_dir=folder
    )
    return Trainer(
        LlamaForCausalLM(world.model_config()),
        reward=world.reward,
        train_dataset=world.prompts(16),
        processing_class=world.tokenizer(),
        generation_config=GenerationConfig(max_new_tokens=8),
        **preset,
    )


def files_of_an_iteration(trainer: Trainer) -> Counter[str]:
    """Run a trainer of two iterations; return the functions called in the second, by file."""
    called: set[tuple[str, int]] = set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(SOURCE)):
            called.add((code.co_filename, code.co_firstlineno))

    class Second(type(trainer.run)):
        """A run that is profiled from the end of its first iteration to that of its second."""

        def end_step(self, *args: Any) -> None:
            super().end_step(*args)
            sys.setprofile(profile if self.state.global_step == 1 else None)

    trainer.run.__class__ = Second
    try:
        trainer.train()
    finally:
        sys.setprofile(None)
    return Counter(str(Path(name).relative_to(SOURCE)) for name, _ in called)


def main() -> None:
    """Print the files with the number of their functions, and how many there are."""
    with tempfile.TemporaryDirectory() as folder:
        found = files_of_an_iteration(make_trainer(folder))
    for name, functions in found.most_common():
        print(f"{functions:4d}  {name}")
    lines = sum((SOURCE / name).read_text(encoding="utf-8").count("\n") for name in found)
    print(f"{len(found)} files of {lines} lines, {sum(found.values())} functions")


if __name__ == "__main__":
    main()
