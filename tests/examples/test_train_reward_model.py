"""`examples/train_reward_model.py`: its options, what it refuses, what it leaves."""

import json

import pytest
from transformers import LlamaForCausalLM

from mossrlhf import RewardModel, ToyWorld

WORLD = ToyWorld()


@pytest.fixture
def example(script):
    return script("examples/train_reward_model.py")


@pytest.fixture
def words(tmp_path):
    """A command line for a tiny model and a few pairs."""
    LlamaForCausalLM(WORLD.model_config(hidden_size=16, num_layers=1)).save_pretrained(
        tmp_path / "sft"
    )
    WORLD.tokenizer().save_pretrained(tmp_path / "sft")
    lines = [json.dumps(pair) + "\n" for pair in WORLD.pairs(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    return [
        f"--model_name_or_path={tmp_path / 'sft'}",
        f"--dataset={tmp_path / 'pairs.jsonl'}",
        f"--output_dir={tmp_path / 'out'}",
        "--held_out=8", "--batch_size=4", "--learning_rate=1e-3",
    ]  # fmt: skip


def test_every_option_is_explained_within_80_columns(example, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        example.main(["--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "--ensemble" in printed


@pytest.mark.parametrize(
    "more",
    [
        ["--lm_coef=1"],
        ["--lora_r=2"],
        ["--ensemble=4", "--flip=true", "--smooth=true", "--margin=true", "--centering_coef=0.01"],
    ],
)
def test_it_leaves_a_model_and_a_report(example, words, tmp_path, capsys, more):
    metrics = example.main([*words, *more])
    report = json.loads((tmp_path / "out" / "reward_report.json").read_text())
    assert report["pairs"] == 8
    assert report["accuracy"] == pytest.approx(metrics["eval_accuracy"], abs=1e-6)
    assert (tmp_path / "out" / "reward_report.png").exists()
    assert (tmp_path / "out" / "strength.json").exists() is ("--ensemble=4" in more)
    RewardModel.from_pretrained(tmp_path / "out")
    assert "of 8 pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--dataset=x.jsonl"], "needs a model"),
        (["--model_name_or_path=x"], "a JSON or JSONL file"),
        (["--flip=true"], "--ensemble: needed by --flip"),
        (["--ensemble=4"], "of no use without one"),
        (["--ensemble=3", "--flip=true"], "got 3 and 2, expected 2, 3, … models to each fold"),
        (["--ensemble=2", "--flip=true"], "got 2 and 2"),
        (["--ensemble=2", "--folds=0", "--flip=true"], "got 2 and 0"),
        (["--model_name_or_path=/no/such", "--dataset=x.jsonl"], "/no/such"),
    ],
)
def test_what_makes_no_sense_is_refused(example, given, message):
    with pytest.raises(SystemExit, match=message):
        example.main(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--dataset={}/bad.jsonl", r"bad.jsonl:2: .*skip_bad"),
        ("--lang=fr", "got 'fr', expected 'en'"),
    ],
)
def test_what_cannot_be_loaded_ends_in_a_line(example, words, tmp_path, given, message):
    good = json.dumps(WORLD.pairs(1)[0])
    (tmp_path / "bad.jsonl").write_text(f'{good}\n{{"prompt": "a"}}\n')
    with pytest.raises(SystemExit, match=message):
        example.main([*words, given.format(tmp_path)])


@pytest.mark.parametrize("count", [-5, 0, 24, 30])
def test_more_held_out_than_there_are_or_none_is_refused(example, words, count):
    with pytest.raises(SystemExit, match=f"--held_out: got {count} of 24 pairs"):
        example.main([*words, f"--held_out={count}"])
