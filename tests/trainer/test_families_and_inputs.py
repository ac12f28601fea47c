"""What works elsewhere works here: families, tokenizers, precisions, prompts and rewards."""

from typing import Any

import pytest
import torch
from families import FAMILIES, WINDOW, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mossrlhf import RewardModel, ToyWorld
from mossrlhf.models import policy_stats

LENGTHS = (2, 5, 3, 9, 1, 7)
GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False)


def brevity(*, completion_ids, **columns):
    """Return more for less."""
    return [-len(ids) / 10 for ids in completion_ids]


def ragged(world: ToyWorld, repeat: int = 6) -> list[dict[str, str]]:
    """Prompts from one word to more than a window of attention."""
    words = " ".join(world.language.vocabulary[:40]).split()
    return [{"prompt": " ".join(words[n : 2 * n])} for n in LENGTHS] * repeat


def learn(trainer: Any, parameters: Any) -> list[dict[str, Any]]:
    """Train, and hold a run to what every run owes."""
    before = parameters(trainer.model)
    first: list[torch.Tensor] = []
    step = trainer.engine.step

    def watched(minibatch: Any, *rest: Any) -> Any:
        if not first:
            now = policy_stats(trainer.policy, minibatch, trainer.model.temperature).logprob
            first.append(now.detach() - minibatch.logprobs[minibatch.mask])
        return step(minibatch, *rest)

    trainer.engine.step = watched
    history = trainer.train()
    assert first[0].abs().max() < 1e-4, "the first minibatch is on-policy: its ratios are 1"
    assert history[0]["kl/ref_per_sequence"] == pytest.approx(0, abs=1e-4)
    moved = parameters(trainer.model)
    assert bool(moved.isfinite().all())
    assert not torch.equal(moved, before)
    return history


# ---- families -----------------------------------------------------------------------------------


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family's name in turn."""
    return request.param


@torch.no_grad()
def test_a_family_answers_and_is_scored_as_it_would_be_alone(make, world, family):
    """The oracle runs every sequence alone: no padding, no cache, all logits, in float64."""
    model = tiny(family, world.tokenizer())
    trainer = make(
        model=model, reward=brevity, train_dataset=ragged(world), generation_config=GREEDY
    )
    torch.nn.init.normal_(trainer.critic.score.weight)
    rollout = trainer.annotate(trainer.collect())
    assert int((rollout.prompt_lengths + rollout.response_lengths).max()) > 2 * WINDOW
    for b, (prompt, response) in enumerate(
        zip(rollout.prompts(), rollout.completions(), strict=True)
    ):
        ids = torch.tensor([prompt + response])
        states = slice(len(prompt) - 1, ids.shape[1] - 1)
        logits = model(ids, use_cache=False).logits[0, states].double()
        assert logits.argmax(-1).tolist() == response, f"row {b}: drawn with other positions"
        logp = logits.log_softmax(-1)
        kept = rollout.mask[b]
        alone = logp.gather(1, ids[0, len(prompt) :, None])[:, 0]
        exact = {"atol": 2e-5, "rtol": 2e-5, "check_dtype": False}
        torch.testing.assert_close(rollout.logprobs[b][kept], alone, **exact)
        torch.testing.assert_close(rollout.ref_logprobs[b][kept], alone, **exact)
        hidden = trainer.critic.backbone(ids, use_cache=False).last_hidden_state[0, states]
        values = hidden @ trainer.critic.score.weight[0]
        torch.testing.assert_close(rollout.values[b][kept], values, **exact)


def test_a_family_learns_and_is_saved(make, world, parameters, family, tmp_path):
    trainer = make(
        model=tiny(family, world.tokenizer()), reward=brevity, train_dataset=ragged(world)
    )
    learn(trainer, parameters)
    trainer.save_model(tmp_path / "saved")
    ids = torch.arange(5, 15)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "policy").eval()
    assert type(loaded) is type(trainer.policy)
    critic = RewardModel.from_pretrained(tmp_path / "saved" / "critic").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.policy(ids).logits)
        everywhere = torch.ones_like(ids)
        assert torch.equal(
            critic.token_values(ids, everywhere), trainer.critic.token_values(ids, everywhere)
        )


@pytest.mark.parametrize("tied", [True, False])
def test_heads_stay_tied_or_apart(make, world, parameters, tmp_path, tied):
    policy = tiny("llama", world.tokenizer(), tie_word_embeddings=tied)
    trainer = make(model=policy, reward=brevity)
    learn(trainer, parameters)
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "policy")
    for model in (trainer.policy, loaded):
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert torch.equal(loaded.lm_head.weight, trainer.policy.lm_head.weight)


