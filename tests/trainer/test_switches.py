"""Details of SPEC §1 that live in the trainer: each on and off."""

import copy
import inspect
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from mossrlhf import AdvantageEstimator, GroupRelative, PPOMaxLoss, RewardShaper
from mossrlhf.models import backbone


def estimated(trainer):
    return trainer.estimate(trainer.annotate(trainer.score(trainer.collect())))


@pytest.mark.parametrize(
    "split", [dict(micro_batch_size=1), dict(micro_batch_size=3), dict(max_tokens=60)]
)
def test_micro_batches_change_nothing(make, policy, reward_model, parameters, split):
    def run(name, **options):
        torch.set_default_dtype(torch.float64)
        try:
            trainer = make(
                name,
                model=policy().double(),
                reward=reward_model().double(),
                loss=PPOMaxLoss(entropy_coef=0.01, kl_loss_coef=0.1, advantage_norm=True),
                args=dict(minibatch_size=8, num_ppo_epochs=2, **options),
            )
            rollout = plain.annotate(rollouts[0]) if rollouts else trainer.collect()
            rollouts.append(rollout)
            metrics = trainer.step(rollouts[0])
        finally:
            torch.set_default_dtype(torch.float32)
        return trainer, metrics

    rollouts = []
    plain, expected = run("plain")
    rollouts = rollouts[:1]
    other, metrics = run("split", **split)
    ours, theirs = parameters(plain.model), parameters(other.model)
    assert torch.norm(ours - theirs) <= 1e-12 * torch.norm(ours)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


class Waits(TorchDispatchMode):
    """Who takes numbers out of tensors: on a GPU, each time the host waits for the device."""

    def __init__(self):
        super().__init__()
        self.files = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            frame = inspect.currentframe()
            while frame is not None and f"{os.sep}mossrlhf{os.sep}" not in frame.f_code.co_filename:
                frame = frame.f_back
            self.files.append(Path(frame.f_code.co_filename).name if frame else "")
        return function(*args, **(kwargs or {}))


def test_statistics_wait_for_nothing(make):
    """However a step is cut up, all of them are looked at once: to see that they are finite."""
    counts = []
    for size in (None, 1):
        trainer = make(f"size{size}", args=dict(micro_batch_size=size, minibatch_size=8))
        rollout = trainer.estimate(trainer.annotate(trainer.score(trainer.collect())))
        with Waits() as waits:
            trainer.engine.step(rollout, trainer.loss)
        # The models and the shapes of micro-batches aside; AdamW's counters are in both.
        counts.append([waits.files.count(name) for name in ("loss.py", "reduce.py", "engine.py")])
    assert counts[0] == counts[1]
    assert counts[0][:2] == [0, 0]


def test_critic_pretraining_moves_the_critic_alone(make, parameters):
    trainer = make(args=dict(critic_pretrain_steps=3))
    policy, critic = parameters(trainer.policy), parameters(trainer.critic)
    history = trainer.pretrain_critic()
    assert len(history) == 3
    assert torch.equal(policy, parameters(trainer.policy))
    assert not torch.equal(critic, parameters(trainer.critic))
    assert trainer.engine.schedulers["policy"].last_epoch == 0
    assert trainer.engine.schedulers["critic"].last_epoch == 6
    assert not trainer.engine.optimizers["policy"].state_dict()["state"]
    assert "critic/clip_fraction" not in history[0]
    assert trainer.pretrain_critic() == []  # done once, not at every call of train()


def test_critic_pretraining_off_by_default(make):
    trainer = make()
    trainer.train()
    assert not [entry for entry in trainer.history if "pretrain/step" in entry]


def test_critic_pretraining_brings_the_value_loss_to_zero(make):
    def constant(*, completions, **columns):
        return [1.0] * len(completions)

    trainer = make(
        reward=constant,
        args=dict(critic_pretrain_steps=30, critic_learning_rate=3e-2, rollout_size=16),
        shaper=RewardShaper(kl_coef=None),
    )
    losses = [entry["critic/loss"] for entry in trainer.pretrain_critic()]
    assert losses[0] > 0.1  # a zero head says 0 where the return is 1: half of 1 at first
    assert max(losses[-5:]) < 0.02


