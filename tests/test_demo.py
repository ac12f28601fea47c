"""`mossrlhf.demo` at a few steps: its files, its figures, Ctrl-C, and its parts."""

import json
import signal
import sys
from dataclasses import replace

import pytest

from mossrlhf import Trainer, demo
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
    "steps",
}


@pytest.fixture
def small(monkeypatch):
    """A world with few examples, so that a run takes seconds; the code is the same."""
    monkeypatch.setattr(demo, "EXAMPLES", 64)
    monkeypatch.setattr(demo, "PAIRS", 64)
    monkeypatch.setattr(demo, "PRETRAIN_STEPS", 1)
    monkeypatch.setattr(demo, "held_out", lambda world: world.prompts(24, split="eval", seed=3))
    monkeypatch.setattr(
        ToyWorld,
        "model_config",
        lambda self, original=ToyWorld.model_config: original(self, hidden_size=16, num_layers=1),
    )


def test_demo_writes_summary_samples_curves_and_models(small, tmp_path, capsys):
    summary = demo.main(demo.DemoConfig(output_dir=str(tmp_path), steps=2))
    written = {path.name for path in tmp_path.iterdir()}
    assert {"policy", "critic", "reward_model", "config.json"} <= written
    assert {"curves.png", "samples.md", "summary.json"} <= written
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert set(summary) == {
        "seed",
        "lang",
        "interrupted",
        "sft",
        "reward_model",
        "runs",
        "seconds",
        "versions",
    }
    assert set(summary["sft"]) == {"true_quality", "ended", "well_formed"}
    assert tuple(summary["runs"]) == ARMS
    assert all(set(run) == FIGURES for run in summary["runs"].values())
    assert [run["steps"] for run in summary["runs"].values()] == [2, 2, 2]
    assert summary["interrupted"] is False
    printed, bars = capsys.readouterr()
    assert bars == ""
    assert max(map(len, printed.splitlines()[:-2])) <= 80
    assert "right on" in printed
    assert "INTERRUPTED" not in printed
    page = (tmp_path / "samples.md").read_text(encoding="utf-8")
    assert page.startswith("# Samples: the toy world, en, seed 0\n\n12 of the 24 held-out")
    assert page.count("**SFT**") == page.count("**ppo_max**") == 12


def test_true_preference_trains_nothing(small, tmp_path, monkeypatch):
    def run(folder):
        config = demo.DemoConfig(output_dir=str(tmp_path / folder), steps=2, arms=("ppo_max",))
        return demo.main(config)["runs"]["ppo_max"]

    score = run("true")["reward_score"]
    monkeypatch.setattr(
        ToyWorld, "reward", lambda self, *, completions, **_: [7.0] * len(completions)
    )
    found = run("false")
    assert found["true_quality"] == 7.0
    assert found["reward_score"] == score


def test_arms_differ_in_components_and_learning_rate(tmp_path):
    options = dict(output_dir=str(tmp_path), learning_rate=1.0)
    vanilla, maximal = demo.parts("vanilla_ppo", **options), demo.parts("ppo_max", **options)
    assert vanilla["shaper"].kl_coef is None
    assert vanilla["loss"].value_clip is None
    assert maximal["shaper"].normalize
    assert maximal["args"].critic_pretrain_steps == demo.PRETRAIN_STEPS
    same = replace(
        maximal["args"],
        critic_pretrain_steps=0,
        max_grad_norm=vanilla["args"].max_grad_norm,
    )
    assert same == replace(vanilla["args"])
    rates = demo.LEARNING_RATES
    assert rates["vanilla_ppo"] == rates["ppo_max"] > rates["vanilla_ppo_tuned"]


class Interrupted(Trainer):
    """Ctrl-C comes in the second iteration, or in the critic's warm-up where there is one."""

    def estimate(self, rollout):
        if self.run.state.global_step == 1 or self.args.critic_pretrain_steps:
            signal.raise_signal(signal.SIGINT)
        return super().estimate(rollout)


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def test_ctrl_c_ends_the_arm_and_starts_no_other(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "Trainer", Interrupted)
    summary = demo.main(demo.DemoConfig(output_dir=str(tmp_path), steps=5))
    assert summary["interrupted"] is True
    assert set(summary["runs"]) == {"vanilla_ppo"}
    assert set(summary["runs"]["vanilla_ppo"]) == FIGURES
    assert summary["runs"]["vanilla_ppo"]["steps"] == 2
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "curves.png").exists()
    assert "**vanilla_ppo**" in (tmp_path / "samples.md").read_text()
    printed = capsys.readouterr().out
    assert (
        "\nINTERRUPTED; PPO iterations done:\n"
        "  vanilla_ppo: 2 of 5\n  vanilla_ppo_tuned: 0 of 5\n  ppo_max: 0 of 5\n" in printed
    )
    assert f"{tmp_path}/: curves.png, samples.md, summary.json, reward_model/\n" in printed


def test_ctrl_c_before_the_first_iteration_leaves_no_curves(small, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "Trainer", Interrupted)
    summary = demo.main(demo.DemoConfig(output_dir=str(tmp_path), steps=5, arms=("ppo_max",)))
    assert summary["interrupted"] is True
    assert summary["runs"]["ppo_max"]["steps"] == 0
    assert summary["runs"]["ppo_max"]["kl_per_sequence"] == pytest.approx(0, abs=1e-4)
    assert not (tmp_path / "curves.png").exists()


def test_ctrl_c_while_measuring_writes_the_iterations(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "measure", stop)
    summary = demo.main(demo.DemoConfig(output_dir=str(tmp_path), steps=1))
    assert summary["interrupted"] is True
    assert summary["runs"] == {"vanilla_ppo": {"steps": 1}}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "curves.png").exists()
    assert "true quality  " not in capsys.readouterr().out


def test_ctrl_c_before_the_arms_names_the_stage_and_leaves_no_older_report(
    small, tmp_path, monkeypatch
):
    (tmp_path / "summary.json").write_text("of an earlier run")
    monkeypatch.setattr(demo, "train_reward_model", stop)
    with pytest.raises(KeyboardInterrupt, match=r"^reward_model$"):
        demo.main(demo.DemoConfig(output_dir=str(tmp_path), steps=1))
    assert [path.name for path in tmp_path.glob("*.*")] == ["config.json"]


def test_without_matplotlib_nothing_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(demo, "prepare", lambda *args: pytest.fail("it trains"))
    with pytest.raises(ImportError, match=r'pip install "mossrlhf\[plot\]"'):
        demo.main(demo.DemoConfig(output_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("Once upon", "Once upon"),
        ([{"role": "user", "content": "Hi"}], "Hi"),
        (
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "System: Be brief.\n\nHuman: Hi",
        ),
        (
            [{"role": "user", "content": "2+2"}, {"role": "tool", "content": "4"}],
            "Human: 2+2\n\ntool: 4",
        ),
    ],
)
def test_prompt_text_names_the_speakers_of_a_dialogue(prompt, text):
    assert demo.prompt_text(prompt) == text


def test_samples_quote_every_line(tmp_path):
    samples = [("a\nb", {"policy": "", "reference": "c"})]
    demo.write_samples(tmp_path / "page.md", "T", "Lead.", samples)
    head = "# T\n\nLead.\n\n## Prompt 1\n\n> a\n> b\n\n"
    responses = "**policy**\n\n> (empty)\n\n**reference**\n\n> c\n"
    assert (tmp_path / "page.md").read_text() == head + responses
