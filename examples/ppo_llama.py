r"""PPO-max on any causal language model, or the whole story in the toy world.

With no arguments: the toy world, three arms side by side, in minutes on two cores::

    python examples/ppo_llama.py [--lang zh] [--seed 1] [--output_dir outputs/zh]

From nothing but preference pairs: tokenizer, SFT, reward model, PPO-max::

    python examples/ppo_llama.py --train_from_scratch pairs.jsonl

With models of your own, alone or under ``accelerate launch``; every option of `TrainerConfig`
and of the dataclasses below, from the command line or from a YAML file::

    accelerate launch examples/ppo_llama.py --config run.yaml \
        --model_name_or_path path/to/sft --reward_model_path path/to/reward --dataset prompts.json
    python examples/ppo_llama.py --model_name_or_path path/to/sft \
        --reward rewards.py:brevity --dataset prompts.jsonl --lang en
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser

from mossrlhf import AdvantageEstimator, PPOMaxLoss, RewardShaper, Trainer, TrainerConfig
from mossrlhf.data import load_prompts, load_sft, set_dialogue_template


@dataclass
class Inputs:
    """What to train, on what, and towards what."""

    model_name_or_path: str | None = None  # the SFT model: a folder or hub name
    reward_model_path: str | None = None  # a one-label sequence classifier, or a RewardModel
    reward: str | None = None  # or a function: file.py:function
    dataset: str | None = None  # prompts: a JSON or JSONL file, or a hub name
    eval_dataset: str | None = None  # held-out prompts
    ptx_dataset: str | None = None  # pre-training or SFT data for the PTX term
    lang: Literal["en", "zh"] | None = None  # the dialogue template; the toy world's language
    train_from_scratch: str | None = None  # preference pairs to learn everything from


@dataclass
class Algorithm:
    """The switches of PPO-max; the defaults are the paper's (`presets.ppo_max`)."""

    kl_coef: float = 0.05
    reward_clip: float | None = 0.8
    gamma: float = 1.0
    lam: float = 0.9
    policy_clip: float = 0.2
    value_clip: float | None = 0.2
    ptx_coef: float | None = None


@dataclass
class Sampling:
    """How responses are drawn, and how few weights are trained."""

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    lora_r: int | None = None  # rank of LoRA adapters on all linear layers; None trains all


def main(argv: list[str] | None = None) -> Any:
    """Parse the command line and run what it asks for."""
    inputs, algorithm, sampling, args, given = parse(sys.argv[1:] if argv is None else argv)
    if inputs.train_from_scratch is not None:
        from mossrlhf.recipes import scratch

        only(given, {"train_from_scratch", "lang", "seed", "output_dir"}, "--train_from_scratch")
        shared = {name: given[name] for name in ("lang", "seed", "output_dir") if name in given}
        return scratch.main(scratch.ScratchConfig(file=inputs.train_from_scratch, **shared))
    if inputs.model_name_or_path is None:
        from mossrlhf.recipes import toy

        only(given, {"lang", "seed", "output_dir"}, "the toy world (no --model_name_or_path)")
        return toy.main(toy.ToyConfig(**given))
    return train(inputs, algorithm, sampling, args)


def train(
    inputs: Inputs, algorithm: Algorithm, sampling: Sampling, args: TrainerConfig
) -> list[dict[str, Any]]:
    """Put the parts together, train, save."""
    if inputs.dataset is None:
        sys.exit("--dataset: a JSON or JSONL file of prompts, or a hub name, is needed")
    if (inputs.reward is None) == (inputs.reward_model_path is None):
        sys.exit("give one of --reward_model_path and --reward file.py:function")
    reward = inputs.reward_model_path or load_function(str(inputs.reward))
    prompts = load_prompts(inputs.dataset)
    held_out = load_prompts(inputs.eval_dataset) if inputs.eval_dataset else None
    ptx = load_sft(inputs.ptx_dataset) if inputs.ptx_dataset else None
    tokenizer = AutoTokenizer.from_pretrained(inputs.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(inputs.model_name_or_path)
    if inputs.lang is not None and set_dialogue_template(tokenizer, inputs.lang):
        model.resize_token_embeddings(len(tokenizer))
    trainer = Trainer(
        model,
        reward=reward,
        train_dataset=prompts,
        eval_dataset=held_out,
        ptx_dataset=ptx,
        processing_class=tokenizer,
        peft_config=lora(sampling.lora_r),
        generation_config=GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        ),
        args=args,
        shaper=RewardShaper(kl_coef=algorithm.kl_coef, normalize=True, clip=algorithm.reward_clip),
        advantage=AdvantageEstimator(gamma=algorithm.gamma, lam=algorithm.lam),
        loss=PPOMaxLoss(
            policy_clip=algorithm.policy_clip,
            value_clip=algorithm.value_clip,
            ptx_coef=algorithm.ptx_coef,
        ),
    )
    if trainer.accelerator.is_main_process:
        print(trainer)
    history = trainer.train()
    trainer.save_model()
    return history


def lora(rank: int | None) -> Any:
    """LoRA on every linear layer, or None."""
    if rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def load_function(spec: str) -> Callable[..., Any]:
    """Load ``file.py:function``."""
    file, _, name = spec.rpartition(":")
    if not file or not Path(file).is_file():
        sys.exit(f"--reward: {spec!r} is not file.py:function, or there is no such file")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, name):
        sys.exit(f"--reward: {file} has no function {name!r}")
    function: Callable[..., Any] = getattr(module, name)
    return function


def parse(
    argv: list[str],
) -> tuple[Inputs, Algorithm, Sampling, TrainerConfig, dict[str, Any]]:
    """Read the dataclasses from the command line, over those of ``--config FILE.yaml``.

    Returns them, and what was given rather than left at its default.
    """
    parser = HfArgumentParser((Inputs, Algorithm, Sampling, TrainerConfig), allow_abbrev=False)
    # PPO-max's own values for what TrainerConfig leaves neutral.
    parser.set_defaults(critic_learning_rate=1.65e-6, critic_pretrain_steps=50)
    given: dict[str, Any] = {}
    if "--config" in argv[:-1]:
        at = argv.index("--config")
        given = read_yaml(argv[at + 1])
        argv = argv[:at] + argv[at + 2 :]
        known = {spec.name for kind in parser.dataclass_types for spec in fields(kind)}
        unknown = sorted(set(given) - known)
        if unknown:
            sys.exit(f"--config: {unknown} are no options; see --help")
        parser.set_defaults(**given)
    inputs, algorithm, sampling, args = parser.parse_args_into_dataclasses(argv)
    everything = {**vars(inputs), **vars(algorithm), **vars(sampling), **vars(args)}
    named = {arg[2:].partition("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")}
    given.update({name: everything[name] for name in named if name in everything})
    return inputs, algorithm, sampling, args, given


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file of options."""
    import yaml

    data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        sys.exit(f"--config: {path} holds a {type(data).__name__}, expected option: value lines")
    return data


def only(given: dict[str, Any], allowed: set[str], where: str) -> None:
    """Refuse options that nothing would read."""
    odd = sorted(set(given) - allowed)
    if odd:
        sys.exit(f"{where} takes {sorted(allowed)} alone; {odd} would be read by nothing")


if __name__ == "__main__":
    main()
