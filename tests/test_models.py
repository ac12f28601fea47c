"""Alignment by hand, and reward models that are transformers' own on disk and in numbers."""

import json
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from mossrlhf.functional import token_stats
from mossrlhf.models import (
    ActorCritic,
    RewardModel,
    ValueHead,
    language_model_loss,
    policy_stats,
    token_path,
    whole_logits,
)
from mossrlhf.models.padding import looks_back
from mossrlhf.options import accepts
from mossrlhf.types import LossOutput, Rollout

V, PAD = 23, 22
LLAMA = dict(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    pad_token_id=PAD,
    initializer_range=0.3,
)
GPT2 = dict(
    vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=PAD,
    bos_token_id=PAD, eos_token_id=V - 2, initializer_range=0.3,
)  # fmt: skip
CLASSIFIERS = {
    "llama": lambda **more: LlamaForSequenceClassification(LlamaConfig(**LLAMA, **more)),
    "gpt2": lambda **more: GPT2ForSequenceClassification(GPT2Config(**GPT2, **more)),
}
LANGUAGE_MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
}
families = pytest.mark.parametrize("family", ["llama", "gpt2"])


@pytest.fixture
def batch():
    """Prompts of 3 and 1 tokens, responses of 2 and 4 with a hole; no token is the padding."""
    return Rollout(
        input_ids=torch.tensor([[1, 2, 3, 4, 5], [6, 7, 9, 10, 11]]),
        prompt_lengths=torch.tensor([3, 1]),
        response_lengths=torch.tensor([2, 4]),
        truncated=torch.tensor([False, False]),
        mask=torch.tensor([[True, True, False, False], [True, True, False, True]]),
    )


def padded(rows, side, more=0):
    """Rows of ids as a batch with its attention mask, padded on one side."""
    width = max(map(len, rows)) + more
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[b, place], mask[b, place] = torch.tensor(row), True
    return ids, mask


class TestAlignment:
    """Models whose answer at each position is known."""

    class Successor(nn.Module):
        """Position i: logit i + 1 on the token after that at i, and 0 on the others."""

        def forward(self, input_ids, attention_mask, use_cache):
            strength = 1.0 + torch.arange(input_ids.shape[1]).expand_as(input_ids)
            following = nn.functional.one_hot((input_ids + 1) % V, V)
            return SimpleNamespace(logits=strength[..., None] * following)

    class Positions(RewardModel):
        """A critic that answers with the position itself."""

        def __init__(self):
            nn.Module.__init__(self)

        def token_values(self, input_ids, attention_mask, right_padded=None):
            return torch.arange(input_ids.shape[1]).expand_as(input_ids).float()

    def test_log_probability_of_a_token_comes_from_one_position_before(self, batch):
        got = policy_stats(self.Successor(), batch).logprob
        # Row 0: tokens 4 and 5 follow 3 and 4, which stand at positions 2 and 3: logits 3 and 4.
        # Row 1: token 7 follows 6 at position 0: logit 1; 9 does not follow 7 at position 1, where
        # 8 has logit 2; (10 is a hole); 11 follows 10 at position 3: logit 4.
        chosen, on = (
            torch.tensor([3.0, 4.0, 1.0, 0.0, 4.0]),
            torch.tensor([3.0, 4.0, 1.0, 2.0, 4.0]),
        )
        expected = chosen - torch.log(torch.exp(on) + V - 1)
        torch.testing.assert_close(got, expected)

    def test_value_of_a_token_is_that_of_the_state_before_it(self, batch):
        values, after = ActorCritic(self.Successor(), self.Positions()).values(batch)
        # Token t of the response stands at prompt + t; the state before it at prompt + t − 1.
        assert values[0, :2].tolist() == [2, 3]
        assert values[1].tolist() == [0, 1, 2, 3]
        assert after.tolist() == [4, 4]  # the bootstrap: the state at the last token

    def test_more_padding_changes_nothing(self, batch):
        longer = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
        other = Rollout(
            input_ids=longer,
            prompt_lengths=torch.tensor([1]),
            response_lengths=torch.tensor([8]),
            truncated=torch.tensor([True]),
            mask=torch.ones(1, 8, dtype=torch.bool),
        )
        both = Rollout.concat([batch, other])
        model = ActorCritic(self.Successor(), self.Positions())
        alone = policy_stats(model.policy, batch).logprob
        torch.testing.assert_close(policy_stats(model.policy, both).logprob[: len(alone)], alone)
        assert model.values(both)[1].tolist() == [4, 4, 8]

    def test_state_after_the_end_is_the_one_at_the_last_token(self, batch):
        model = ActorCritic(self.Successor(), self.Positions())
        widened = batch.with_end_states(limit=8)
        got = model("critic", widened, lambda value: LossOutput(value.sum(), {"value": value}))
        # Row 0: tokens at 2, 3, end at 4; row 1: tokens at 0, 1, 3 (2 is the hole's), end at 4.
        assert got.stats["value"].tolist() == [2, 3, 4, 0, 1, 3, 4]


