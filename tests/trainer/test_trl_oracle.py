"""`presets.trl_ppo()` against TRL 1.12.0 itself, by numbers of tools/make_trl_golden.py.

Same weights, same rollout: ragged, with responses that end at once, early, with their last token,
or not at all. Before the first optimizer step, and before the second, where clips bind.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from mossrlhf import ModelReward, Rollout, Trainer, presets
from mossrlhf.rewards import as_reward_model

GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "trl_ppo.safetensors")
PAD, EOS, LIMIT, TEMPERATURE = 0, 2, 8, 0.7
SHAPE = dict(
    vocab_size=24,
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


def weights(prefix):
    """The golden tensors below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in GOLDEN.items() if k.startswith(prefix)}


def language_model(prefix):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.load_state_dict({k: v for k, v in weights(prefix).items() if "grad." not in k})
    return model.eval()


def classifier(prefix):
    model = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1))
    model.load_state_dict({k: v for k, v in weights(prefix).items() if "grad." not in k})
    return as_reward_model(model.eval())


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(24)}, unk_token="t3"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="t0", bos_token="t1", eos_token="t2"
    )


@pytest.fixture
def rollout():
    """TRL's rollout without its padding, in our layout."""
    rows, prompt_lengths, lengths, truncated = [], [], [], []
    for prompt, response in zip(GOLDEN["prompts"], GOLDEN["responses"], strict=True):
        prompt = prompt[prompt != PAD]
        ends = (response == EOS).nonzero()
        length = int(ends[0]) + 1 if len(ends) else LIMIT
        rows.append(torch.cat([prompt, response[:length]]))
        prompt_lengths.append(len(prompt))
        lengths.append(length)
        truncated.append(not len(ends))
    lengths = torch.tensor(lengths)
    return Rollout(
        input_ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        prompt_lengths=torch.tensor(prompt_lengths),
        response_lengths=lengths,
        truncated=torch.tensor(truncated),
        mask=torch.arange(LIMIT) < lengths[:, None],
    ).with_end_states(LIMIT)


@pytest.fixture
def trainer(tmp_path, tokenizer, rollout):
    preset = presets.trl_ppo(
        output_dir=str(tmp_path), rollout_size=6, num_ppo_epochs=2, disable_tqdm=True
    )
    preset["generation_config"].max_new_tokens = LIMIT
    return Trainer(
        language_model("0.policy."),
        ref_model=language_model("reference."),
        critic=classifier("0.critic."),
        reward=ModelReward(model=classifier("reward."), name="reward_model"),
        train_dataset=[{"prompt": "t5"}],
        processing_class=tokenizer,
        **preset,
    )


@pytest.fixture
def estimated(trainer, rollout):
    return trainer.estimate(trainer.annotate(trainer.score(rollout)))


@pytest.mark.parametrize(
    "name", ["logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"]
)
def test_rollout(estimated, name):
    ours, theirs = getattr(estimated, name), GOLDEN[name]
    # Our tensors are one longer where a state follows the last token that TRL has none for.
    where = estimated.states if name in ("values", "rewards", "returns") else estimated.mask
    width = theirs.shape[1]
    assert not where[:, width:].any()
    torch.testing.assert_close(
        ours[:, :width][where[:, :width]], theirs[where[:, :width]], rtol=0, atol=1e-5
    )


def test_scores(estimated):
    torch.testing.assert_close(estimated.scores, GOLDEN["scores"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", [0, 1])
def test_losses_and_gradients(trainer, estimated, step):
    """Of the whole minibatch; the second step is off-policy, with both clips at work."""
    policy, critic = trainer.policy, trainer.critic
    policy.load_state_dict(language_model(f"{step}.policy.").state_dict())
    critic.load_state_dict(classifier(f"{step}.critic.").state_dict())
    stats = {}
    minibatch = trainer.loss.prepare(estimated, trainer.engine.reduce)
    for role in ("critic", "policy"):
        trainer.engine._backward(role, [minibatch], trainer.loss, stats)
    assert stats["policy/loss"].item() == pytest.approx(GOLDEN[f"{step}.pg_loss"].item(), abs=1e-5)
    assert stats["critic/loss"].item() == pytest.approx(GOLDEN[f"{step}.vf_loss"].item(), abs=1e-5)
    clipped = stats["policy/clip_fraction"] * estimated.mask.sum()
    assert round(clipped.item()) == int(GOLDEN[f"{step}.clipped"])
    theirs = weights(f"{step}.policy.grad.")
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-5, atol=1e-5)
    theirs = weights(f"{step}.critic.grad.")
    ours = {f"model.{n}": p.grad for n, p in critic.backbone.named_parameters()}
    ours["score.weight"] = critic.score.weight.grad
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-5)
