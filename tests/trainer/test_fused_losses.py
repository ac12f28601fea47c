"""Losses computed along with their gradient, a chunk at a time, are those of full logits."""

import pytest
import torch
from rollouts import recorded_rollout

from mossrlhf import PPOMaxLoss
from mossrlhf.kernels import chunked_head as head_module
from mossrlhf.loss import coupling
from mossrlhf.models import full_logits


@pytest.fixture
def batch(world):
    return recorded_rollout(world)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Chunks of sixteen tokens, so that a batch is several of them, the last one short."""
    monkeypatch.setattr(head_module, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(head_module, "MIN_CHUNK_ROWS", 16)


class Centered(PPOMaxLoss):
    """Couples the tokens it is given."""

    def policy_loss(self, logprob, old_logprob, advantage, entropy=None):
        return -(advantage - advantage.mean()) * logprob


class Alone(PPOMaxLoss):
    def policy_loss(self, logprob, old_logprob, advantage, entropy=None):
        return -advantage * logprob


class Picky(PPOMaxLoss):
    def policy_loss(self, logprob, old_logprob, advantage, entropy=None):
        if len(logprob) == 1:
            raise RuntimeError("too few")
        return -advantage * logprob


class Thresholded(PPOMaxLoss):
    """Couples tokens where ratios are large, as TRL's `ratio_threshold` does."""

    def policy_loss(self, logprob, old_logprob, advantage, entropy=None):
        ratio = (logprob - old_logprob).exp()
        return -advantage * ratio * (ratio.mean() <= 10)


class Neutral(PPOMaxLoss):
    """Couples gradients, and no values."""

    def policy_loss(self, logprob, old_logprob, advantage, entropy=None):
        return advantage.mean() * (logprob - logprob.detach())


class Told(PPOMaxLoss):
    couples_tokens = True


class Counting(PPOMaxLoss):
    """Has a memory, and asks for log-probabilities."""

    def policy_loss(self, logprob, old_logprob, advantage, entropy=None):
        assert (logprob <= 0).all()
        object.__setattr__(self, "calls", getattr(self, "calls", 0) + 1)
        return -advantage * logprob


class Whole(PPOMaxLoss):
    def policy(self, stats, batch, denominator=None):
        return super().policy(stats, batch, denominator)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (PPOMaxLoss(), None),
        (PPOMaxLoss(dual_clip=3.0, entropy_coef=0.1, entropy_target=1.0), None),
        (Alone(), None),
        (Centered(), "gives a token another loss beside other tokens"),
        (Picky(), "raises RuntimeError on a few invented tokens"),
        (Thresholded(), "gives a token another loss beside other tokens"),
        (Neutral(), "gives a token another loss beside other tokens"),
        (Told(), "Told.couples_tokens is set"),
        (Counting(), None),
        (Whole(), "Whole overrides policy"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_losses_that_couple_tokens_are_found(make, loss, reason):
    found = coupling(loss)
    assert found == reason if reason is None else reason in found
    assert (make(loss=loss).engine.why_not_fused(loss) is None) == (reason is None)
    assert not hasattr(loss, "calls")  # what it remembers is not of made-up tokens


@pytest.mark.parametrize("kind", [PPOMaxLoss, Alone, Centered, Picky, Thresholded, Neutral, Whole])
def test_all_losses_are_those_of_full_logits(make, parameters, kind, batch):
    """A loss that couples tokens sees all of them at once, however small the chunks."""

    def run(name):
        trainer = make(name, loss=kind(), args=dict(minibatch_size=8))
        trainer.model.double(), trainer.ref_model.double()
        trainer.step(batch, scores=[0.5, -1, 2, 0, 1, -2, 3, 1])
        return parameters(trainer.model)

    ours = run("ours")
    with full_logits():
        theirs = run("theirs")
    assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


def test_the_first_ratio_is_one_to_the_last_bit(make, batch, monkeypatch):
    trainer = make(args=dict(minibatch_size=8))
    annotated = trainer.annotate(batch)
    drift, tokens = [], PPOMaxLoss.tokens

    def watched(self, stats, rows, denominator):
        drift.append(stats.logprob.detach() - rows.old_logprob)
        return tokens(self, stats, rows, denominator)

    monkeypatch.setattr(PPOMaxLoss, "tokens", watched)
    monkeypatch.setattr("mossrlhf.optimization.coupling", lambda loss: None)
    scored = trainer.estimate(trainer.score(annotated))
    trainer.engine.step(scored, trainer.loss)
    assert len(drift) > 1  # chunk by chunk
    assert torch.cat(drift).tolist() == [0.0] * int(batch.mask.sum())


def test_half_precision_scales_come_too_late_to_fuse(make):
    trainer = make()
    trainer.accelerator._own = "fp16"
    assert trainer.engine._may_fuse
    trainer.accelerator.state._mixed_precision = "fp16"
    try:
        assert not trainer.engine._may_fuse
        assert trainer.engine.why_not_fused(trainer.loss) is not None
    finally:
        trainer.accelerator.state._mixed_precision = "no"
