"""`examples/ppo_llama.py`: its options, what it refuses, what it trains, how it ends."""

import json
import signal
import sys
from dataclasses import fields

import pytest
from support import from_scratch
from support.options import help_texts
from transformers import LlamaForCausalLM

from mossrlhf import RewardModel, ToyWorld, Trainer, demo, presets

WORLD = ToyWorld(lang="en", seed=0)
TINY = "--total_steps 2 --rollout_size 8 --minibatch_size 4 --critic_pretrain_steps 1"


@pytest.fixture
def example(script):
    return script("examples/ppo_llama.py")


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
    assert "--learning_rate alone also sets the critic's, to 3.3 times the policy's" in printed


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


def test_the_critics_learning_rate_follows_the_policys(example):
    def rates(*words):
        args = example.parse(list(words))[3]
        return args.learning_rate, args.critic_learning_rate

    assert rates("--learning_rate=1e-3") == pytest.approx((1e-3, 3.3e-3))
    assert rates("--learning_rate=1e-3", "--critic_learning_rate=2e-3") == (1e-3, 2e-3)
    assert rates("--critic_learning_rate=2e-3") == (5e-7, 2e-3)


def test_impossible_numbers_are_refused_with_their_reason(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--total_steps", "-1"])
    assert "error: TrainerConfig(total_steps=): got -1, expected" in capsys.readouterr().err


def test_toy_world_and_pairs_get_their_options(example, monkeypatch):
    asked = []
    for job in (demo, from_scratch):
        monkeypatch.setattr(job, "main", lambda c: asked.append(c) or {"interrupted": False})
    example.main(["--lang", "zh", "--output_dir=x"])
    example.main(["--train_from_scratch", "pairs.jsonl", "--seed=3"])
    assert asked == [
        demo.DemoConfig(lang="zh", output_dir="x"),
        from_scratch.ScratchConfig(file="pairs.jsonl", seed=3),
    ]


@pytest.mark.parametrize(
    "words",
    ["--no_disable_dropout", "--bf16", "--config=FILE", "--config FILE", "--learning-rate 1"],
)
@pytest.mark.parametrize("mode", ["", "--train_from_scratch pairs.jsonl "])
def test_options_that_nothing_would_read_are_refused(example, tmp_path, mode, words):
    (tmp_path / "run.yaml").write_text("total_steps: 3\n")
    words = words.replace("FILE", str(tmp_path / "run.yaml"))
    with pytest.raises(SystemExit, match="would be ignored"):
        example.main((mode + words).split())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--reward r.py:f", "--dataset: a JSON or JSONL file of prompts"),
        ("--dataset p.json", "give one of --reward_model_path and --reward"),
        ("--dataset p.json --reward a.py:b --ptx_dataset p.json", "need each other"),
        ("--dataset p.json --reward nothing", "--reward: 'nothing' is not file.py:function"),
    ],
)
def test_missing_parts_are_refused_before_a_model_is_loaded(example, words, reason):
    with pytest.raises(SystemExit) as ended:
        example.main(["--model_name_or_path", "nowhere", *words.split()])
    assert reason in message(ended)


@pytest.mark.parametrize("words", [[], ["--train_from_scratch", "pairs.jsonl"]])
def test_jobs_that_plot_name_the_missing_extra(example, monkeypatch, words):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as ended:
        example.main(words)
    assert 'pip install "mossrlhf[plot]"' in message(ended)


def test_a_model_of_ones_own_is_trained_evaluated_and_saved(example, words, tmp_path, capsys):
    history = example.main([*words, f"--eval_dataset={tmp_path / 'prompts.jsonl'}"])
    assert [entry["step"] for entry in history if "policy/loss" in entry] == [1, 2]
    assert "eval/brevity/win_rate" in history[-1]
    folder = tmp_path / "run"
    for name in ("policy", "critic"):
        assert (folder / name / "model.safetensors").exists(), name
    assert not (folder / "reward_model").exists()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    samples = (folder / "samples.md").read_text()
    assert samples.startswith("# Samples after iteration 2\n\n12 of the 12 held-out prompts,")
    assert samples.count("**policy**") == samples.count("**reference**") == 12
    assert f"\n> {WORLD.prompts(1)[0]['prompt'][-1]['content']}\n" in samples
    printed = capsys.readouterr().out
    files = "config.json, curves.png, samples.md, summary.json, policy/, critic/"
    assert printed.endswith(f"\n{folder}/: {files}\n")
    assert "\nheld-out prompts, after iteration 2:\n" in printed
    assert "\n  eval/brevity/win_rate " in printed