class TestPolicyStats:
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    @families
    def test_equals_full_logits_row_by_row(self, batch, family, temperature):
        """The oracle runs every sequence alone, without padding, over its full logits."""
        model = LANGUAGE_MODELS[family]().eval()
        got = policy_stats(model, batch, temperature, entropy=True)
        logprobs, entropies = [], []
        for b, prompt in enumerate(batch.prompt_lengths.tolist()):
            ids = torch.tensor(batch.prompts()[b] + batch.completions()[b])
            logits = model(ids[None]).logits[0].double() / temperature
            for t in batch.mask[b].nonzero().flatten().tolist():
                logp = logits[prompt + t - 1].log_softmax(-1)
                logprobs.append(logp[ids[prompt + t]])
                entropies.append(-(logp.exp() * logp).sum())
        exact = {"atol": 1e-5, "rtol": 0, "check_dtype": False}
        torch.testing.assert_close(got.logprob, torch.stack(logprobs), **exact)
        torch.testing.assert_close(got.entropy, torch.stack(entropies), **exact)

    def test_the_head_is_spared_the_prompts(self, batch):
        """By whole logits, by those that `logits_to_keep` leaves, and by hidden states."""
        model = LANGUAGE_MODELS["llama"]().eval()
        asked = []

        class Forgetful(nn.Module):
            """The same model, which cannot leave logits out."""

            def forward(self, input_ids, attention_mask, use_cache):
                return model(input_ids, attention_mask, use_cache=use_cache)

        assert token_path(model).by_hidden
        # A hook is there to be called, so the head is taken as a module.
        model.lm_head.register_forward_hook(lambda *call: asked.append(call[1][0].shape[-2]))
        short = batch.select(torch.tensor([0]))
        hidden, full = policy_stats(model, short), policy_stats(Forgetful(), short)
        with whole_logits():
            kept = policy_stats(model, short)
        # Two response tokens; all five positions; the tokens and the place before them.
        assert asked == [2, 5, 3]
        for got in (hidden, kept):
            torch.testing.assert_close(got.logprob, full.logprob, rtol=0, atol=1e-6)
        assert accepts(model, "logits_to_keep")
        assert not accepts(Forgetful(), "logits_to_keep")

    # peft 0.21 asks transformers 5.23 for a property that has another name now.
    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
    def test_adapters_are_looked_through(self):
        adapted = peft.get_peft_model(LANGUAGE_MODELS["llama"](), peft.LoraConfig(r=2))
        assert accepts(adapted, "logits_to_keep")

    def test_bf16_models_are_scored_in_float32(self, batch):
        """From their hidden states on: as if the head alone were in float32."""
        model = LANGUAGE_MODELS["llama"]().bfloat16().eval()
        got = policy_stats(model, batch, entropy=True)
        hidden = model.model(batch.input_ids, batch.attention_mask.long()).last_hidden_state
        rows, at = batch.mask.nonzero()[:, 0], batch.state_index[batch.mask]
        logits = hidden[rows, at].float() @ model.lm_head.weight.float().T
        expected = token_stats(logits, batch.response_ids[batch.mask])
        assert got.logprob.dtype == got.entropy.dtype == torch.float32
        torch.testing.assert_close(vars(got), vars(expected))
        with whole_logits():
            rounded = policy_stats(model, batch, entropy=True)
        assert rounded.logprob.dtype == torch.float32
        assert (rounded.logprob - expected.logprob).abs().max() > 1e-4

    def test_language_model_loss(self):
        model = LANGUAGE_MODELS["llama"]().eval()
        ids, mask = padded([[1, 2, 3, 4], [5, 6]], "right")
        labels = ids.masked_fill(~mask, -100)
        labels[0, :2] = -100  # a prompt
        loss, count = language_model_loss(
            model, {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
        )
        mean = model(ids, mask.long(), labels=labels).loss  # transformers' own
        assert count.item() == 3
        torch.testing.assert_close(loss / count, mean)


class TestValueHead:
    def test_starts_at_zero(self):
        assert ValueHead(4, bias=True)(torch.randn(2, 3, 4)).tolist() == [[0] * 3] * 2
        assert ValueHead(4, zero=False)(torch.randn(2, 3, 4)).abs().min() > 0

    @pytest.mark.parametrize("bias", [False, True])
    def test_is_a_dot_product_in_float32(self, bias):
        head = ValueHead(4, bias=bias, zero=False)
        hidden = torch.randn(2, 3, 4).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = head(hidden)
        expected = hidden.double().numpy() @ head.weight.detach().double().numpy()[0]
        expected += head.bias.item() if bias else 0.0
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), torch.from_numpy(expected), rtol=0, atol=1e-6)

    def test_a_bf16_head_answers_in_float32(self):
        assert ValueHead(4).bfloat16()(torch.randn(1, 2, 4).bfloat16()).dtype == torch.float32


