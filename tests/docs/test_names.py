"""What the pages about moving here call by name exists: classes, options, metrics, flags."""

import ast
import dataclasses
import importlib
import inspect
import re

import peft
import pytest
import transformers

import mossrlhf
from mossrlhf import Rollout, Trainer

PAGES = ("concepts", "from_trl", "from_moss")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
FOREIGN = {  # in prose: what is theirs, the shell's, the text's
    ".generate", ".step", ".train()", "args=PPOConfig(...)", "args=…", "trl.experimental.ppo",
    "train_ppo.py", "train_rm.py", "merge_weight_{en,zh}.py", "presets.trl_ppo()", "None", "False",
    "--help", "python -m mossrlhf.weight_diff", "train.json", "valid.json", "input_ids", "prompt",
    "completions.jsonl", "batch_size", "horizon", "gain", '"kl"', '"tensorboard"', '"zh"', '"en"',
    "generation_config=...", "[B]", "[B, T]", "[B, L]",
}  # fmt: skip
MOSS_FLAGS = [
    "model_save_path",
    "policy_model_path",
    "critic_model_path",
    "tokenizer_name_or_path",
    "data_path",
    "logdir",
    "lr",
    "critic_lr",
    "seed",
    "batch_size",
    "train_steps",
    "warmup_steps",
    "save_per_step",
    "beta1",
    "beta2",
    "eps",
    "num_workers",
    "num_prefetch",
    "maxlen_prompt",
    "gradient_checkpoint",
    "num_rollouts",
    "rollout_batch_size",
    "ppo_pretrain_data_path",
    "ppo_pretrain_data_type",
    "ppo_pretrain_batch_size_ratio",
    "ppo_pretrain_loss_weight",
    "kl_penalty_weight",
    "advantage_clip",
    "vf_loss_weight",
    "entropy_loss_weight",
    "reward_clip",
    "entropy_clip",
    "pg_clip",
    "value_clip",
    "gamma",
    "lam",
    "use_reward_clip",
    "use_reward_scaling",
    "use_reward_norm",
    "use_critic_loss_clip",
    "use_policy_loss_clip",
    "use_advantage_norm",
    "use_advantage_clip",
    "use_ppo_pretrain_loss",
    "use_entropy_loss",
    "maxlen_res",
    "temperature",
    "repetition_penalty",
    "topp",
    "lang",
    "reward_lm_loss_factor",
    "fp32_loss",
    "print_interval",
    "validation_metric",
    "weight_decay",
    "init_checkpoint_model",
    "hf_model_name_or_path",
    "context_truncate",
    "delimiter",
]
TRL_OPTIONS = [
    "adap_kl_ctrl",
    "init_kl_coef",
    "kl_penalty",
    "target",
    "horizon",
    "steps",
    "batch_size",
    "mini_batch_size",
    "gradient_accumulation_steps",
    "ppo_epochs",
    "early_stopping",
    "target_kl",
    "ratio_threshold",
    "use_score_scaling",
    "use_score_norm",
    "score_clip",
    "whiten_rewards",
    "log_with",
    "cliprange",
    "cliprange_value",
    "vf_coef",
    "gamma",
    "lam",
    "num_mini_batches",
    "total_episodes",
    "local_rollout_forward_batch_size",
    "num_sample_generations",
    "response_length",
    "stop_token",
    "stop_token_id",
    "temperature",
    "missing_eos_penalty",
    "sft_model_path",
    "reward_model_path",
    "model_adapter_name",
    "ref_adapter_name",
    "num_ppo_epochs",
    "kl_coef",
    "kl_estimator",
    "ds3_gather_for_generation",
    "max_grad_norm",
]


def rows_and_prose(text):
    """A page without code blocks, and without the first cell of rows, where that is theirs."""
    theirs = False
    for line in FENCE.sub("", text).splitlines():
        if not line.startswith("|"):
            theirs = False
            yield line
            continue
        cells = line.split(" | ")
        if re.match(r"\| (TRL|flag|there|in the paper|letter)", line):
            theirs = True
        yield " | ".join(cells[1:] if theirs else cells)


def spans(text):
    return [span for line in rows_and_prose(text) for span in SPAN.findall(line)]


def members(owner):
    """What an object has: attributes, fields, and for a trainer what it sets when it is made."""
    names = set(dir(owner))
    if dataclasses.is_dataclass(owner):
        names |= {field.name for field in dataclasses.fields(owner)}
    if owner is Trainer:
        names |= {"ref_model", "rewards"}
    return names


def known(name):
    homes = (mossrlhf, transformers, peft, importlib.import_module("mossrlhf.sampling"))
    for home in homes:
        if hasattr(home, name):
            return getattr(home, name)
    return importlib.import_module(f"mossrlhf.{name}")  # a module


