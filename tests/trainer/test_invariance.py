"""What must change no number: padding, order, company, and how a minibatch is cut up."""

from dataclasses import fields, replace

import pytest
import torch
from accelerate import Accelerator
from rollouts import recorded_rollout
from torch import Tensor

from mossrlhf import PPOMaxLoss
from mossrlhf.metrics import rollout_metrics

LOSS = PPOMaxLoss(value_clip=0.2, advantage_norm=True, entropy_coef=0.01, kl_loss_coef=0.05)


@pytest.fixture
def rollout(world):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(8, generator=generator, dtype=torch.float64)
    return replace(recorded_rollout(world), scores=scores)


def same(ours, theirs):
    """Whether two tensors are as close as their type allows, in relative L2."""
    bound = 1e-12 if theirs.dtype == torch.float64 else 1e-6
    distance = torch.linalg.vector_norm((ours - theirs).double())
    return bool(distance <= bound * torch.linalg.vector_norm(theirs.double()))


@pytest.fixture
def learn(make, parameters):
    """Annotate, estimate and differentiate a rollout: statistics and gradients."""
    count = 0

    def run(rollout, dtype=torch.float64, accelerator=None, **args):
        nonlocal count
        count += 1
        settings = dict(minibatch_size=8, **args)
        trainer = make(f"run{count}", loss=LOSS, args=settings, accelerator=accelerator)
        # Away from the reference and from the policy that drew, as in the midst of an epoch.
        trainer.model.to(dtype), trainer.ref_model.to(dtype)
        estimated = trainer.estimate(
            trainer.annotate(replace(rollout, scores=rollout.scores.to(dtype)))
        )
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, dtype=torch.float64).to(dtype))
        minibatch = trainer.loss.prepare(estimated, trainer.engine.reduce)
        stats = {}
        for role in ("critic", "policy"):
            trainer.engine._backward(role, trainer.engine._parts(minibatch), trainer.loss, stats)
        gradients = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        return torch.stack(list(stats.values())), gradients, estimated

    return run


BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@BOTH
@pytest.mark.parametrize(
    "cut",
    [dict(micro_batch_size=1), dict(micro_batch_size=3), dict(max_tokens=40), dict(max_tokens=1)],
    ids=str,
)
def test_how_a_minibatch_is_cut_up(learn, rollout, cut, dtype):
    stats, gradients, _ = learn(rollout, dtype)
    ours, theirs, _ = learn(rollout, dtype, **cut)
    assert same(ours, stats)
    assert same(theirs, gradients)


@BOTH
def test_accumulation_set_for_other_loops(learn, rollout, dtype):
    """`Accelerator.backward` divides by its accumulation steps, which is undone."""
    stats, gradients, _ = learn(rollout, dtype)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    ours, theirs, _ = learn(rollout, dtype, accelerator=accelerator, micro_batch_size=3)
    assert same(ours, stats)
    assert same(theirs, gradients)


@BOTH
def test_order_of_the_sequences(learn, rollout, dtype):
    stats, gradients, _ = learn(rollout, dtype)
    ours, theirs, _ = learn(rollout.select(torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])), dtype)
    assert same(ours, stats)
    assert same(theirs, gradients)


def widened(rollout, more):
    """The same with more padding behind, of ids that mean something, in every [B, T] as well."""
    columns = {
        spec.name: torch.nn.functional.pad(value, (0, more))
        for spec in fields(rollout)
        if isinstance(value := getattr(rollout, spec.name), Tensor) and value.ndim == 2
    }
    columns["input_ids"][:, -more:] = 9
    return replace(rollout, **columns)


@BOTH
@pytest.mark.parametrize("more", [1, 17])
def test_amount_of_padding_and_what_stands_in_it(learn, rollout, more, dtype):
    stats, gradients, plain = learn(rollout, dtype)
    other = rollout.input_ids.clone()
    ends = rollout.prompt_lengths + rollout.response_lengths
    other[torch.arange(other.shape[1]) >= ends[:, None]] = 11
    ours, theirs, padded = learn(widened(replace(rollout, input_ids=other), more), dtype)
    assert same(ours, stats)
    assert same(theirs, gradients)
    for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
        width = rollout.mask.shape[1]
        ours, theirs = getattr(padded, name)[:, :width], getattr(plain, name)
        assert same(ours[rollout.mask], theirs[rollout.mask]), name
    described, expected = rollout_metrics(padded), rollout_metrics(plain)
    assert described == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-6)


@BOTH
def test_company(make, rollout, dtype):
    """What is noted of a response does not depend on who is in the batch, or how long they are."""
    trainer = make()
    trainer.model.to(dtype), trainer.ref_model.to(dtype)
    together = trainer.annotate(rollout)
    for row in range(len(rollout)):
        alone = trainer.annotate(rollout.select(torch.tensor([row])))
        length = int(rollout.response_lengths[row])
        for name in ("logprobs", "entropies", "ref_logprobs", "values"):
            assert same(getattr(alone, name)[0, :length], getattr(together, name)[row, :length])


def test_prompts_of_other_lengths_change_no_greedy_answer(make, world):
    """The sampler pads on the left; alone there is nothing to pad."""
    from transformers import GenerationConfig

    from mossrlhf import HFSampler

    trainer = make()
    trainer.model.double()
    sampler = HFSampler.for_tokenizer(
        world.tokenizer(), GenerationConfig(max_new_tokens=8, do_sample=False)
    )
    prompts = [list(range(6, 6 + length)) for length in (1, 4, 30, 9)]
    together = sampler(trainer.policy, prompts)
    for row, prompt in enumerate(prompts):
        assert sampler(trainer.policy, [prompt]).completions()[0] == together.completions()[row]