def test_ptx_adds_its_gradient_and_no_more(make, world, parameters):
    examples = world.sft_examples(16)

    def gradient(coefficient):
        trainer = make(
            f"ptx{coefficient}",
            loss=PPOMaxLoss(ptx_coef=coefficient),
            ptx_dataset=None if coefficient is None else examples,
            args=dict(minibatch_size=8, max_grad_norm=None),
        )
        kept = []
        original = trainer.engine._clip
        trainer.engine._clip = lambda roles: (
            kept.append([p.grad.clone() for p in trainer.policy.parameters()]),
            original(roles),
        )[1]
        metrics = trainer.step(trainer.collect())
        return torch.cat([g.flatten() for g in kept[0]]), metrics, trainer

    off, quiet, _ = gradient(None)
    on, metrics, _ = gradient(0.5)
    assert "ptx/loss" not in quiet
    assert metrics["ptx/loss"] > 0
    fresh = make("fresh", ptx_dataset=examples, loss=PPOMaxLoss(ptx_coef=1.0))
    batch = fresh._ptx_batch(8)
    output = fresh.policy(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(
        output[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    assert metrics["ptx/loss"] == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    alone = torch.cat([p.grad.flatten() for p in fresh.policy.parameters()])
    assert torch.allclose(on - off, 0.5 * alone, atol=1e-6)


def test_no_critic_no_values(make):
    trainer = make(
        critic=False,
        advantage=GroupRelative(group_size=4),
        args=dict(samples_per_prompt=4),
    )
    rollout = estimated(trainer)
    assert rollout.values is None
    prompts = rollout.prompts()
    assert prompts[0] == prompts[3] != prompts[4]
    assert trainer.train()[-1]["policy/grad_norm"] > 0
    assert "critic/loss" not in trainer.history[-1]


def test_critic_starts_as_a_copy_of_the_reward_model(make, reward_model):
    reward = reward_model()
    trainer = make(reward=reward)
    kept = copy.deepcopy(reward.state_dict())
    assert torch.equal(trainer.critic.score.weight, reward.score.weight)
    trainer.train()
    assert not torch.equal(trainer.critic.score.weight, reward.score.weight)
    assert all(torch.equal(kept[name], value) for name, value in reward.state_dict().items())


def test_critic_of_a_reward_function_starts_at_zero(make, world):
    trainer = make(reward=world.reward)
    assert estimated(trainer).values.abs().max() == 0


def test_truncated_responses_are_bootstrapped_on_request(make):
    on = estimated(make("on", args=dict(bootstrap_truncated=True)))
    off = estimated(make("off"))
    assert off.bootstrap is None
    assert on.truncated.any()
    assert (on.bootstrap != 0).tolist() == on.truncated.tolist()
    last = on.mask.sum(1) - 1
    rows = torch.arange(len(on))
    difference = (on.advantages - off.advantages)[rows, last]
    assert torch.allclose(difference, on.bootstrap, atol=1e-5)


def test_score_after_end_lets_the_state_after_the_end_count(make):
    trainer = make(
        shaper=RewardShaper(score_after_end=True),
        advantage=AdvantageEstimator(whiten=True, correction=1),
    )
    rollout = estimated(trainer)
    finished = (~rollout.truncated).nonzero().flatten()
    for row in finished.tolist():
        length = int(rollout.response_lengths[row])
        assert rollout.states[row, length]
        assert not rollout.mask[row, length]
    assert trainer.train()[-1]["critic/loss"] > 0


def test_lora_trains_adapters_and_its_reference_is_the_base(make, policy):
    model = policy()
    base = copy.deepcopy(model.state_dict())
    trainer = make(
        model=model,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=dict(learning_rate=1e-2),
    )
    assert trainer.ref_model is None
    before = trainer.annotate(trainer.collect())
    assert torch.allclose(before.logprobs, before.ref_logprobs, atol=1e-6)
    trainer.train()
    after = trainer.annotate(before)
    assert torch.equal(after.ref_logprobs, before.ref_logprobs)
    assert not torch.equal(after.logprobs, before.logprobs)
    inner = {
        name.replace("base_model.model.", "").replace("base_layer.", ""): value
        for name, value in trainer.policy.state_dict().items()
        if "lora_" not in name
    }
    assert all(torch.equal(base[name], value) for name, value in inner.items())


def test_half_precision_checkpoints_are_trained_in_float32(make, policy):
    trainer = make(model=policy().bfloat16())
    assert {p.dtype for p in trainer.policy.parameters()} == {torch.float32}
    assert trainer.train()[-1]["policy/moved_fraction"] > 0.5


def test_no_model_is_in_train_mode(make, policy):
    """What is random by other means than dropout stays off as well."""
    trainer, modes = make(), []
    for model in (trainer.policy, trainer.critic.backbone):
        model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    trainer.train()
    assert modes
    assert not any(modes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off(make, policy, checkpointing):
    """Gradient checkpointing works in train mode alone, so each module's own is set to 0."""
    args = dict(minibatch_size=8, gradient_checkpointing=checkpointing)
    trainer = make(model=policy(attention_dropout=0.5), args=args)
    assert trainer.step(trainer.collect())["policy/ratio"] == pytest.approx(1, abs=1e-5)


def test_gradient_checkpointing_changes_nothing(make, parameters, monkeypatch):
    monkeypatch.setattr(backbone, "can_pack", lambda model: False)  # as with recomputation
    plain, saving = make("plain"), make("saving", args=dict(gradient_checkpointing=True))
    rollout = plain.collect()
    plain.step(rollout)
    saving.step(rollout)
    assert torch.allclose(parameters(plain.model), parameters(saving.model), atol=1e-7)


def test_a_step_that_is_not_finite_is_not_taken(make, parameters):
    trainer = make()
    rollout = trainer.score(trainer.collect())
    before = parameters(trainer.model)
    rollout.scores[3] = torch.inf
    with pytest.raises(FloatingPointError, match=r"the step was not taken.*rewards of sample"):
        trainer.update(trainer.estimate(trainer.annotate(rollout)))
    assert torch.equal(before, parameters(trainer.model))
