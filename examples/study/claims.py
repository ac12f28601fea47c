"""The kinds of claims that findings are made of.

Thresholds are the library's (a KL of 15 nats counts as collapse) or round numbers: 0.3 of score or
true quality is a fifth of their standard deviation over responses of an SFT model.
"""

from collections.abc import Callable
from dataclasses import replace
from math import log

from study.plan import LONG
from study.statistics import COLLAPSE_KL, Claim, Run, Seed

ALIKE = 0.3
NATS, RATIO, SCORE, QUALITY = "nats/response", "ln ratio", "score", "quality"


def collapses(arm: str) -> Claim:
    return Claim(
        f"KL of `{arm}` ends beyond {COLLAPSE_KL:g}",
        lambda s: s[arm].held("kl") - COLLAPSE_KL,
        NATS,
    )


def stays(arm: str) -> Claim:
    return Claim(
        f"KL of `{arm}` ends under {COLLAPSE_KL:g}",
        lambda s: COLLAPSE_KL - s[arm].held("kl"),
        NATS,
    )


def nearer(arm: str, other: str) -> Claim:
    return Claim(
        f"`{arm}` ends nearer to SFT than `{other}`",
        lambda s: s[other].log_kl - s[arm].log_kl,
        RATIO,
    )


def higher(name: str, arm: str, other: str, unit: str) -> Claim:
    label = name.replace("_", " ").replace("reward score", "score")
    return Claim(
        f"{label} of `{arm}` above `{other}`'s",
        lambda s: s[arm].held(name) - s[other].held(name),
        unit,
    )


def alike(name: str, arm: str, other: str, unit: str) -> Claim:
    label = name.replace("_", " ").replace("reward score", "score")
    text = f"{label} of `{arm}` and `{other}` within {ALIKE}"
    return replace(higher(name, arm, other, unit), text=text, within=ALIKE)


def later(arm: str, other: str) -> Claim:
    return Claim(
        f"`{arm}` passes KL {COLLAPSE_KL:g} later than `{other}`",
        lambda s: s[arm].passage - s[other].passage,
        "iterations",
    )


def above_sft(arm: str, name: str = "true_quality", sign: int = 1) -> Claim:
    label = {"true_quality": "true quality", "reward_score": "score"}[name]
    return Claim(
        f"{label} of `{arm}` ends {'above' if sign > 0 else 'below'} SFT's",
        lambda s: sign * (s[arm].held(name) - s.sft[name]),
        QUALITY if name == "true_quality" else SCORE,
    )


def ratio(text: str, arm: str, other: str, number: Callable[[Run], float]) -> Claim:
    def measure(seed: Seed) -> float:
        return log(max(number(seed[arm]), 1e-6)) - log(max(number(seed[other]), 1e-6))

    return Claim(text, measure, RATIO)


def wins(arm: str, of: str, judge: str = "") -> Claim:
    kind = {"held_out": "all", "helpful": "helpful", "harmless": "harmful"}[of]
    says = "the reward model" if judge else "the true preference"
    return Claim(
        f"`{arm}` wins more than it loses on {kind} requests, by {says}",
        lambda s: s[arm].held(f"{judge}win", of) - s[arm].held(f"{judge}lose", of),
        "share",
    )


def bias(arm: str) -> Callable[[Seed], float]:
    return lambda s: abs(s[arm].record["critic_after"]["mean_error"])


def error_before(arm: str) -> Callable[[Seed], float]:
    return lambda s: float(s[arm].record["critic_before"]["mean_absolute_error"])


def long_change(name: str) -> Callable[[Seed], float]:
    """Mean of the last tenth less that of the second tenth, when training has settled."""

    def measure(seed: Seed) -> float:
        values = seed[LONG].curve(name)
        tenth = max(1, len(values) // 10)
        early = values[tenth : 2 * tenth] or values
        return seed[LONG].last(name) - sum(early) / len(early)

    return measure
