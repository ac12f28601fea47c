"""What README and docs say was measured, as the figures of benchmarks/results/ say it.

Most tables are written by the script that measures, and held to it beside its other tests. Here
are the rest: numbers within sentences, and tables typed by hand. Each function of `CLAIMS` makes
of the figures the words that a page must have; where it only says "about half", it asserts that.
"""

from math import sqrt
from statistics import mean, median

import pytest

CLAIMS = {}


def claim(page, figures):
    """Registers a function from figures to words of a page."""

    def register(words):
        CLAIMS[f"{page}: {words.__name__}"] = page, figures, words
        return words

    return register


@claim("README.md", "demo")
def vanilla_ppo_at_a_lower_rate(kept):
    def said(runs):
        return [
            (f"{one['true_quality']:.2f}", f"{one['win_rate']:.0%}")
            for one in (runs[arm] for arm in ("vanilla_ppo_tuned", "ppo_max"))
        ]

    (vanilla, ours), earlier = said(kept["runs"]), said(kept["earlier run on another processor"])
    assert kept["seed"] == 0
    return [
        f"it ends at a true quality of {vanilla[0]} and wins {vanilla[1]} of its comparisons with "
        f"the SFT model, and PPO-max at {ours[0]} and {ours[1]}.",
        "gave {} and {}, and PPO-max {} and {}.".format(*earlier[0], *earlier[1]),
    ]


@claim("README.md", "ppo_iteration")
def speed_beside_two_peers(kept):
    (figures,) = kept.values()
    device, runs = figures["device"], figures["runs"]

    def middle(name, key):
        return median(run[key] for run in runs[name])

    said = {
        key: [middle(f"{shape}, TRL", of) / middle(shape, of) for shape in ("wide", "tiny")]
        for key, of in {"speed": "median", "memory": "peak_rss_mb"}.items()
    }
    ours = [figures["overhead"][shape]["iteration"] for shape in ("wide", "tiny")]
    return [
        f"On {device['name']} with {device['instructions']}, {figures['threads']} threads and",
        f"runs at {said['speed'][0]:.2f} times the speed of TRL 1.12 and "
        f'{1 / said["memory"][0]:.2f} times its memory in the shape "wide"',
        f"at {said['speed'][1]:.2f} times the speed and {1 / said['memory'][1]:.2f} times the "
        'memory in "tiny"',
        f"it takes {ours[0]:.2f} and {ours[1]:.2f} times as long as the smallest honest loop",
    ]


@claim("README.md", "ppo_memory")
def memory_of_an_update(kept):
    ours, whole = (kept["paths"][path] for path in ("kernels", "plain"))
    return [
        f"A PPO update over {ours['response_tokens']:,} tokens with a vocabulary of 151,936 peaks "
        f"at {ours['peak_above_mb'] / 1e3:.1f} GB above its models, where full logits take "
        f"{whole['peak_above_mb'] / 1e3:.1f} ("
    ]


@claim("docs/performance.md", "ppo_memory")
def two_ways_to_score(kept):
    ours, whole = (kept["paths"][path] for path in ("kernels", "plain"))
    digits = [{k: f"{v:.7g}" for k, v in one["metrics"].items()} for one in (ours, whole)]
    assert digits[0] == digits[1]
    peaks = [f"{one['peak_above_mb']:,.0f}" for one in (ours, whole)]
    held = [f"{one['gradients_and_optimizer_mb']:.0f}" for one in (ours, whole)]
    return [
        f"| hidden states, in chunks | {peaks[0]} MB | {held[0]} MB |",
        f"| full logits (`models.full_logits()`) | {peaks[1]} MB | {held[1]} MB |",
        "agree to seven digits",
        f"`{kept['command']}`",
    ]


@claim("docs/performance.md", "choices")
def what_choices_are_worth(kept):
    ms = kept["drawing"]["ms"]
    assert kept["threads"] == 1
    return [
        f"{ms['by noise'] / ms['by sums']:.1f} times as fast for {kept['drawing']['rows']} rows of "
        f"{kept['drawing']['words']:,} tokens (one",
    ]


def four_roles(kept):
    shared = [one for name, one in kept["settings"].items() if name.startswith("lora-one-base")]
    assert len(shared) == 3
    times = max(one["steady"]["measured"] / one["base_bytes"] for one in shared)
    return [f"{times:.2f} times the base's bytes"]


claim("docs/memory.md", "memory_plan")(four_roles)
claim("docs/adapters.md", "memory_plan")(four_roles)


