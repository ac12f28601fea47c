r"""PPO-max on any causal language model, or the demo in the toy world.

Without arguments: three runs in the toy world, compared, in minutes on two
cores, in outputs/demo:

    python examples/ppo_llama.py [--lang zh] [--seed 1] [--output_dir FOLDER]

From preference pairs only: tokenizer, SFT, reward model, PPO-max, in
outputs/scratch:

    python examples/ppo_llama.py --train_from_scratch pairs.jsonl

With your own models and prompts, alone or under `accelerate launch`; models,
curves.png, samples.md, summary.json and config.json go to --output_dir:

    accelerate launch examples/ppo_llama.py --config run.yaml \
        --model_name_or_path path/to/sft --reward_model_path path/to/reward \
        --dataset prompts.json
    python examples/ppo_llama.py --model_name_or_path path/to/sft \
        --reward rewards.py:brevity --dataset prompts.jsonl --lang en
    python examples/ppo_llama.py ... --resume_from_checkpoint true
"""

import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from support import from_scratch
from support.options import option_parser, read_options
from support.run_folder import write_run
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mossrlhf import Trainer, TrainerConfig, demo, last_checkpoint, presets
from mossrlhf.cli import INTERRUPTED, exit_on_interrupt
from mossrlhf.data import load_prompts, load_sft, set_dialogue_template
from mossrlhf.demo import clear_folder, timed
from mossrlhf.plotting import require_matplotlib


@dataclass(frozen=True)
class Inputs:
    """Models and data.

    Args:
        model_name_or_path: the SFT model, a folder or hub name; without it, the toy world.
        reward_model_path: the reward: a one-label sequence classifier or a RewardModel, a folder
            or hub name.
        reward: a reward function, file.py:function, instead of reward_model_path.
        dataset: prompts, a JSON or JSONL file or a hub name.
        eval_dataset: held-out prompts, evaluated every eval_steps, else after the last iteration.
        ptx_dataset: pre-training or SFT data for the PTX term; needs ptx_coef.
        lang: the dialogue template of the tokenizer; in the toy world its language.
        train_from_scratch: preference pairs to train everything on, a file or hub name.
        resume_from_checkpoint: the folder of a checkpoint, true for the newest in output_dir,
            auto for the newest if there is one.
    """

    _argument_group_name = "models and data"

    model_name_or_path: str | None = None
    reward_model_path: str | None = None
    reward: str | None = None
    dataset: str | None = None
    eval_dataset: str | None = None
    ptx_dataset: str | None = None
    lang: Literal["en", "zh"] | None = None
    train_from_scratch: str | None = None
    resume_from_checkpoint: str | None = None


@dataclass(frozen=True)
class Algorithm:
    """The options of PPO-max; the defaults are the paper's (`presets.ppo_max`).

    Args:
        kl_coef: η of the KL penalty in the reward.
        reward_clip: δ, bound on the normalized reward; none for no bound.
        gamma: γ of GAE.
        lam: λ of GAE.
        policy_clip: ε of the clipped surrogate.
        value_clip: ε_v of the clipped value loss; none for no clip.
        ptx_coef: λ_ptx, factor on the loss of ptx_dataset.
    """

    _argument_group_name = "PPO-max"

    kl_coef: float = 0.05
    reward_clip: float | None = 0.8
    gamma: float = 1.0
    lam: float = 0.9
    policy_clip: float = 0.2
    value_clip: float | None = 0.2
    ptx_coef: float | None = None


@dataclass(frozen=True)
class Sampling:
    """Sampling and adapters.

    Args:
        max_new_tokens: longest response, in tokens.
        temperature: sampling temperature.
        top_p: share of the probability to sample from.
        lora_r: rank of LoRA adapters on all linear layers; without it all weights are trained.
    """

    _argument_group_name = "sampling, adapters"

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    lora_r: int | None = None


def main(argv: list[str] | None = None) -> Any:
    """Parse the command line and run the demo, training from scratch, or PPO."""
    with exit_on_interrupt():
        inputs, algorithm, sampling, args, given = parse(sys.argv[1:] if argv is None else argv)
        if inputs.train_from_scratch is not None:
            only(given, {"train_from_scratch", "lang", "seed", "output_dir"})
            file = given.pop("train_from_scratch")
            return run_job(from_scratch.main, from_scratch.ScratchConfig(file, **given))
        if inputs.model_name_or_path is None:
            only(given, {"lang", "seed", "output_dir"})
            return run_job(demo.main, demo.DemoConfig(**given))
        return train(inputs, algorithm, sampling, args)


def run_job(run: Callable[[Any], dict[str, Any]], config: Any) -> dict[str, Any]:
    """Run a job that plots; exit with 130 if Ctrl-C interrupted it."""
    try:
        require_matplotlib()
    except ImportError as error:
        sys.exit(str(error))
    summary = run(config)
    if summary["interrupted"]:
        sys.exit(INTERRUPTED)
    return summary


