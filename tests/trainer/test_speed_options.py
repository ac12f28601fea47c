"""Learning curves are unchanged by every option of speed: three seeds, three iterations each."""

import functools
from dataclasses import dataclass

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from mossrlhf import HFSampler, RewardModel, ToyWorld, Trainer, TrainerConfig
from mossrlhf.models import backbone

WORLD = ToyWorld(lang="en", seed=0)
SEEDS = (0, 1)
SETTINGS = dict(
    total_steps=3,
    rollout_size=12,
    minibatch_size=6,
    learning_rate=1e-3,
    critic_learning_rate=1e-3,
    warmup_steps=0,
    disable_tqdm=True,
)


class Plain(Trainer):
    """Keeps the completions."""

    def annotate(self, rollout):
        self.said = [*getattr(self, "said", []), rollout.completions()]
        return super().annotate(rollout)


def talker(seed):
    """A policy whose answers are of very different lengths."""
    torch.manual_seed(seed)
    policy = LlamaForCausalLM(WORLD.model_config(hidden_size=32))
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
        policy.lm_head.weight[WORLD.eos_token_id].mul_(8)
    return policy


@dataclass
class Run:
    """What came of three iterations, and what the policy's transformer was asked on the way."""

    history: list
    said: list
    shapes: list


def trained(folder, seed, segment=None, batch_size=None, **args):
    """Train for three iterations."""
    policy, shapes = talker(seed), []
    critic = RewardModel.from_language_model(policy)
    note = functools.partial(_note, shapes)
    policy.model.register_forward_pre_hook(note, with_kwargs=True)
    config = TrainerConfig(**{**SETTINGS, **args}, output_dir=str(folder), seed=seed)
    trainer = Plain(
        policy,
        reward=WORLD.reward,
        critic=critic,
        train_dataset=WORLD.prompts(36, seed=seed),
        processing_class=WORLD.tokenizer(),
        sampler=HFSampler(
            generation_config=GenerationConfig(max_new_tokens=16, top_k=0),
            eos_token_id=WORLD.eos_token_id,
            pad_token_id=WORLD.tokenizer().pad_token_id,
            batch_size=batch_size,
            segment=segment,
        ),
        args=config,
    )
    shapes.clear()  # of the questions that are asked beforehand
    return Run(trainer.train(), trainer.said, shapes)


def _note(shapes, module, args, kwargs):
    shapes.append(tuple(kwargs["input_ids"].shape))


@pytest.fixture
def slowly(monkeypatch):
    """Padding is read."""
    monkeypatch.setattr(backbone, "can_pack", lambda model: False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Three seeds without any option of speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "can_pack", lambda model: False)
        return [trained(tmp_path_factory.mktemp("plain"), seed) for seed in SEEDS]


def require_same(ours, theirs):
    """The same words, and the same metrics to float32's rounding."""
    assert ours.said == theirs.said
    for found, expected in zip(ours.history, theirs.history, strict=True):
        assert found.keys() == expected.keys()
        timeless = {name: v for name, v in expected.items() if not name.startswith("time/")}
        found = {name: found[name] for name in timeless}
        # A count of weights, of which a few have gradients of nothing but rounding.
        moved = timeless.pop("policy/moved_fraction")
        assert found.pop("policy/moved_fraction") == pytest.approx(moved, abs=2e-3)
        assert found == pytest.approx(timeless, rel=1e-4, abs=5e-6)


def test_there_is_something_to_see(plain):
    """Answers end early and late, seeds differ, and learning leaves its mark on the next words."""
    for run in plain:
        lengths = {len(answer) for said in run.said for answer in said}
        assert len(lengths) >= 8
        assert 16 in lengths
        assert run.history[-1]["kl/ref_per_sequence"] > 1e-2
    assert plain[0].said != plain[1].said


OPTIONS = {
    "segments": dict(segment=4),
    "prompts at a time": dict(batch_size=5),
    "responses at a time": dict(micro_batch_size=2),
    "tokens at a time": dict(max_tokens=100),
}
every_seed = pytest.mark.parametrize("seed", SEEDS)


@every_seed
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_alone(option, seed, plain, slowly, tmp_path):
    run = trained(tmp_path, seed, **OPTIONS[option])
    assert run.shapes != plain[seed].shapes, "it did nothing"
    require_same(run, plain[seed])


@every_seed
def test_sequences_end_to_end(seed, plain, tmp_path):
    run = trained(tmp_path, seed)
    assert sum(rows == 1 for rows, _ in run.shapes) >= 6
    require_same(run, plain[seed])


@every_seed
def test_all_together(seed, plain, tmp_path):
    options = dict(segment=4, batch_size=5, micro_batch_size=4, max_tokens=150)
    require_same(trained(tmp_path, seed, **options), plain[seed])
