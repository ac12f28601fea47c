"""The main job, a few steps of it: everything it promises to write is there."""

import json
from dataclasses import replace

import pytest

from mossrlhf import cli
from mossrlhf.recipes import toy
from mossrlhf.toyworld import ToyWorld

ARMS = ("vanilla_ppo", "vanilla_ppo_tuned", "ppo_max")
FIGURES = {
    "reward_score",
    "true_quality",
    "kl_per_sequence",
    "response_length",
    "perplexity_policy",
    "perplexity_sft",
    "win_rate",
    "lose_rate",
    "collapsed",
}


@pytest.fixture
def small(monkeypatch):
    """A world with few examples, so that a run takes seconds; the code is the same."""
    monkeypatch.setattr(toy, "EXAMPLES", 64)
    monkeypatch.setattr(toy, "PAIRS", 64)
    monkeypatch.setattr(toy, "PRETRAIN_STEPS", 1)
    monkeypatch.setattr(
        ToyWorld,
        "model_config",
        lambda self, original=ToyWorld.model_config: original(self, hidden_size=16, num_layers=1),
    )


def test_main_job_writes_what_it_promises(small, tmp_path, capsys):
    summary = toy.main(toy.ToyConfig(output_dir=str(tmp_path), steps=2))
    written = {path.name for path in tmp_path.iterdir()}
    assert {"policy", "critic", "reward_model", "config.json"} <= written
    assert {"curves.png", "samples.md", "summary.json"} <= written
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert set(summary) == {
        "seed",
        "lang",
        "sft",
        "reward_model",
        "runs",
        "seconds",
        "versions",
    }
    assert set(summary["sft"]) == {"true_quality", "ended", "well_formed"}
    assert tuple(summary["runs"]) == ARMS
    assert all(set(run) == FIGURES for run in summary["runs"].values())
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-2])) <= 80
    assert "right on" in printed


def test_true_preference_trains_nothing(small, tmp_path, monkeypatch):
    def run(folder, name):
        config = toy.ToyConfig(output_dir=str(tmp_path / folder), steps=2, arms=("ppo_max",))
        return toy.main(config)["runs"]["ppo_max"][name]

    score = run("true", "reward_score")
    monkeypatch.setattr(
        ToyWorld, "reward", lambda self, *, completions, **_: [7.0] * len(completions)
    )
    assert run("false", "true_quality") == 7.0
    assert run("again", "reward_score") == score


def test_arms_differ_in_what_they_are_named_for(tmp_path):
    options = dict(output_dir=str(tmp_path), learning_rate=1.0)
    vanilla, maximal = toy.parts("vanilla_ppo", options), toy.parts("ppo_max", options)
    assert vanilla["shaper"].kl_coef is None
    assert vanilla["loss"].value_clip is None
    assert maximal["shaper"].normalize
    assert maximal["args"].critic_pretrain_steps == toy.PRETRAIN_STEPS
    same = replace(
        maximal["args"],
        critic_pretrain_steps=0,
        max_grad_norm=vanilla["args"].max_grad_norm,
    )
    assert same == replace(vanilla["args"])
    assert toy.rate("vanilla_ppo") == toy.rate("ppo_max") > toy.rate("vanilla_ppo_tuned")


def test_command_line(monkeypatch):
    asked = []
    monkeypatch.setattr(toy, "main", asked.append)
    cli.main(["demo", "--lang", "zh", "--seed", "3", "--output_dir", "x"])
    assert asked == [toy.ToyConfig(lang="zh", seed=3, output_dir="x")]
