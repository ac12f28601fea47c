"""The work of benchmarks/ppo_iteration.py by TRL 1.12's PPO, the last of its releases that has one.

    pip install torch==2.13.0 trl==1.12.0 datasets      # an environment of its own
    python benchmarks/trl_iteration.py [--shape tiny]

The same options and the same line of JSON, without stages.
"""

import json
import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from statistics import median

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from iteration_work import Stopwatch, llama, parse, prompts, tokenizer
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer


def main(argv: Sequence[str] | None = None) -> int:
    """Run iterations."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    policy, reference = (LlamaForCausalLM(llama(args)) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    reward, critic = (LlamaForSequenceClassification(llama(args, num_labels=1)) for _ in range(2))
    critic.load_state_dict(reward.state_dict())
    cuda, watch = args.device == "cuda", Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=args.rollouts,
            gradient_accumulation_steps=1,
            num_mini_batches=args.minibatches,
            num_ppo_epochs=args.epochs,
            total_episodes=args.rollouts * args.iters,
            response_length=args.response,
            local_rollout_forward_batch_size=args.rollouts,
            temperature=1.0,
            stop_token="eos",
            missing_eos_penalty=1.0,
            num_sample_generations=0,
            report_to=[],
            save_strategy="no",
            eval_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            gradient_checkpointing=False,
            bf16=cuda,
            use_cpu=not cuda,
        )
        ids = prompts(args, args.rollouts * (args.iters + 1)).tolist()
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer(args.vocab),
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=critic,
            train_dataset=Dataset.from_dict({"input_ids": ids}),
        )
        trainer.add_callback(watch)
        trainer.train()
    seconds = median(watch.seconds[1:] or watch.seconds)
    found = {
        "who": "trl",
        "iter_s": [round(x, 3) for x in watch.seconds],
        "median": round(seconds, 4),
        "peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20 if cuda else 0,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