# ---- precisions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_checkpoints(make, world, parameters, tmp_path, dtype, autocast):
    """What transformers would load in half precision is trained in float32."""
    tiny("llama", world.tokenizer()).to(dtype).save_pretrained(tmp_path / "policy")
    world.tokenizer().save_pretrained(tmp_path / "policy")
    reward_model = RewardModel.from_language_model(tiny("llama", world.tokenizer(), seed=1))
    torch.nn.init.normal_(reward_model.score.weight)
    reward_model.to(dtype).save_pretrained(tmp_path / "reward")
    world.tokenizer().save_pretrained(tmp_path / "reward")
    trainer = make(
        model=tmp_path / "policy",
        processing_class=None,
        reward=tmp_path / "reward",
        args=dict(bf16=autocast, learning_rate=1e-5),
    )
    before = parameters(trainer.policy)
    if autocast:
        trainer.train()
    else:
        learn(trainer, parameters)
    for model in (trainer.policy, trainer.critic):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    # A step of 1e-5 is lost in the rounding of weights of this size in half precision.
    assert (parameters(trainer.policy) != before).float().mean() > 0.9


# ---- tokenizers and ends ------------------------------------------------------------------------


def without_padding(world: ToyWorld) -> tuple[PreTrainedModel, Any]:
    """A tokenizer and a model that name no padding token."""
    tokenizer = world.tokenizer()
    model = tiny("llama", tokenizer, pad_token_id=None)
    tokenizer.pad_token = None
    return model, tokenizer