@claim("docs/reward_modeling.md", "pair_batches")
def batches_by_tokens(kept):
    fixed, groups = kept["arms"]["fixed"], kept["arms"]["by tokens, in groups"]
    assert kept["settings"]["rounds"] == 5
    return [
        f"padding falls from {100 * fixed['padding']:.0f} % to {100 * groups['padding']:.0f} %, "
        f"and forward and backward take 1/{groups['speed']:.1f} of the time of batches of "
        f"{kept['settings']['fixed']} pairs (medians of five rounds"
    ]


@claim("docs/reward_modeling.md", "preference_noise")
def what_the_noise_took(kept):
    seeds, settings = kept["seeds"].values(), kept["settings"]

    def back(arm):
        return mean((s[arm] - s["none"]) / (s["clean"] - s["none"]) for s in seeds)

    assert back("flipping") == pytest.approx(1 / 2, abs=0.05)
    assert back("flipping in rounds") == pytest.approx(2 / 3, abs=0.02)
    assert back("smoothing") == pytest.approx(1 / 7, abs=0.01)
    assert back("margin") == pytest.approx(1 / 7, abs=0.01)
    assert max(back("smoothing"), back("margin")) < back("sooner")
    assert round(100 * (back("all three") - back("flipping in rounds"))) == 1
    assert min(seed["flipped"]["precision"] for seed in seeds) > 0.8
    assert (settings["models"], settings["folds"]) == (6, 2)
    return [
        f"flips {100 * settings['noise']:.0f} % of the labels in the toy world "
        f"({settings['pairs']:,} pairs, six models in two folds",
        "once, it recovers about half of the accuracy that the noise costs",
        "trained on the corrected labels, it recovers two thirds.",
        "is wrong more than eight times in ten",
        "alone recover a seventh, less than training half as long",
        "they add one point in a hundred",
    ]


@claim("docs/reward_modeling.md", "hh_part_two")
def no_method_gained(kept):
    seeds, count = kept["seeds"].values(), kept["settings"]["held_out"]
    plain = mean(seed["none"] for seed in seeds)
    methods = next(iter(seeds)).keys() - {"none", "agrees", "seconds"}
    assert len(methods) == 5
    gained = max(mean(seed[name] for seed in seeds) for name in methods) - plain
    assert gained < sqrt(plain * (1 - plain) / count)
    return [f"no method gained what {count} held-out pairs could tell."]


@claim("docs/real_data.md", "hh_accuracy")
def better_than_chance(kept):
    right = mean(kept[f"seed {seed}"] for seed in range(3))
    assert (right - 0.5) / sqrt(right * (1 - right) / 300) == pytest.approx(4, abs=0.5)
    assert kept["bag of words"] == pytest.approx(right, abs=sqrt(right * (1 - right) / 300))
    return [
        "better than chance by some four standard errors, and no better than a logistic regression"
    ]


@claim("docs/real_data.md", "from_pairs")
def two_runs(kept):
    rows = []
    for name, one in kept.items():
        sft, ppo, pairs = one["runs"]["SFT"], one["runs"]["ppo_max"], one["pairs"]
        rows.append(
            f"| {name} | {pairs['train']} + {pairs['held_out']} | "
            f"{one['reward_model']['accuracy']:.3f} | {sft['reward_score']:.2f} | "
            f"{ppo['reward_score']:.2f} | {ppo['kl_per_sequence']:.1f} | "
            f"{ppo['win_rate']:.0%} / {ppo['lose_rate']:.0%} | "
            f"{sft['response_length']:.0f} → {ppo['response_length']:.0f} | "
            f"{sum(one['seconds'].values()):.0f} |"
        )
    return rows


@claim("docs/real_data.md", "from_pairs")
def pairs_learned_from(kept):
    pairs = kept["harmless-base.jsonl"]["pairs"]
    return [
        f"the last {pairs['held_out']} are held out",
        f"{pairs['train']:,} are learned from",
        f"The {sum(kept['dpo_zh_demo.json']['pairs'].values())} Chinese pairs",
    ]


@claim("docs/checkpoints.md", "kill_runs")
def runs_that_were_killed(kept):
    one, two, adapters = (
        f"{kept[how]['equal']} of {kept[how]['runs']}" for how in ("1", "2", "1 with adapters")
    )
    return [f"{one} on one process, {two} on two, {adapters} with adapters"]


@claim("docs/algorithms.md", "algorithms")
def what_the_algorithms_share(kept):
    shared, own = kept["settings"]["shared"], kept["settings"]["own"]
    rates = {name: one.get("learning_rate", shared["learning_rate"]) for name, one in own.items()}
    assert rates.pop("reference_ratio") == shared["learning_rate"] / 4
    assert set(rates.values()) == {shared["learning_rate"]}
    return [
        f"{shared['total_steps']} iterations of {shared['rollout_size']} responses",
        "at one learning rate for all but `reference_ratio.py`, which takes a quarter of it",
    ]