class TestRewardModel:
    ROWS = ([1, 2, 3], [4, 5, 6, 7, 8], [9])

    @families
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("more", [0, 3])
    def test_padding_changes_no_number(self, family, side, more):
        classifier = CLASSIFIERS[family](num_labels=1).eval()
        head = ValueHead(16)
        head.weight = classifier.score.weight
        model = RewardModel(classifier.base_model, head)
        alone = [model(*padded([row], "right")).item() for row in self.ROWS]
        ids, mask = padded(self.ROWS, side, more)
        torch.testing.assert_close(model(ids, mask), torch.tensor(alone), atol=1e-5, rtol=0)
        torch.testing.assert_close(model(ids, mask.long()), model(ids, mask))
        values = model.token_values(ids, mask)
        tokens = torch.cat([model.token_values(*padded([r], "right"))[0] for r in self.ROWS])
        torch.testing.assert_close(values[mask], tokens, atol=1e-5, rtol=0)
        assert values.dtype == torch.float32

    def test_nothing_is_cached(self, batch):
        model = RewardModel.from_language_model(LANGUAGE_MODELS["llama"]())
        looks_back(model.backbone)  # asks twice, beforehand
        caches = []
        model.backbone.register_forward_hook(lambda *call: caches.append(call[2].past_key_values))
        model(batch.input_ids, batch.attention_mask)
        assert caches == [None]

    @families
    def test_loads_what_transformers_saves(self, family, tmp_path):
        theirs = CLASSIFIERS[family](num_labels=1).eval()
        theirs.save_pretrained(tmp_path)
        ours = RewardModel.from_pretrained(tmp_path).eval()
        ids, mask = padded(self.ROWS, "right")
        torch.testing.assert_close(
            ours(ids, mask), theirs(ids, attention_mask=mask.long()).logits[:, 0]
        )
        assert ours.state_dict().keys() == theirs.state_dict().keys()

    @families
    def test_transformers_loads_what_it_saves(self, family, tmp_path):
        ours = RewardModel.from_language_model(LANGUAGE_MODELS[family]()).eval()
        nn.init.normal_(ours.score.weight)
        ours.save_pretrained(tmp_path)
        theirs, info = AutoModelForSequenceClassification.from_pretrained(
            tmp_path, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert type(theirs) is type(CLASSIFIERS[family]())
        ids, mask = padded(self.ROWS, "right")
        scores = theirs.eval()(ids, attention_mask=mask.long()).logits[:, 0]
        torch.testing.assert_close(scores, ours(ids, mask))
        again = RewardModel.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(ids, mask), ours(ids, mask), rtol=0, atol=0)

    @pytest.mark.parametrize("ends", [PAD, [5, PAD]])
    def test_a_pad_token_that_ends_responses_is_warned_of(self, ends, tmp_path):
        """Then transformers reads another score: that of the token before the end."""
        ours = RewardModel.from_language_model(LANGUAGE_MODELS["llama"]()).eval()
        nn.init.normal_(ours.score.weight)
        ours.config.eos_token_id = ends
        with pytest.warns(UserWarning, match=rf"pad_token_id is {PAD}.*one token early.*Set"):
            ours.save_pretrained(tmp_path)
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        finished, unfinished = torch.tensor([[1, 2, 3, PAD]]), torch.tensor([[1, 2, 3]])
        ones = torch.ones(1, 4)
        assert theirs(finished).logits.item() == pytest.approx(
            ours(unfinished, ones[:, :3]).item(), abs=1e-4
        )
        assert abs(theirs(finished).logits.item() - ours(finished, ones).item()) > 1e-3

    @pytest.mark.parametrize(("pad", "ends"), [(PAD, 5), (PAD, None), (0, [5, PAD])])
    def test_any_other_pad_token_is_not(self, pad, ends, tmp_path):
        ours = RewardModel.from_language_model(LANGUAGE_MODELS["llama"]())
        ours.config.pad_token_id, ours.config.eos_token_id = pad, ends
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours.save_pretrained(tmp_path)
        assert not [str(w.message) for w in caught if "pad_token_id" in str(w.message)]

    def test_no_pad_token_is_warned_of(self, tmp_path):
        """Then transformers takes one sequence at a time."""
        ours = RewardModel.from_language_model(LANGUAGE_MODELS["llama"]()).eval()
        ours.config.pad_token_id = None
        with pytest.warns(UserWarning, match="pad_token_id is None, .* one sequence at a time"):
            ours.save_pretrained(tmp_path)
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        with pytest.raises(ValueError, match="batch sizes > 1"):
            theirs(torch.tensor([[1, 2], [3, 4]]))

    def test_the_dtype_comes_back(self, tmp_path):
        model = RewardModel.from_language_model(LANGUAGE_MODELS["llama"]()).bfloat16()
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
        assert RewardModel.from_pretrained(tmp_path).score.weight.dtype == torch.float32
        half = RewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}

    @families
    def test_starts_as_a_copy_of_a_language_model_that_says_zero(self, family, batch):
        language_model = LANGUAGE_MODELS[family]()
        before = {k: v.clone() for k, v in language_model.state_dict().items()}
        model = RewardModel.from_language_model(language_model)
        copied = {k: v.clone() for k, v in model.backbone.state_dict().items()}
        torch.testing.assert_close(copied, dict(language_model.base_model.state_dict()))
        assert model(batch.input_ids, batch.attention_mask).tolist() == [0, 0]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        model.config.pad_token_id = 1
        torch.testing.assert_close(dict(language_model.state_dict()), before)
        assert language_model.config.pad_token_id == PAD

    def test_starts_in_float32_from_a_folder_of_any_precision(self, tmp_path):
        LANGUAGE_MODELS["llama"]().bfloat16().save_pretrained(tmp_path)
        assert RewardModel.from_language_model(tmp_path).backbone.dtype == torch.float32
        kept = RewardModel.from_language_model(tmp_path, dtype=torch.bfloat16)
        assert kept.backbone.dtype == torch.bfloat16

    def test_starts_from_a_folder(self, tmp_path):
        language_model = LANGUAGE_MODELS["llama"]()
        language_model.save_pretrained(tmp_path)
        model = RewardModel.from_language_model(tmp_path)
        torch.testing.assert_close(
            dict(model.backbone.state_dict()), dict(language_model.base_model.state_dict())
        )

    def test_a_language_model_has_no_head(self, tmp_path):
        LANGUAGE_MODELS["llama"]().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"missing.*score.*from_language_model"):
            RewardModel.from_pretrained(tmp_path)

    def test_a_head_of_another_name_is_refused(self, tmp_path):
        config = BertConfig(
            vocab_size=V, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=8, num_labels=1,
        )  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"BertForSeq.*not called 'score'.* pass reward=path"):
            RewardModel.from_pretrained(tmp_path)

    def test_several_labels_are_refused(self, tmp_path):
        CLASSIFIERS["llama"](num_labels=3).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="no sequence classifier with one label"):
            RewardModel.from_pretrained(tmp_path)

    def test_a_bias_that_cannot_be_written_is_not_lost_in_silence(self, tmp_path):
        backbone = LANGUAGE_MODELS["llama"]().base_model
        with pytest.raises(ValueError, match=r"score\.bias"):
            RewardModel(backbone, ValueHead(16, bias=True)).save_pretrained(tmp_path)

    def test_a_family_nobody_knows_is_refused(self, tmp_path):
        class Unknown(LlamaConfig):
            model_type = "unknown"

        model = RewardModel(LANGUAGE_MODELS["llama"]().base_model)
        model.config = Unknown(**LLAMA)
        with pytest.raises(ValueError, match="no model for Unknown"):
            model.save_pretrained(tmp_path)

    def test_device_is_that_of_the_head(self):
        assert RewardModel.from_language_model(LANGUAGE_MODELS["gpt2"]()).device.type == "cpu"