def train(
    inputs: Inputs, algorithm: Algorithm, sampling: Sampling, args: TrainerConfig
) -> list[dict[str, Any]]:
    """Train a model with PPO-max, and write its run folder."""
    require_sense(inputs, algorithm)
    reward = inputs.reward_model_path or load_function(str(inputs.reward))
    prompts = load_prompts(str(inputs.dataset))
    held_out = load_prompts(inputs.eval_dataset) if inputs.eval_dataset else None
    if held_out is not None and args.eval_steps is None:
        args = replace(args, eval_steps=args.total_steps)
    ptx = load_sft(inputs.ptx_dataset) if inputs.ptx_dataset else None
    tokenizer = AutoTokenizer.from_pretrained(inputs.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(inputs.model_name_or_path)
    if inputs.lang is not None and set_dialogue_template(tokenizer, inputs.lang):
        model.resize_token_embeddings(len(tokenizer))
    parts = presets.ppo_max()
    shaper, advantage, loss = parts["shaper"], parts["advantage"], parts["loss"]
    clips = {"policy_clip": algorithm.policy_clip, "value_clip": algorithm.value_clip}
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
        shaper=replace(shaper, kl_coef=algorithm.kl_coef, clip=algorithm.reward_clip),
        advantage=replace(advantage, gamma=algorithm.gamma, lam=algorithm.lam),
        loss=replace(loss, ptx_coef=algorithm.ptx_coef, **clips),
    )
    if trainer.accelerator.is_main_process:
        groups = {"inputs": inputs, "algorithm": algorithm, "sampling": sampling, "args": args}
        clear_folder(trainer.output_dir, {name: asdict(part) for name, part in groups.items()})
        print(trainer)
    seconds: dict[str, float] = {}
    with timed("training", seconds):
        history: list[dict[str, Any]] = trainer.train(
            checkpoint(inputs.resume_from_checkpoint, args.output_dir)
        )
    if trainer.accelerator.is_main_process:
        print_evaluation(history)
    write_run(trainer, seconds)
    if trainer.run.interrupted:
        sys.exit(INTERRUPTED)
    return history


def require_sense(inputs: Inputs, algorithm: Algorithm) -> None:
    """Exit if an option is missing, before any model is loaded."""
    if inputs.dataset is None:
        sys.exit("--dataset: a JSON or JSONL file of prompts, or a hub name, is needed")
    if (inputs.reward is None) == (inputs.reward_model_path is None):
        sys.exit("give one of --reward_model_path and --reward file.py:function")
    if (inputs.ptx_dataset is None) != (algorithm.ptx_coef is None):
        sys.exit("--ptx_dataset and --ptx_coef need each other; give both or neither")


def checkpoint(given: str | None, output_dir: str) -> str | Path | bool | None:
    """Read ``--resume_from_checkpoint``: a folder, true, false or auto."""
    words = {"true": True, "false": False, "auto": last_checkpoint(output_dir)}
    return given if given is None else words.get(given.lower(), given)


def print_evaluation(history: Iterable[Mapping[str, float]]) -> None:
    """Print the last evaluation, if there was any."""
    found = [entry for entry in history if any(name.startswith("eval/") for name in entry)]
    if found:
        print(f"\nheld-out prompts, after iteration {found[-1]['step']}:")
        for name, value in found[-1].items():
            if name.startswith("eval/"):
                print(f"  {name:40}{value:10.4g}")


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

    Returns them, and the options that were given.
    """
    defaults = (Inputs(), Algorithm(), Sampling(), presets.ppo_max()["args"])
    notes = (
        "[Defaults] in brackets. P1 is arXiv 2307.04964, C the code released with it.\n"
        "--learning_rate alone also sets the critic's, to 3.3 times the policy's (P1)."
    )
    parser = option_parser(f"{__doc__}\n{notes}", defaults)
    given = read_options(parser, argv)
    try:
        inputs, algorithm, sampling = (
            replace(part, **chosen(part, given)) for part in defaults[:-1]
        )
        # The preset, not `replace`: it keeps the ratio of the two learning rates.
        args = presets.ppo_max(**chosen(defaults[-1], given))["args"]
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return inputs, algorithm, sampling, args, given


def chosen(part: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the given options that are fields of a dataclass."""
    return {spec.name: given[spec.name] for spec in fields(part) if spec.name in given}


def only(given: Mapping[str, Any], allowed: set[str]) -> None:
    """Exit if an option is given that would be ignored."""
    if odd := sorted(set(given) - allowed):
        listed = ", ".join(f"--{name}" for name in odd)
        sys.exit(
            f"{listed}: would be ignored. Without --model_name_or_path only "
            f"{', '.join(f'--{name}' for name in sorted(allowed))} have an effect"
        )


if __name__ == "__main__":
    main()
