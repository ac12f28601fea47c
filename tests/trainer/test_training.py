"""The loop as a whole: it runs, stops, goes on, and says what it does."""

import json
import signal

import pytest
import torch
from transformers import TrainerCallback

from mossrlhf import Advantages, PPOMaxLoss, RewardShaper, Trainer
from mossrlhf.checkpoint.folders import checkpoints


def test_training_leaves_history_completions_and_a_checkpoint(make):
    trainer = make()
    history = trainer.train()
    assert [entry["step"] for entry in history] == [1, 2]
    assert history[-1]["kl/ref_per_sequence"] != 0
    lines = (trainer.output_dir / "completions.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} == {1, 2}
    assert [path.name for path in checkpoints(trainer.output_dir)] == ["checkpoint-2"]


def test_what_is_printed_names_every_number_in_force(make):
    text = str(make())
    for expected in ("kl_coef = 0.05", "top_k = 0", "max_new_tokens = 8", "lam = 0.95"):
        assert expected in text
    assert "policy_clip = 0.2" in text
    assert "rollout_size = 8" in text
    assert "temperature = 1.0" in text


def test_first_minibatch_has_ratio_one(make):
    trainer = make(args=dict(total_steps=1, minibatch_size=8))
    (entry,) = trainer.train()
    assert entry["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert entry["policy/approx_kl_per_token"] == pytest.approx(0, abs=1e-9)
    assert entry["policy/clip_fraction"] == 0


def test_ratio_is_one_bitwise_at_equal_padded_shape(make):
    trainer = make(args=dict(minibatch_size=8))
    rollout = trainer.annotate(trainer.collect())
    with torch.no_grad():
        again = trainer.annotate(rollout)
    assert torch.equal(rollout.logprobs, again.logprobs)


class Events(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append("begin")

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append("step")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.seen.append(f"end {state.global_step}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(f"log {logs['step']}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.seen.append("evaluate")

    def on_save(self, args, state, control, **kwargs):
        self.seen.append("save")

    def on_train_end(self, args, state, control, **kwargs):
        self.seen.append("done")


def test_callbacks_of_transformers_are_called(make, world):
    events = Events()
    trainer = make(
        callbacks=[events],
        eval_dataset=world.prompts(4, split="eval"),
        args=dict(eval_steps=2, save_steps=2),
    )
    trainer.train()
    middle = ["step", "end 1", "log 1", "step", "end 2", "log 2", "evaluate", "save"]
    assert events.seen == ["begin", *middle, "done"]


def test_a_callback_can_stop_training(make):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True
            return control

    trainer = make(callbacks=[Stop()], args=dict(total_steps=5))
    assert len(trainer.train()) == 1


def test_ctrl_c_stops_after_the_iteration_and_leaves_a_usable_trainer(make):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    interrupt = Interrupt()
    trainer = make(callbacks=[interrupt], args=dict(total_steps=4))
    assert [entry["step"] for entry in trainer.train()] == [1, 2]
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoints(trainer.output_dir)
    trainer.run.callbacks.remove_callback(interrupt)
    assert [entry["step"] for entry in trainer.train()] == [1, 2, 3, 4]


def test_second_ctrl_c_stops_at_once(make):
    class Impatient(Trainer):
        def update(self, rollout, *args, **kwargs):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            return super().update(rollout, *args, **kwargs)

    trainer = make(kind=Impatient)
    assert trainer.train() == []
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.__class__ = Trainer
    assert [entry["step"] for entry in trainer.train()] == [1, 2]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumed_equals_uninterrupted(make, parameters, world, stop):
    """With everything that has a place to go on from: schedules, moments, streams of data."""

    def build(name):
        return make(
            name,
            shaper=RewardShaper(normalize=True),
            loss=PPOMaxLoss(ptx_coef=0.1),
            ptx_dataset=world.sft_examples(64),
            args=dict(
                total_steps=4,
                save_steps=1,
                save_total_limit=None,
                critic_pretrain_steps=1,
                lr_scheduler_type="linear",
            ),
        )

    whole, half = build("whole"), build("half")
    whole.train()
    half.train()
    resumed = build("resumed")
    torch.manual_seed(123)  # what the process drew before resuming must not matter
    resumed.train(resume_from_checkpoint=half.output_dir / f"checkpoint-{stop}")
    assert torch.equal(parameters(whole.model), parameters(resumed.model))
    for ours, theirs in zip(whole.history, resumed.history, strict=True):
        for name in ours:
            if not name.startswith("time/"):
                assert ours[name] == theirs[name], name


def test_resuming_names_what_is_missing(make, tmp_path):
    trainer = make()
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        trainer.train(resume_from_checkpoint=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_checkpoints_keep_the_last_and_the_best(make):
    trainer = make(
        args=dict(
            total_steps=4,
            save_steps=1,
            save_total_limit=1,
            metric_for_best_model="reward/score_mean",
        )
    )
    history = trainer.train()
    best = max(history, key=lambda entry: entry["reward/score_mean"])["step"]
    kept = {path.name for path in checkpoints(trainer.output_dir)}
    beside = max(step for step in range(1, 5) if step != best)
    assert kept == {f"checkpoint-{best}", f"checkpoint-{beside}"}


def test_evaluation_does_not_disturb_training(make, parameters, world):
    quiet = make("quiet")
    quiet.train()
    watched = make("watched", eval_dataset=world.prompts(4, split="eval"), args=dict(eval_steps=1))
    watched.train()
    assert torch.equal(parameters(quiet.model), parameters(watched.model))


def test_evaluate_before_training_is_a_draw(make, world):
    trainer = make(eval_dataset=world.prompts(6, split="eval"))
    metrics = trainer.evaluate(rewards=world.reward)
    assert metrics["eval/kl/ref_per_sequence"] == pytest.approx(0, abs=1e-6)
    assert metrics["eval/reward/tie_rate"] == 1
    assert metrics["eval/reward/policy"] == metrics["eval/reward/ref"]


def test_max_kl_stops_training(make):
    trainer = make(args=dict(total_steps=6, learning_rate=3e-2, max_kl=0.01))
    assert 1 < len(trainer.train()) < 6


def test_a_stage_can_be_overridden(make):
    class AdaptiveKL(Trainer):
        def update(self, rollout):
            stats = super().update(rollout)
            self.shaper.adapt(stats["kl/ref_per_sequence"], target=6.0)
            return stats

    trainer = make(kind=AdaptiveKL)
    trainer.train()
    assert trainer.shaper.kl_coef == pytest.approx(0.05 * 0.98**2)


def test_a_component_can_be_a_lambda(make):
    trainer = make(advantage=lambda r, v, mask: Advantages(r - v, r))
    assert len(trainer.train()) == 2


def test_step_learns_from_rollouts_and_scores_of_ones_own(make, parameters):
    trainer = make()
    before = parameters(trainer.policy)
    rollout = trainer.collect()
    metrics = trainer.step(rollout, scores=[float(i) for i in range(8)])
    assert metrics["reward/score_mean"] == 3.5
    assert not torch.equal(before, parameters(trainer.policy))
    with pytest.raises(ValueError, match=r"scores: got \(3,\), expected one for each of the 8"):
        trainer.step(rollout, scores=[1.0, 2.0, 3.0])