class TestActorCritic:
    @pytest.fixture
    def model(self):
        policy = LANGUAGE_MODELS["llama"]()
        critic = RewardModel.from_language_model(policy)
        nn.init.normal_(critic.score.weight)
        return ActorCritic(policy, critic, temperature=0.8)

    def moved(self, model):
        """Which half a loss has reached."""
        return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize("entropy", [False, True])
    def test_policy(self, model, batch, entropy):
        expected = policy_stats(model.policy, batch, 0.8, entropy)

        def loss(stats):
            torch.testing.assert_close(vars(stats), vars(expected))
            return LossOutput(stats.logprob.sum())

        model("policy", batch, loss, entropy=entropy).loss.backward()
        assert self.moved(model) == {"policy"}

    def test_critic(self, model, batch):
        expected = model.values(batch)[0][batch.mask]

        def loss(value):
            torch.testing.assert_close(value, expected)
            return LossOutput(value.sum())

        model("critic", batch, loss).loss.backward()
        assert self.moved(model) == {"critic"}

    def test_critic_values_are_those_of_the_reward_model(self, model, batch):
        """The value after the last token is the score of the whole sequence."""
        _, after = model.values(batch)
        scores = model.critic(batch.input_ids, batch.attention_mask)
        torch.testing.assert_close(after, scores)

    def test_ptx(self, model):
        ids, mask = padded([[1, 2, 3]], "right")
        data = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids}
        model("ptx", data, lambda loss, count: LossOutput(loss / count)).loss.backward()
        assert self.moved(model) == {"policy"}

    def test_nothing_is_cached_for_tokens_to_come(self, model, batch):
        looks_back(model.policy.model)  # asks as well, beforehand
        asked = []
        model.policy.model.register_forward_pre_hook(
            lambda module, args, kwargs: asked.append(kwargs["use_cache"]), with_kwargs=True
        )
        token_path(model.policy)  # asks by whole logits and by hidden states
        ids, mask = padded([[1, 2, 3]], "right")
        data = {"input_ids": ids, "attention_mask": mask, "labels": ids}
        for way in (nullcontext(), whole_logits()):
            with way:
                policy_stats(model.policy, batch)
                language_model_loss(model.policy, data)
        assert asked == [False] * 6

    def test_what_is_left_out(self, model, batch):
        """The policy's own temperature, and no entropy."""
        plain = ActorCritic(model.policy, model.critic)
        assert plain.temperature == 1.0
        got = policy_stats(model.policy, batch)
        assert got.entropy is None
        torch.testing.assert_close(got.logprob, policy_stats(model.policy, batch, 1.0).logprob)

    def test_unknown_role(self, model, batch):
        with pytest.raises(ValueError, match="role: got 'actor', expected 'policy'"):
            model("actor", batch, lambda stats: LossOutput(stats.logprob.sum()))

    def test_without_a_critic_there_are_no_values(self, model, batch):
        with pytest.raises(ValueError, match="critic: there is none"):
            ActorCritic(model.policy).values(batch)
