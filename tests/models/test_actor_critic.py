"""Alignment of log-probabilities and values by hand, and the roles of `ActorCritic`."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from families import tiny
from rollouts import recorded_rollout
from small_models import LANGUAGE_MODELS, V, padded, small_batch
from torch import nn

from mossrlhf import ToyWorld
from mossrlhf.kernels import chunked_head as head_module
from mossrlhf.models import (
    ActorCritic,
    RewardModel,
    full_logits,
    language_model_loss,
    policy_stats,
    token_path,
)
from mossrlhf.models.backbone import is_causal
from mossrlhf.types import LossOutput, Rollout


@pytest.fixture
def batch():
    return small_batch()


class TestAlignment:
    """Models whose outputs at each position are known."""

    class Successor(nn.Module):
        """Position i: logit i + 1 on the token after that at i, and 0 on the others."""

        def forward(self, input_ids, attention_mask, use_cache):
            strength = 1.0 + torch.arange(input_ids.shape[1]).expand_as(input_ids)
            following = nn.functional.one_hot((input_ids + 1) % V, V)
            return SimpleNamespace(logits=strength[..., None] * following)

    class Positions(RewardModel):
        """A critic that returns the position itself."""

        def __init__(self):
            nn.Module.__init__(self)

        def token_values(self, input_ids, attention_mask, right_padded=None):
            return torch.arange(input_ids.shape[1]).expand_as(input_ids).float()

    def test_log_prob_of_a_token_comes_from_one_position_before(self, batch):
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

    def test_more_padding_changes_no_number(self, batch):
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


class TestActorCritic:
    @pytest.fixture
    def model(self):
        policy = LANGUAGE_MODELS["llama"]()
        critic = RewardModel.from_language_model(policy)
        nn.init.normal_(critic.score.weight)
        return ActorCritic(policy, critic, temperature=0.8)

    def moved(self, model):
        """Return the half that a loss has reached."""
        return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize("entropy", [False, True])
    def test_policy_role_gives_stats_and_trains_the_policy(self, model, batch, entropy):
        expected = policy_stats(model.policy, batch, 0.8, entropy)

        def loss(stats):
            torch.testing.assert_close(vars(stats), vars(expected))
            return LossOutput(stats.logprob.sum())

        model("policy", batch, loss, entropy=entropy).loss.backward()
        assert self.moved(model) == {"policy"}

    def test_critic_role_gives_values_and_trains_the_critic(self, model, batch):
        expected = model.values(batch)[0][batch.mask]

        def loss(value):
            torch.testing.assert_close(value, expected)
            return LossOutput(value.sum())

        model("critic", batch, loss).loss.backward()
        assert self.moved(model) == {"critic"}

    def test_value_after_the_last_token_is_the_score(self, model, batch):
        _, after = model.values(batch)
        scores = model.critic(batch.input_ids, batch.attention_mask)
        torch.testing.assert_close(after, scores)

    def test_ptx_role_trains_the_policy(self, model):
        ids, mask = padded([[1, 2, 3]], "right")
        data = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids}
        model("ptx", data, lambda loss, count: LossOutput(loss / count)).loss.backward()
        assert self.moved(model) == {"policy"}

    def test_scoring_uses_no_cache(self, model, batch):
        is_causal(model.policy.model)  # probed beforehand
        caches = []
        model.policy.model.register_forward_pre_hook(
            lambda module, args, kwargs: caches.append(kwargs["use_cache"]), with_kwargs=True
        )
        token_path(model.policy)  # one forward by full logits, one by hidden states
        ids, mask = padded([[1, 2, 3]], "right")
        data = {"input_ids": ids, "attention_mask": mask, "labels": ids}
        for path in (nullcontext(), full_logits()):
            with path:
                policy_stats(model.policy, batch)
                language_model_loss(model.policy, data)
        assert caches == [False] * 6

    def test_defaults_are_temperature_one_and_no_entropy(self, model, batch):
        plain = ActorCritic(model.policy, model.critic)
        assert plain.temperature == 1.0
        got = policy_stats(model.policy, batch)
        assert got.entropy is None
        torch.testing.assert_close(got.logprob, policy_stats(model.policy, batch, 1.0).logprob)

    def test_an_unknown_role_is_refused(self, model, batch):
        with pytest.raises(ValueError, match="role: got 'actor', expected 'policy'"):
            model("actor", batch, lambda stats: LossOutput(stats.logprob.sum()))

    def test_values_without_a_critic_are_refused(self, model, batch):
        with pytest.raises(ValueError, match="critic: there is none"):
            ActorCritic(model.policy).values(batch)

    def test_fused_policy_loss_gets_a_chunk_at_a_time(self, monkeypatch):
        monkeypatch.setattr(head_module, "CPU_CHUNK_BYTES", 1)
        monkeypatch.setattr(head_module, "CPU_CHUNK_BYTES", 1)
        monkeypatch.setattr(head_module, "MIN_CHUNK_ROWS", 16)
        world = ToyWorld(lang="en", seed=0)
        batch = recorded_rollout(world)
        model = ActorCritic(tiny("llama", world.tokenizer()), temperature=0.7)
        pieces = []

        def loss_fn(stats, rows=None):
            pieces.append(rows)
            return LossOutput(stats.logprob.sum())

        model("policy", batch, loss_fn, fused=True)
        assert len(pieces) > 1
        assert all(isinstance(rows, slice) for rows in pieces)
        model("policy", batch, loss_fn)
        assert pieces[-1] is None
