"""Golden numbers of TRL 1.12.0's PPO, for tests/trainer/test_trl_oracle.py.

Runs in an environment of TRL's own, and writes tests/golden/trl_ppo.safetensors::

    pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0 datasets
    python tools/make_trl_golden.py

``PPOTrainer.train`` runs as it stands, on one given rollout (in place of `batch_generation`) of
responses that finish early, at once, at the limit, or not at all. What it has computed is read off
its own variables where it calls ``backward``: before the first and the second optimizer step, the
second with ratios away from 1 and clips that bind.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

PAD, EOS, VOCAB, LIMIT, TEMPERATURE = 0, 2, 24, 8, 0.7
PROMPTS = (3, 6, 1, 4, 5, 2)
LENGTHS = (4, 8, 1, 8, 7, 2)  # in tokens, the end of sequence included
TRUNCATED = (False, True, False, False, False, False)  # the fourth ends with its last token
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=EOS,
)


def rollout() -> tuple[torch.Tensor, torch.Tensor]:
    """Return left-padded prompts ``[B, P]`` and responses ``[B, LIMIT]``, noise behind them."""
    prompts = torch.full((len(PROMPTS), max(PROMPTS)), PAD)
    for row, length in zip(prompts, PROMPTS, strict=True):
        row[-length:] = torch.randint(3, VOCAB, (length,))
    responses = torch.randint(3, VOCAB, (len(LENGTHS), LIMIT))
    for row, length, cut in zip(responses, LENGTHS, TRUNCATED, strict=True):
        if not cut:
            row[length - 1] = EOS
    return prompts, responses


def noisy(model: torch.nn.Module, scale: float) -> torch.nn.Module:
    """Move every weight at random, for outputs worth comparing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of as many words as the models know."""
    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t3"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="t0", bos_token="t1", eos_token="t2", padding_side="left"
    )


def config() -> PPOConfig:
    """Return TRL's settings: its defaults, but for sizes, two epochs and a large learning rate."""
    count = len(PROMPTS)
    return PPOConfig(
        output_dir="trl_ppo_golden",
        learning_rate=0.02,  # for ratios beyond the clip after one step
        per_device_train_batch_size=count,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=2,
        total_episodes=count,
        response_length=LIMIT,
        local_rollout_forward_batch_size=count,
        temperature=TEMPERATURE,
        stop_token="eos",
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        eval_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )


def give(responses: torch.Tensor, kept: dict[str, torch.Tensor]) -> None:
    """Put given responses in the place of what TRL would draw."""

    def given(
        model: torch.nn.Module, queries: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept["prompts"] = queries.clone()  # shuffled by its data loader
        ids = torch.cat([queries, responses], dim=1)
        logits = ppo_trainer.forward(model, ids, PAD).logits[:, queries.shape[1] - 1 : -1]
        return ids, logits / TEMPERATURE  # as `generate` returns them

    ppo_trainer.batch_generation = given
    kept["responses"] = responses


def watch(
    trainer: PPOTrainer, modules: dict[str, torch.nn.Module], kept: dict[str, torch.Tensor]
) -> None:
    """Keep what stands in the variables of `train` whenever it calls ``backward``."""
    backward = trainer.accelerator.backward
    steps = iter(range(2))

    def watched(loss: torch.Tensor) -> None:
        step, found = next(steps), sys._getframe(1).f_locals
        for name, model in modules.items():
            kept.update({f"{step}.{name}.{k}": v.clone() for k, v in model.state_dict().items()})
        backward(loss)
        if step == 0:
            names = "logprobs ref_logprobs values scores rewards advantages returns"
            kept.update({name: found[name].clone() for name in names.split()})
        for name in ("pg_loss", "vf_loss"):
            kept[f"{step}.{name}"] = found[name].detach().clone()
        kept[f"{step}.clipped"] = (found["pg_losses2"] > found["pg_losses"]).sum()
        for name, model in modules.items():
            for key, parameter in model.named_parameters():
                kept[f"{step}.{name}.grad.{key}"] = parameter.grad.clone()

    trainer.accelerator.backward = watched


def main() -> None:
    """Run two optimizer steps, and keep what TRL has computed."""
    torch.manual_seed(0)
    policy = noisy(LlamaForCausalLM(LlamaConfig(**SHAPE)), 0.3)
    reference = LlamaForCausalLM(LlamaConfig(**SHAPE))
    reference.load_state_dict(policy.state_dict())
    noisy(reference, 0.05)
    reward, critic = (
        noisy(LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1)), 0.3)
        for _ in range(2)
    )
    prompts, responses = rollout()
    kept: dict[str, torch.Tensor] = {}
    give(responses, kept)
    trainer = PPOTrainer(
        args=config(),
        processing_class=tokenizer(),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}),
    )
    for name, model in (("reference", reference), ("reward", reward)):
        kept |= {f"{name}.{k}": v.clone() for k, v in model.state_dict().items()}
    watch(trainer, {"policy": policy, "critic": critic}, kept)
    trainer.train()
    assert int(kept["1.clipped"]) > 3, "no clip binds: raise the learning rate"
    origin = {"origin": "TRL 1.12.0 PPOTrainer.train", "torch": torch.__version__}
    path = Path(__file__).parent.parent / "tests" / "golden" / "trl_ppo.safetensors"
    save_file({name: value.contiguous() for name, value in kept.items()}, path, origin)
    print(f"{path}: {path.stat().st_size} bytes, {int(kept['1.clipped'])} tokens clipped")


if __name__ == "__main__":
    main()