def require(node):
    """Resolve an expression in the names of the package; AssertionError where one is missing."""
    if isinstance(node, ast.Name):
        return known(node.id)
    if isinstance(node, ast.Attribute):
        owner = require(node.value)
        if inspect.ismodule(owner):
            return getattr(owner, node.attr)
        assert node.attr in members(owner), f"{owner.__name__} has no {node.attr}"
        return getattr(owner, node.attr, None)
    assert isinstance(node, ast.Call), ast.dump(node)
    called = require(node.func)
    options = {keyword.arg: keyword.value for keyword in node.keywords}
    values = {
        name: ast.literal_eval(value)
        for name, value in options.items()
        if not isinstance(value, ast.Name)
    }
    if called is transformers.GenerationConfig:
        assert set(values) <= set(called().to_dict()), values
    elif values and not any(isinstance(value, ast.Name) for value in [*node.args]):
        called(**values)  # the options are there, and the values possible
    else:
        inspect.signature(called).bind_partial(*node.args, **options)
    return called


def check(span, metrics, root):
    """Fail where a span of code is nothing that exists."""
    option = re.fullmatch(r"(\w+)=(\S*)", span)
    if option:
        fields = {"clip": mossrlhf.RewardShaper, "policy_clip": mossrlhf.PPOMaxLoss}
        fields["value_clip"] = mossrlhf.PPOMaxLoss
        owner = fields.get(option[1], Trainer)
        assert option[1] in inspect.signature(owner).parameters, span
    elif "/" in span and " " not in span:
        assert span in metrics, f"{span} is no metric of docs/metrics.md"
    else:
        require(ast.parse(span, mode="eval").body)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_exists(page, root):
    text = (root / "docs" / f"{page}.md").read_text(encoding="utf-8")
    metrics = set(SPAN.findall((root / "docs" / "metrics.md").read_text(encoding="utf-8")))
    found = [span for span in spans(text) if span not in FOREIGN]
    assert len(found) > 40
    wrong = []
    for span in found:
        try:
            check(span, metrics, root)
        except Exception as error:
            wrong.append(f"{span}: {error}")
    assert wrong == []


@pytest.mark.parametrize(
    "span",
    ["RewardShaper(kl=1)", "TrainerConfig.rollouts", "Trainer.fit", "kl/ref", "critics=False",
     "PPOMaxLoss(policy_clip=-1.0)", "functional.gea", "Rolout"],
)  # fmt: skip
def test_what_does_not_exist_is_seen(span, root):
    with pytest.raises((AssertionError, AttributeError, ImportError, TypeError, ValueError)):
        check(span, {"kl/ref_per_token"}, root)


def test_every_flag_of_the_scripts_is_mapped(root):
    text = (root / "docs" / "from_moss.md").read_text(encoding="utf-8")
    assert [flag for flag in MOSS_FLAGS if f"`--{flag}`" not in text] == []


def test_every_option_of_trl_is_mapped(root):
    text = (root / "docs" / "from_trl.md").read_text(encoding="utf-8")
    assert [name for name in TRL_OPTIONS if f"`{name}`" not in text] == []


def test_options_of_commands_exist(root, script):
    text = (root / "docs" / "from_moss.md").read_text(encoding="utf-8")
    command = re.search(r"ppo_llama\.py (.*?)\n```", text, re.DOTALL)[1]
    example = script("examples/ppo_llama.py")
    classes = (example.Inputs, example.Algorithm, example.Sampling, mossrlhf.TrainerConfig)
    options = {field.name for kind in classes for field in dataclasses.fields(kind)}
    used = re.findall(r"--(\w+)", command)
    assert len(used) > 5
    assert set(used) <= options


def test_rollout_has_the_fields_of_the_letters():
    assert {"scores", "values", "returns"} <= {field.name for field in dataclasses.fields(Rollout)}


def test_every_module_has_its_layer_on_the_page(root):
    text = (root / "docs" / "design.md").read_text(encoding="utf-8")
    table = text.split("| layer | modules |")[1].split("\n\n")[0]
    source = root / "src" / "mossrlhf"
    there = {path.stem for path in source.glob("[!_]*.py")}
    there |= {path.parent.name for path in source.glob("*/__init__.py")}
    assert set(SPAN.findall(table)) == there


def test_the_files_of_an_example_of_make_exist(root):
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.search(r'FILES="([^"]+)"', text)[1].split()
    assert [file for file in files if not (root / "src" / "mossrlhf" / file).is_file()] == []


def test_mutants_and_their_tests_exist(root, script):
    """Or `make mutants` would end at a file that was renamed."""
    mutants = script("tools/mutants.py")
    mutants.COPIES.cleanup()  # it would be told of at exit
    named = [root / "src/mossrlhf" / file for file in mutants.NEAREST]
    named += [root / "tests" / test for tests in mutants.NEAREST.values() for test in tests]
    assert [path for path in named if not path.is_file()] == []
