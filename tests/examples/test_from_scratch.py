"""`support.from_scratch` at the smallest size, on an invented file of pairs."""

import json
import random
import signal
import sys

import pytest
from support import from_scratch

from mossrlhf import Trainer
from mossrlhf.models import RewardModel

POLITE = ("Of course, gladly.", "Sure, here you are.", "Yes, let me help you.")
RUDE = ("No.", "Go away and leave me alone.", "What a stupid thing to ask me.")
THINGS = ("bread", "a story", "the way home", "good music", "some advice", "a new name")


@pytest.fixture
def file(tmp_path):
    rng = random.Random(0)
    lines = []
    for number in range(96):
        start = f"\n\nHuman: Give me {rng.choice(THINGS)}, number {number}.\n\nAssistant: "
        answers = {"chosen": start + rng.choice(POLITE), "rejected": start + rng.choice(RUDE)}
        lines.append(json.dumps(answers))
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def config(file, tmp_path):
    return from_scratch.ScratchConfig(
        file=str(file),
        output_dir=str(tmp_path / "run"),
        held_out=12,
        vocabulary=320,
        hidden_size=32,
        layers=1,
        language_length=64,
        pair_length=48,
        turn_length=24,
        language=from_scratch.Pace(4, 1e-2),
        sft=from_scratch.Pace(1, 1e-3),
        reward=from_scratch.Pace(4, 3e-3),
        response_length=8,
        rollout_size=8,
        steps=2,
        critic_steps=1,
    )


def test_from_scratch_writes_summary_samples_curves_and_models(config, tmp_path, capsys):
    summary = from_scratch.main(config)
    printed, bars = capsys.readouterr()
    assert bars == ""
    folder = tmp_path / "run"
    assert summary["pairs"] == {"train": 84, "held_out": 12}
    assert summary["lang"] == "en"
    assert summary["reward_model"]["accuracy"] > 0.9
    assert summary["runs"]["ppo_max"]["kl_per_sequence"] < 5
    assert summary["sft"]["perplexity"] < 320
    for name in ("curves.png", "samples.md", "policy", "critic", "sft", "reward_model"):
        assert (folder / name).exists(), name
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert json.loads((folder / "config.json").read_text())["reward"] == {
        "epochs": 4,
        "learning_rate": 3e-3,
    }
    assert RewardModel.from_pretrained(folder / "reward_model").config.hidden_size == 32
    assert summary["runs"]["ppo_max"]["steps"] == 2
    assert list(summary["runs"]) == ["SFT", "ppo_max"]
    assert summary["interrupted"] is False
    assert "Wins and losses: 12 held-out prompts, by the reward model of PPO." in printed
    assert max(map(len, printed.splitlines()[3:-2])) <= 80


class Interrupted(Trainer):
    def collect(self, prompts=None):
        signal.raise_signal(signal.SIGINT)
        return super().collect(prompts)


def test_ctrl_c_during_ppo_writes_an_interrupted_summary(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(from_scratch, "Trainer", Interrupted)
    summary = from_scratch.main(config)
    assert summary["interrupted"] is True
    assert summary["runs"]["ppo_max"]["steps"] == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert (tmp_path / "run" / "policy").exists()
    assert "INTERRUPTED; PPO iterations done:\n  ppo_max: 0 of 2\n" in capsys.readouterr().out


def test_ctrl_c_before_ppo_names_the_stage_and_keeps_finished_models(config, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(from_scratch, "train_reward", stop)
    with pytest.raises(KeyboardInterrupt, match=r"^reward_model$"):
        from_scratch.main(config)
    assert (tmp_path / "run" / "sft").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_without_matplotlib_nothing_is_trained(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(from_scratch, "read_corpus", lambda *args: pytest.fail("it begins"))
    with pytest.raises(ImportError, match=r'pip install "mossrlhf\[plot\]"'):
        from_scratch.main(config)


def test_unusable_pairs_are_counted_on_the_console(config, file, capsys):
    bad = json.dumps({"chosen": "\n\nHuman: Hi\n\nAssistant:", "rejected": "\n\nHuman: Hi"})
    file.write_text(bad + "\n" + file.read_text())
    assert len(from_scratch.read_corpus(config).train) == 84
    printed = capsys.readouterr().out
    assert " ".join(printed.split()).startswith("skipped 1 of 97 records; the first: ")
    assert "UserWarning" not in printed