def test_a_run_leaves_its_figures_and_its_settings(example, words, tmp_path):
    history = example.main([*words, f"--eval_dataset={tmp_path / 'prompts.jsonl'}", "--lam=0.5"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["training"] == history[-2]
    assert summary["evaluation"] == history[-1]
    assert (summary["steps"], summary["interrupted"]) == (2, False)
    assert summary["seconds"]["training"] > 0
    assert set(summary["versions"]) >= {"mossrlhf", "torch", "transformers"}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["algorithm"]["lam"] == 0.5
    assert config["args"]["eval_steps"] == 2
    assert config["inputs"]["dataset"] == str(tmp_path / "prompts.jsonl")


def test_without_held_out_prompts_the_last_rollout_is_quoted(example, words, tmp_path):
    example.main(words)
    samples = (tmp_path / "run" / "samples.md").read_text()
    lead = "The first 8 responses of the rollout of iteration 2."
    assert samples.startswith(f"# Samples after iteration 2\n\n{lead}\n\n## Prompt 1\n")
    assert samples.count("**policy**") == 8
    assert "**reference**" not in samples
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["evaluation"] is None


def test_a_number_that_is_none_is_null_in_the_summary(example, words, tmp_path, monkeypatch):
    class Blind(Trainer):
        def evaluate(self, *args, **kwargs):
            return {**super().evaluate(*args, **kwargs), "eval/brevity/ref": float("nan")}

    monkeypatch.setattr(example, "Trainer", Blind)
    example.main([*words, f"--eval_dataset={tmp_path / 'prompts.jsonl'}"])
    text = (tmp_path / "run" / "summary.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["evaluation"]["eval/brevity/ref"] is None


def test_the_reward_model_is_saved_beside_the_policy(example, words, tmp_path):
    model = LlamaForCausalLM(WORLD.model_config(hidden_size=16, num_layers=1))
    RewardModel(model.base_model).save_pretrained(tmp_path / "rm")
    WORLD.tokenizer().save_pretrained(tmp_path / "rm")
    words = [word for word in words if not word.startswith("--reward=")]
    example.main([*words, f"--reward_model_path={tmp_path / 'rm'}"])
    saved = RewardModel.from_pretrained(tmp_path / "run" / "reward_model").state_dict()
    given = RewardModel.from_pretrained(tmp_path / "rm").state_dict()
    assert all(saved[name].equal(value) for name, value in given.items())
    assert (tmp_path / "run" / "reward_model" / "tokenizer.json").exists()


def test_without_matplotlib_ones_own_model_is_trained_all_the_same(
    example, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    example.main(words)
    lines = [line for line in capsys.readouterr().out.splitlines() if "curves.png" in line]
    assert lines == [
        'curves.png is not written: plotting needs matplotlib: pip install "mossrlhf[plot]"'
    ]
    assert (tmp_path / "run" / "samples.md").exists()


@pytest.mark.parametrize("given", ["true", "auto", "checkpoint-2"])
def test_a_run_goes_on_from_its_checkpoint(example, words, tmp_path, given):
    first = example.main(words)
    given = given if given in ("true", "auto") else str(tmp_path / "run" / given)
    history = example.main([*words, "--total_steps=3", f"--resume_from_checkpoint={given}"])
    assert history[: len(first)] == first
    assert [entry["step"] for entry in history if "policy/loss" in entry] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("word", "meant"),
    [("True", True), ("false", False), (None, None), ("auto", None), ("a/b", "a/b")],
)
def test_where_to_go_on_from(example, tmp_path, word, meant):
    assert example.checkpoint(word, tmp_path) == meant


class Interrupted(Trainer):
    def collect(self, prompts=None):
        if self.run.run_state.pretrained:
            signal.raise_signal(signal.SIGINT)
        return super().collect(prompts)


def test_ctrl_c_saves_and_ends_with_130(example, words, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "Trainer", Interrupted)
    with pytest.raises(SystemExit) as ended:
        example.main(words)
    assert ended.value.code == 130
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["interrupted"] is True


def test_ctrl_c_in_a_job_exits_with_130(example, monkeypatch, capsys):
    def stop(config):
        raise KeyboardInterrupt("sft")

    monkeypatch.setattr(from_scratch, "main", stop)
    monkeypatch.setattr(demo, "main", lambda config: {"interrupted": True})
    for words in (["--train_from_scratch=pairs.jsonl"], []):
        with pytest.raises(SystemExit) as ended:
            example.main(words)
        assert ended.value.code == 130
    assert capsys.readouterr().err == (
        "\nInterrupted in the stage sft: this run leaves no summary.\n"
    )
