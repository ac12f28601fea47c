"""`examples/ppo_llama.py`: its options, what it refuses, what it trains, how it ends."""

import importlib.util
import signal
import sys
from dataclasses import fields

import pytest
from transformers import LlamaForCausalLM

from mossrlhf import ToyWorld, Trainer, presets
from mossrlhf.recipes import scratch, toy
from mossrlhf.recipes.options import help_texts

WORLD = ToyWorld(lang="en", seed=0)
TINY = "--total_steps 2 --rollout_size 8 --minibatch_size 4 --critic_pretrain_steps 1"


@pytest.fixture
def example(root, monkeypatch):
    spec = importlib.util.spec_from_file_location("ppo_llama", root / "examples" / "ppo_llama.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ppo_llama", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def words(tmp_path):
    """A command line for a tiny model, a function as reward and a few prompts."""
    model = LlamaForCausalLM(WORLD.model_config(hidden_size=16, num_layers=1))
    model.save_pretrained(tmp_path / "sft")
    WORLD.tokenizer().save_pretrained(tmp_path / "sft")
    (tmp_path / "rewards.py").write_text(
        "def brevity(completion_ids, **columns):\n    return [-len(i) for i in completion_ids]\n"
    )
    prompts = [record["prompt"][-1]["content"] for record in WORLD.prompts(12)]
    lines = [f'{{"prompt": "{prompt}"}}\n' for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    return [
        f"--model_name_or_path={tmp_path / 'sft'}",
        f"--reward={tmp_path / 'rewards.py'}:brevity",
        f"--dataset={tmp_path / 'prompts.jsonl'}",
        f"--output_dir={tmp_path / 'run'}",
        "--max_new_tokens=6",
        *TINY.split(),
    ]


def message(ended):
    return str(ended.value.code)


def test_every_option_is_explained_within_80_columns(example, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        example.main(["--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for kind in (example.Inputs, example.Algorithm, example.Sampling, example.TrainerConfig):
        assert {spec.name for spec in fields(kind)} <= set(help_texts(kind)), kind
    assert "--critic_pretrain_steps N" in printed
    assert "step 1 [50]" in printed


def test_defaults_are_those_of_ppo_max(example):
    inputs, algorithm, sampling, args, given = example.parse([])
    parts = presets.ppo_max()
    assert given == {}
    assert args == parts["args"]
    assert (algorithm.kl_coef, algorithm.reward_clip) == (
        parts["shaper"].kl_coef,
        parts["shaper"].clip,
    )
    assert (algorithm.gamma, algorithm.lam) == (parts["advantage"].gamma, parts["advantage"].lam)
    loss = parts["loss"]
    assert (algorithm.policy_clip, algorithm.value_clip) == (loss.policy_clip, loss.value_clip)
    assert algorithm.ptx_coef is loss.ptx_coef
    assert sampling.lora_r is inputs.dataset is None


def test_options_reach_their_parts(example, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 5e-6\nbf16: true\nvalue_clip: null\ntop_p: 0.9\n")
    words = [f"--config={path}", "--bf16=false", "--lam=1", "--dataset", "x.json"]
    inputs, algorithm, sampling, args, given = example.parse(words)
    assert (args.learning_rate, args.bf16, algorithm.value_clip) == (5e-6, False, None)
    assert (sampling.top_p, algorithm.lam, inputs.dataset) == (0.9, 1.0, "x.json")
    assert set(given) == {"learning_rate", "bf16", "value_clip", "top_p", "lam", "dataset"}


def test_impossible_numbers_are_refused_with_their_reason(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--total_steps", "-1"])
    assert "error: TrainerConfig(total_steps=): got -1, expected" in capsys.readouterr().err


def test_toy_world_and_pairs_get_their_options(example, monkeypatch):
    asked = []
    for recipe in (toy, scratch):
        monkeypatch.setattr(recipe, "main", lambda c: asked.append(c) or {"interrupted": False})
    example.main(["--lang", "zh", "--output_dir=x"])
    example.main(["--train_from_scratch", "pairs.jsonl", "--seed=3"])
    assert asked == [
        toy.ToyConfig(lang="zh", output_dir="x"),
        scratch.ScratchConfig(file="pairs.jsonl", seed=3),
    ]


@pytest.mark.parametrize(
    "words",
    ["--no_disable_dropout", "--bf16", "--config=FILE", "--config FILE", "--learning-rate 1"],
)
@pytest.mark.parametrize("mode", ["", "--train_from_scratch pairs.jsonl "])
def test_options_that_nothing_would_read_are_refused(example, tmp_path, mode, words):
    (tmp_path / "run.yaml").write_text("total_steps: 3\n")
    words = words.replace("FILE", str(tmp_path / "run.yaml"))
    with pytest.raises(SystemExit, match="nothing would read that"):
        example.main((mode + words).split())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--reward r.py:f", "--dataset: a JSON or JSONL file of prompts"),
        ("--dataset p.json", "give one of --reward_model_path and --reward"),
        ("--dataset p.json --reward a.py:b --ptx_dataset p.json", "are of use together only"),
        ("--dataset p.json --reward nothing", "--reward: 'nothing' is not file.py:function"),
    ],
)
def test_missing_parts_are_refused_before_a_model_is_loaded(example, words, reason):
    with pytest.raises(SystemExit) as ended:
        example.main(["--model_name_or_path", "nowhere", *words.split()])
    assert reason in message(ended)


@pytest.mark.parametrize("words", [[], ["--train_from_scratch", "pairs.jsonl"]])
def test_recipes_without_matplotlib_say_what_to_install(example, monkeypatch, words):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as ended:
        example.main(words)
    assert 'pip install "mossrlhf[plot]"' in message(ended)


def test_a_model_of_ones_own_is_trained_evaluated_and_saved(example, words, tmp_path, capsys):
    history = example.main([*words, f"--eval_dataset={tmp_path / 'prompts.jsonl'}"])
    assert [entry["step"] for entry in history if "policy/loss" in entry] == [1, 2]
    assert "eval/brevity/win_rate" in history[-1]
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists()
    printed = capsys.readouterr().out
    assert "\nheld-out prompts, after iteration 2:\n" in printed
    assert "\n  eval/brevity/win_rate " in printed


class Interrupted(Trainer):
    def collect(self, prompts=None):
        if self.run.pretrained:
            signal.raise_signal(signal.SIGINT)
        return super().collect(prompts)


def test_ctrl_c_saves_and_ends_with_130(example, words, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "Trainer", Interrupted)
    with pytest.raises(SystemExit) as ended:
        example.main(words)
    assert ended.value.code == 130
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists()


def test_ctrl_c_in_a_recipe_ends_with_130(example, monkeypatch, capsys):
    def stop(config):
        raise KeyboardInterrupt("sft")

    monkeypatch.setattr(scratch, "main", stop)
    monkeypatch.setattr(toy, "main", lambda config: {"interrupted": True})
    for words in (["--train_from_scratch=pairs.jsonl"], []):
        with pytest.raises(SystemExit) as ended:
            example.main(words)
        assert ended.value.code == 130
    assert capsys.readouterr().err == (
        "\nInterrupted in the stage sft: this run leaves no summary.\n"
    )
