"""The plan: worlds, arms, learning rates and seeds, all fixed before the first run."""

from collections.abc import Sequence
from dataclasses import dataclass

BASE = 1e-3
"""Learning rate of policy and critic in every arm, that of `make demo`."""

GENTLE = BASE / 3
"""The second rate, at which some arms are run again: a small step can hide a collapse."""

SEEDS = (100, 101, 102, 103, 104)
"""Of the worlds. None of them was looked at while library or study were written."""

LONG = "ppo_max_long"
IN_CHINESE = ("vanilla", "kl_0.05", "kl_0.1", "kl_0.2", "ppo_max", LONG)
"""Arms of F1, F4, F11 and F12."""

TWO_RATES = ("vanilla", "reward_clip_0.3", "kl_0.05", "importance", "entropy_target", "ppo_max")
"""Arms that are run at `GENTLE` as well."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of the study.

    Args:
        seeds: of the English worlds.
        long_seeds: of those that F11 is run in.
        chinese: of the Chinese worlds.
        examples: demonstrations for the SFT model.
        pairs: noisy pairs for the reward model.
        steps: PPO iterations of an arm.
        long_steps: of F11.
        pretrain: iterations of critic warm-up, if an arm has one.
        rollout: responses per iteration.
        minibatch: responses per optimizer step.
        held_out: prompts for the evaluation.
        states: prompts for the evaluation of a critic, with four states each.
        continuations: sampled from each of those states.
        log: iterations between points of a curve.
        long_log: those of F11.
    """

    seeds: Sequence[int] = SEEDS
    long_seeds: Sequence[int] = SEEDS[:3]
    chinese: Sequence[int] = SEEDS[:1]
    examples: int = 8000
    pairs: int = 4000
    steps: int = 100
    long_steps: int = 2500
    pretrain: int = 10
    rollout: int = 64
    minibatch: int = 16
    held_out: int = 300
    states: int = 32
    continuations: int = 16
    log: int = 2
    long_log: int = 20


QUICK = Scale(
    seeds=SEEDS[:1], long_seeds=SEEDS[:1], chinese=(), examples=256, pairs=128, steps=3,
    long_steps=4, pretrain=1, rollout=8, minibatch=4, held_out=12, states=2, continuations=2,
    log=1, long_log=1,
)  # fmt: skip
"""Shows that everything runs; says nothing about PPO."""


@dataclass(frozen=True)
class World:
    """A toy world, its SFT model and its reward model.

    Args:
        lang: "en" or "zh".
        seed: of all three.
    """

    lang: str
    seed: int

    def __str__(self) -> str:
        return f"{self.lang}{self.seed}"


@dataclass(frozen=True)
class Job:
    """One run of PPO.

    Args:
        world: the world of the run.
        arm: a name in `arms.ARMS`.
        gentle: whether to use the second learning rate.
        steps: PPO iterations.
        log: iterations between points of the curves.
    """

    world: World
    arm: str
    gentle: bool
    steps: int
    log: int

    @property
    def name(self) -> str:
        """Name of the arm, marked at the second rate."""
        return f"{self.arm}@gentle" if self.gentle else self.arm

    @property
    def rate(self) -> float:
        """The learning rate."""
        return GENTLE if self.gentle else BASE


def worlds(scale: Scale) -> list[World]:
    """Return all worlds.

    Args:
        scale: sizes, with the seeds.
    """
    named = dict.fromkeys([*scale.seeds, *scale.long_seeds])
    return [World("en", s) for s in named] + [World("zh", s) for s in scale.chinese]


def jobs(scale: Scale, arms: Sequence[str]) -> list[Job]:
    """Return all runs, the longest first.

    Args:
        scale: sizes of the study.
        arms: the names of all.
    """
    made = []
    for world in worlds(scale):
        for arm in arms if world.lang == "en" else IN_CHINESE:
            if arm != LONG:
                made.append(Job(world, arm, False, scale.steps, scale.log))
            elif world.seed in scale.long_seeds:
                made.append(Job(world, arm, False, scale.long_steps, scale.long_log))
        if world.lang == "en":
            made += [Job(world, arm, True, scale.steps, scale.log) for arm in TWO_RATES]
    return sorted(made, key=lambda job: -job.steps)