def padded_with_the_end(world: ToyWorld) -> tuple[PreTrainedModel, Any]:
    """A tokenizer and a model that pad with what ends a response."""
    tokenizer = world.tokenizer()
    model = tiny("llama", tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    # Set before the model is made, torch's Embedding would keep this token's gradient from it.
    model.config.pad_token_id = tokenizer.eos_token_id
    return model, tokenizer


@pytest.mark.parametrize("parts", [without_padding, padded_with_the_end])
@pytest.mark.parametrize("judge", ["function", "model"])
def test_the_padding_token_is_of_no_consequence(make, world, parameters, parts, judge):
    """Every number is that of a run with a padding token of its own."""

    def rewards(model: PreTrainedModel) -> Any:
        if judge == "function":
            return brevity
        made = RewardModel.from_language_model(model)
        torch.manual_seed(1)
        torch.nn.init.normal_(made.score.weight)
        return made

    # By this seed some responses end, and none has the usual padding token, whose embedding torch
    # keeps as it is.
    histories = []
    usual = tiny("llama", world.tokenizer()), world.tokenizer()
    for name, (model, tokenizer) in {"usual": usual, "other": parts(world)}.items():
        trainer = make(
            name, model=model, reward=rewards(model), processing_class=tokenizer, args={"seed": 30}
        )
        histories.append((learn(trainer, parameters), parameters(trainer.policy)))
    (usually, policy), (other, policy_other) = histories
    assert torch.equal(policy, policy_other)
    timeless = [
        {k: v for k, v in h[-1].items() if not k.startswith("time")} for h in (usually, other)
    ]
    assert timeless[0] == timeless[1]


def test_several_ends(make, world, parameters):
    """A response ends at whichever comes first, and that one belongs to it."""
    tokenizer = world.tokenizer()
    ends = [tokenizer.eos_token_id, 20, 21, 22, 23, 24]
    config = GenerationConfig(max_new_tokens=12, eos_token_id=ends)
    trainer = make(model=tiny("llama", tokenizer), reward=brevity, generation_config=config)
    rollout = trainer.collect()
    last = [ids[-1] for ids in rollout.completions()]
    assert rollout.truncated.tolist() == [token not in ends for token in last]
    assert len(set(last) & set(ends)) > 1
    assert not any(set(ids[:-1]) & set(ends) for ids in rollout.completions())
    learn(trainer, parameters)


def test_no_end_ever(make, world, parameters):
    policy = tiny("gpt2", world.tokenizer())
    # A model that says one thing only.
    with torch.no_grad():
        policy.transformer.ln_f.bias.copy_(policy.lm_head.weight[30] * 1e3)
    config = GenerationConfig(max_new_tokens=6)
    trainer = make(model=policy, reward=brevity, generation_config=config)
    assert trainer.collect().truncated.all()
    history = learn(trainer, parameters)
    assert history[-1]["response/truncated_fraction"] == 1
    assert history[-1]["response/length_tokens"] == 6


def test_responses_of_one_token(make, world, parameters):
    trainer = make(
        reward=brevity,
        train_dataset=ragged(world),
        generation_config=GenerationConfig(max_new_tokens=1),
    )
    history = learn(trainer, parameters)
    assert history[-1]["response/length_tokens"] == 1


# ---- prompts ------------------------------------------------------------------------------------


def test_one_prompt(make, world, parameters):
    trainer = make(reward=brevity, train_dataset=world.prompts(1))
    assert len({tuple(ids) for ids in trainer.collect().prompts()}) == 1
    learn(trainer, parameters)
    one = dict(total_steps=1, rollout_size=1, minibatch_size=1)
    single = make("one", reward=brevity, train_dataset=world.prompts(1), args=one)
    assert len(learn(single, parameters)) == 1


def test_minibatches_that_do_not_come_out_even(make, world, parameters):
    trainer = make(
        reward=brevity,
        train_dataset=ragged(world),
        args=dict(rollout_size=7, minibatch_size=3, micro_batch_size=2),
    )
    sizes: list[int] = []
    step = trainer.engine.step

    def watched(minibatch: Any, *rest: Any) -> Any:
        sizes.append(len(minibatch))
        return step(minibatch, *rest)

    trainer.engine.step = watched
    learn(trainer, parameters)
    assert sizes == [3, 3, 1] * 2


def test_strings_and_messages_are_the_same_prompt(make, world):
    tokenizer = world.tokenizer()
    messages = [{"role": "user", "content": "help me"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    rows = [
        make(name, train_dataset=[{"prompt": prompt}] * 8).collect().prompts()[0]
        for name, prompt in {"text": text, "messages": messages}.items()
    ]
    assert rows[0] == rows[1]


# ---- rewards ------------------------------------------------------------------------------------


def test_a_reward_that_has_no_opinion_on_some(make, world, parameters):
    """None leaves a response out of that reward; where none judges it, its score is missing."""

    def picky(*, completion_ids, **columns):
        return [None if i % 2 else 1.0 for i, _ in enumerate(completion_ids)]

    trainer = make(reward=[picky, brevity])
    rollout = trainer.score(trainer.collect())
    lengths = rollout.response_lengths.float()
    torch.testing.assert_close(rollout.scores[1::2], -lengths[1::2] / 10)
    torch.testing.assert_close(rollout.scores[::2], 1 - lengths[::2] / 10)
    learn(trainer, parameters)
    history = learn(make("alone", reward=picky), parameters)
    assert history[-1]["reward/score_mean"] == 1
    silent = make("silent", reward=lambda *, completions, **columns: [None] * len(completions))
    silent.train()


def test_a_reward_model_of_another_tokenizer_and_family(make, world, parameters, tmp_path):
    """It reads the dialogue in its own tokens and template; the oracle is transformers' own."""
    words = sorted({word for word in world.tokenizer().get_vocab() if "<" not in word})
    core = Tokenizer(
        WordLevel({w: i for i, w in enumerate(["[NO]", "[END]", *words])}, unk_token="[NO]")
    )
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[NO]",
        eos_token="[END]",
        chat_template="{% for m in messages %}{{ m.content + ' ' }}"
        "{% if m.role != 'user' %}[END] {% endif %}{% endfor %}",
    )
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, num_labels=1,
        pad_token_id=None, bos_token_id=None, eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    trainer = make(model=tiny("qwen2", world.tokenizer()), reward=tmp_path / "reward")
    rollout = trainer.score(trainer.collect())
    for b, response in enumerate(rollout.completions()):
        ends = {"user": "", "assistant": "[END]"}
        turns = rollout.columns["prompt"][b]
        said = [f"{turn['content']} {ends[turn['role']]}" for turn in turns]
        said.append(world.tokenizer().decode(response, skip_special_tokens=True))
        said.append("" if rollout.truncated[b] else "[END]")
        ids = tokenizer(" ".join(said))["input_ids"]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, 0]
        torch.testing.assert_close(rollout.scores[b], expected)
    assert rollout.scores.std() > 0.01
    learn(trainer, parameters)
    assert type(trainer.critic.backbone).__name__ == "Qwen2Model"
