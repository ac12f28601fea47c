"""One process of `test_distributed`: take a few optimizer steps over a recorded rollout."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch


def on(name: str) -> bool:
    """Whether a switch is set in the environment."""
    return os.environ.get(name, "0") == "1"


def main(folder: Path) -> None:
    """Train on this process's share of the rollout, and save what came of it."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    from accelerate import Accelerator
    from transformers import GenerationConfig, LlamaForCausalLM

    from mossrlhf import AdvantageEstimator, PPOMaxLoss, RewardShaper, ToyWorld, Trainer
    from mossrlhf.config import TrainerConfig
    from mossrlhf.kernels import chunked_head as head
    from mossrlhf.models import full_logits

    head.CPU_CHUNK_BYTES, head.MIN_CHUNK_ROWS = 1, 16  # sixteen tokens
    world = ToyWorld()
    torch.manual_seed(0)
    config = world.model_config(hidden_size=16, num_layers=1)
    config.tie_word_embeddings = on("TIED")
    dtype = getattr(torch, os.environ.get("DTYPE", "float64"))
    policy = LlamaForCausalLM(config).to(dtype)  # the same numbers, whatever their type
    torch.set_default_dtype(dtype)
    options = dict(
        micro_batch_size=int(os.environ.get("MICRO", "0")) or None,
        max_tokens=int(os.environ.get("TOKENS", "0")) or None,
    )
    ptx = os.environ.get("PTX", "1") == "1"
    options["gradient_checkpointing"] = on("CHECKPOINTS")
    adapters = {}
    if on("ADAPTERS"):  # policy and critic on one base
        from peft import LoraConfig

        settings = dict(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapters = dict(peft_config=LoraConfig(r=4, **settings), critic=LoraConfig(r=2, **settings))
    if on("OWN"):  # which knows nothing of roles
        adapters["accelerator"] = Accelerator()
    trainer = Trainer(
        policy,
        reward=world.reward,
        train_dataset=world.prompts(8),
        processing_class=world.tokenizer(),
        generation_config=GenerationConfig(max_new_tokens=12),
        ptx_dataset=world.sft_examples(16) if ptx else None,
        shaper=RewardShaper(normalize=True),
        advantage=AdvantageEstimator(whiten=True),
        loss=PPOMaxLoss(entropy_coef=0.01, advantage_norm=True, ptx_coef=0.1 if ptx else None),
        args=TrainerConfig(
            output_dir=str(folder / f"out{os.environ.get('RANK', '0')}"),
            rollout_size=8,
            minibatch_size=int(os.environ.get("MINI", "8")),
            num_ppo_epochs=5,
            learning_rate=1e-3,
            critic_learning_rate=1e-3,
            warmup_steps=0,
            disable_tqdm=True,
            **options,
        ),
        **adapters,
    )
    accelerator = trainer.accelerator
    rollout = torch.load(folder / "rollout.pt", weights_only=False)
    mine = torch.arange(accelerator.process_index, 8, accelerator.num_processes)
    steps, step, clip, gradients = [], trainer.engine.step, trainer.engine._clip, []

    def recorded(minibatch, *rest):
        done = step(minibatch, *rest)
        steps.append((minibatch.token_weights.sum().item(), done.stats["policy/loss"].item()))
        return done

    def clipped(roles):
        found = (p.grad for p in trainer.model.parameters())
        gradients.append(torch.cat([g.detach().flatten() for g in found if g is not None]).clone())
        return clip(roles)

    trainer.engine.step, trainer.engine._clip = recorded, clipped
    with full_logits() if on("WHOLE") else nullcontext():
        metrics = trainer.step(rollout.select(mine))
    torch.save(steps, folder / f"steps{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        flat = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        result = {"parameters": flat, "metrics": metrics, "gradient": gradients[0]}
        torch.save(result, folder / "result.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    os._exit(0)  # gloo's threads now and then abort an interpreter that takes its time to end


if __name__ == "__main__":
    main(Path(sys.argv[1]))
