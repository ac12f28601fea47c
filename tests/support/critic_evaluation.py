"""One process of `test_critic_evaluation`: evaluate a critic."""

import os
import sys
from pathlib import Path

import torch


def main(folder: Path) -> None:
    """Evaluate with this process's share of the prompts, and save the result."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    from transformers import GenerationConfig, LlamaForCausalLM

    from mossrlhf import RewardShaper, ToyWorld, Trainer, TrainerConfig

    world = ToyWorld()
    torch.manual_seed(0)
    trainer = Trainer(
        LlamaForCausalLM(world.model_config(hidden_size=16, num_layers=1)).double(),
        reward=world.reward,
        train_dataset=world.prompts(8),
        processing_class=world.tokenizer(),
        generation_config=GenerationConfig(max_new_tokens=12),
        shaper=RewardShaper(normalize=True),
        args=TrainerConfig(
            output_dir=str(folder / f"out{os.environ.get('RANK', '0')}"),
            rollout_size=4,
            minibatch_size=4,
            disable_tqdm=True,
        ),
    )
    torch.nn.init.normal_(trainer.critic.score.weight)
    # Five prompts: one process has three of them, the other two.
    found = trainer.evaluate_critic(prompts=5, positions=3, continuations=3)
    if trainer.accelerator.is_main_process:
        names = ("values", "returns", "standard_errors", "positions", "prompts")
        result = {name: getattr(found, name).double() for name in names}
        torch.save(result, folder / "result.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    os._exit(0)  # gloo's threads now and then abort an interpreter that takes its time to end


if __name__ == "__main__":
    main(Path(sys.argv[1]))
