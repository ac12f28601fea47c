"""What does not fit together is refused before anything is computed, and says why."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from mossrlhf import HFSampler, PPOMaxLoss, RewardShaper, ToyWorld, TrainerConfig, presets


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


def one_too_few(*, completions):
    return [0.0] * (len(completions) - 1)


def sometimes_nan(*, completions):
    return [0.0, float("nan")] * (len(completions) // 2)


def raises(*, completions, topic):
    raise KeyError("gone")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            one_too_few,
            "reward 'one_too_few' returned (7,) values for 8 completions, expected (8,), or ",
        ),
        (sometimes_nan, "reward 'sometimes_nan' returned nan for sample 1, '"),
        (
            raises,
            "reward 'raises' raised KeyError: 'gone'. It was called for 8 completions with "
            "['completions'] and the columns ['topic']; the first completion is '",
        ),
    ],
)
def test_a_reward_that_fails_is_named(make, reward, message):
    trainer = make(reward=reward)
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer.score(trainer.collect())


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "system", "content": "Be kind"}], "train_dataset: record 0 has no user turn"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "ends with the",
        ),
        ([], "record 0 has the prompt [], expected a string, or a list of messages"),
        (None, "record 0 has the prompt None, expected a string, or a list of messages"),
        ("", "train_dataset: record 0 has an empty prompt, expected a string, or messages"),
        ([{"role": "human", "content": "a"}], "a message of 'human', which chat templates do not"),
        ([{"from": "human", "value": "a"}], "expected {'role': 'user', 'content': text}"),
        ([{"role": "user", "content": None}], "expected {'role': 'user', 'content': text}"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "several parts of text"),
        ([5, 6], "record 0 has the message 5, expected {'role': 'user', 'content': text}"),
    ],
)
def test_prompts_that_leave_nothing_to_answer(make, prompt, message):
    """Found before any model is loaded; and wherever it stands."""
    good = [{"prompt": "help"}] * 3
    for index, dataset in ((0, [{"prompt": prompt}]), (3, [*good, {"prompt": prompt}])):
        with pytest.raises(
            ValueError, match=re.escape(message.replace("record 0", f"record {index}"))
        ):
            make(model="no/such/model", train_dataset=dataset)


def test_a_prompt_without_tokens_is_named(make):
    with pytest.raises(ValueError, match="the prompt '  ' has no tokens, expected at least one"):
        make(train_dataset=[{"prompt": "  "}]).collect()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: PPOMaxLoss(policy_clip=-0.2),
            "PPOMaxLoss(policy_clip=): got -0.2, expected a num",
        ),
        (
            lambda: PPOMaxLoss(value_clip=-1.0),
            "PPOMaxLoss(value_clip=): got -1.0, expected a number",
        ),
        (
            lambda: RewardShaper(clip=-1.0),
            "RewardShaper(clip=): got -1.0, expected a number in (0,",
        ),
        (lambda: presets.moss_rlhf_2023("fr"), "language: got 'fr', expected 'en' or 'zh'"),
        (lambda: ToyWorld(lang="fr"), "lang: got 'fr', expected one of ['en', 'zh']"),
        (
            lambda: PPOMaxLoss(cliprange=0.2),
            "'cliprange'; here that is PPOMaxLoss(policy_clip=)",
        ),
    ],
)
def test_options_of_components(build, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        build()


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
    with pytest.raises(ValueError, match="reward: its model has 50 tokens"):
        make(reward=other)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_output_directory_that_cannot_be_written(make, monkeypatch, code):
    """Before any model is loaded. (Tests may be run by root, who may write anywhere.)"""

    def refused(path, text):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "write_text", refused)
    message = rf"output_dir: '.*run' cannot be written to .*{os.strerror(code)}.*; choose another"
    with pytest.raises(OSError, match=message):
        make(model="no/such/model")


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
        (dict(learning_rate=None), "TrainerConfig(learning_rate=None): it cannot be None"),
        (
            dict(learning_rate="1e-5"),
            "TrainerConfig(learning_rate=): got '1e-5', expected a number",
        ),
        (dict(adam_beta1=1.5), "TrainerConfig(adam_beta1=): got 1.5, expected a number in [0, 1]"),
        (dict(lr_scheduler_type="cosin"), "did you mean 'cosine'?"),
        (dict(lr_scheduler_type="reduce_lr_on_plateau"), "expected one of constant, constant_with"),
        (dict(gae_lambda=0.9), "'gae_lambda'; here that is AdvantageEstimator(lam=)"),
    ],
)
def test_options(options, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        TrainerConfig(**options)
