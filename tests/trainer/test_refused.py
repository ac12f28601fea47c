"""What does not fit together is refused before anything is computed, and says why."""

import os
import re

import pytest
import torch
from transformers import GenerationConfig

from mossrlhf import HFSampler, PPOMaxLoss, TrainerConfig


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (dict(loss=PPOMaxLoss(ptx_coef=0.1)), "there is no pre-training data; pass Trainer(ptx"),
        (
            dict(loss=PPOMaxLoss(entropy_coef=0.01, entropy_target=35.0)),
            "PPOMaxLoss(entropy_target=35.0): a distribution over 185 tokens has at most ln 185 = "
            "5.2 nats, so the target would never bind; set one below that",
        ),
        (dict(train_dataset=[]), "train_dataset: it is empty"),
        (dict(train_dataset=[{"text": "hello"}]), "expected one called 'prompt'"),
        (dict(reward=[]), "expected at least one reward"),
        (dict(reward=3), "reward: got 3, expected a reward model"),
        (dict(args=dict(max_prompt_length=250)), "do not fit into the model's context of 256"),
        (
            dict(generation_config=GenerationConfig(max_new_tokens=300)),
            "do not fit into the model's context",
        ),
        (dict(generation_config=GenerationConfig()), "max_new_tokens is None"),
        (
            dict(train_dataset=[{"prompt": "help " * 300}]),
            "train_dataset: 1 of its longest prompts do not fit; that of record 0 takes 300 tokens",
        ),
        (
            dict(eval_dataset=[{"prompt": "help " * 300}]),
            "eval_dataset: 1 of its longest prompts do not fit",
        ),
        (dict(model=torch.nn.Linear(2, 2)), "model: got Linear, expected a causal language model"),
    ],
)
def test_refused(make, parts, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        make(**parts).collect()


def test_a_sampler_and_a_generation_config_are_one_too_many(make, world):
    sampler = HFSampler.for_tokenizer(world.tokenizer(), GenerationConfig(max_new_tokens=4))
    with pytest.raises(ValueError, match="give it to the sampler instead"):
        make(sampler=sampler, generation_config=GenerationConfig(max_new_tokens=4))
    assert make(sampler=sampler).sampler is sampler


def test_critic_of_another_vocabulary(make, policy):
    from mossrlhf import RewardModel

    other = RewardModel.from_language_model(policy(vocab_size=50))
    with pytest.raises(ValueError, match="critic: its vocabulary has 50 tokens, the policy's"):
        make(critic=other)


def test_reward_model_of_another_vocabulary(make, policy):
    from mossrlhf import RewardModel

    other = RewardModel.from_language_model(policy(vocab_size=50))
    with pytest.raises(ValueError, match="reward: its model knows 50 tokens"):
        make(reward=other)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_directory_that_cannot_be_written(make, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="cannot be written to"):
        make()


def test_output_directory_that_is_a_file(make, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match=r"output_dir: .* cannot be written to"):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kl_coef=0.1), "here that is RewardShaper(kl_coef=)"),
        (dict(lerning_rate=0.1), "did you mean 'learning_rate'?"),
        (dict(learning_rate=-1.0), "expected a number in [0, inf]"),
        (dict(rollout_size=4, minibatch_size=8), "lower minibatch_size"),
        (dict(rollout_size=9, samples_per_prompt=2), "make rollout_size a multiple"),
        (dict(minibatch_size=0), "TrainerConfig(minibatch_size=): got 0"),
    ],
)
def test_options(options, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        TrainerConfig(**options)
