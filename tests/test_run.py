"""The bookkeeping of a run: who decides, what is remembered, what reaches the trackers."""

import inspect
import re
import signal
from dataclasses import replace
from itertools import chain, repeat
from types import SimpleNamespace

import pytest
import torch
from transformers import EarlyStoppingCallback

from mossrlhf import PPOMaxLoss, RewardShaper, Trainer, presets
from mossrlhf.checkpoint.folders import STATE, checkpoints
from mossrlhf.logging import completion_table
from mossrlhf.metrics import CollapseWatch, StillWatch
from mossrlhf.validation import require_parts


def test_early_stopping_of_transformers_stops(make, world, caplog):
    # No metric can beat itself by 1e9, so the first evaluation is the best one for ever.
    callback = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=1e9)
    trainer = make(
        callbacks=[callback],
        eval_dataset=world.prompts(4, split="eval"),
        args=dict(total_steps=9, eval_steps=1, metric_for_best_model="eval/reward_model/policy"),
    )
    trainer.train()
    assert trainer.run.state.global_step == 3
    assert "did not find" not in caplog.text


def test_the_least_can_be_the_best(make):
    name = "reward/score_mean"
    options = dict(total_steps=4, metric_for_best_model=name, greater_is_better=False)
    trainer = make(args=options)
    history = trainer.train()
    assert trainer.run.state.best_metric == min(entry[name] for entry in history)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(metric_for_best_model="reward/score_meen"), "closest are .'reward/score_mean'"),
        (dict(metric_for_best_model="eval/reward_model/policy"), "set eval_steps="),
        (
            dict(metric_for_best_model="eval/reward_modle/policy", eval_steps=1),
            "closest are .'eval/reward_model/policy'",
        ),
    ],
)
def test_a_best_metric_nobody_measures_is_refused(make, world, options, message):
    trainer = make(args=options, eval_dataset=world.prompts(4, split="eval"))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.run.state.global_step <= 1


def test_what_another_process_wishes_holds_here_too(make, monkeypatch):
    trainer = make(args=dict(total_steps=5))
    engine, alone, agree = trainer.engine, trainer.engine.reduce, trainer.run._agree
    # As if the other of two processes had been asked to stop in its second iteration.
    wishes = chain([0.0, 0.0], repeat(1.0))  # looked at twice in each iteration

    def with_the_other():
        engine.reduce = lambda flags: flags + torch.tensor([next(wishes), 0.0, 0.0])
        agree()
        engine.reduce = alone

    monkeypatch.setattr(trainer.run, "_agree", with_the_other)
    assert len(trainer.train()) == 2


def test_a_second_run_in_the_same_folder_does_not_repeat_completions(make):
    make("run").train()
    trainer = make("run")
    trainer.train()
    steps = [row["step"] for row in completion_table(trainer.output_dir / "completions.jsonl")]
    assert steps == [1] * 8 + [2] * 8


def test_resuming_rewrites_the_completions_of_later_steps(make):
    options = dict(total_steps=3, save_steps=1, save_total_limit=None)
    make("run", args=options).train()
    trainer = make("run", args=options)
    path = trainer.output_dir / "completions.jsonl"
    before = path.read_text()
    trainer.train(resume_from_checkpoint=trainer.output_dir / "checkpoint-1")
    assert path.read_text() == before


def test_the_warm_up_of_the_critic_reaches_the_trackers_in_order(make, monkeypatch):
    logged = []
    trainer = make(args=dict(critic_pretrain_steps=2, report_to=["tensorboard"]))
    tracker = SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)))
    accelerator = trainer.accelerator
    monkeypatch.setattr(
        accelerator, "init_trackers", lambda name: accelerator.trackers.append(tracker)
    )
    trainer.train()
    assert [step for step, _ in logged] == [1, 2, 3, 4]
    assert "pretrain/critic/loss" in logged[1][1]
    assert "critic/loss" in logged[2][1]


def test_watches_are_resumed(make, policy):
    watch = CollapseWatch(1.0, 0.9)
    with pytest.warns(UserWarning, match="collapsed"):
        watch({"kl/ref_per_sequence": 2.0, "response/distinct_2": 0.1})
    fresh = CollapseWatch(1.0, 0.9)
    fresh.load_state_dict(watch.state_dict())
    assert fresh.lately  # and so it does not warn a second time:
    assert fresh({"kl/ref_per_sequence": 2.0, "response/distinct_2": 0.1})

    model = policy()
    still = StillWatch(model.parameters())
    still(1.0), still(1.0)
    fresh = StillWatch(model.parameters())
    fresh.load_state_dict(still.state_dict())
    with pytest.warns(UserWarning, match="not moving"):
        fresh(1.0)


def test_checkpoints_hold_the_watches(make):
    trainer = make(args=dict(save_steps=1, total_steps=1))
    trainer.train()
    trainer.run.collapse.flags.append(True)
    trainer.run.still.still = 2
    from mossrlhf.checkpoint.save_load import save_checkpoint

    resumed = make("resumed", args=dict(total_steps=1))
    resumed.train(resume_from_checkpoint=save_checkpoint(trainer.run.run_state))
    assert resumed.run.collapse.lately
    assert resumed.run.still.still == 2


def test_trainers_do_not_share_a_presets_running_moments(make):
    shaper = presets.ppo_max()["shaper"]
    first, second = make("a", shaper=shaper), make("b", shaper=shaper)
    first.train()
    assert second.shaper.state_dict() != first.shaper.state_dict()
    assert shaper.state_dict() == second.shaper.state_dict()


def test_reference_variety_is_of_groups_like_the_rollouts(make, monkeypatch):
    trainer = make(args=dict(samples_per_prompt=4))
    asked = []
    original = type(trainer)._respond_to_all
    monkeypatch.setattr(
        type(trainer),
        "_respond_to_all",
        lambda self, d, reference: asked.append(d) or original(self, d, reference),
    )
    trainer.reference_distinct_2()
    prompts = [str(record["prompt"]) for record in asked[0]]
    assert len(prompts) == 8
    assert prompts == [prompts[0]] * 4 + [prompts[4]] * 4


def test_only_some_reference_answers_are_kept(make, world):
    trainer = make()
    datasets = [world.prompts(2, seed=seed) for seed in range(9)]
    first = trainer.respond(datasets[0], reference=True)
    assert trainer.respond(datasets[0], reference=True) is first
    for dataset in datasets[1:]:
        trainer.respond(dataset, reference=True)
    assert len(trainer._references) <= 4
    again = trainer.respond(datasets[0], reference=True)
    assert again is not first
    assert torch.equal(again.input_ids, first.input_ids)


def test_writing_a_checkpoint_leaves_the_console_alone(make, capfd):
    make(args=dict(total_steps=1)).train()
    assert "Writing model shards" not in capfd.readouterr().err


def test_the_last_iteration_is_logged_however_it_ends(make):
    trainer = make(args=dict(total_steps=9, logging_steps=7, learning_rate=3e-2, max_kl=0.01))
    history = trainer.train()
    assert 1 < trainer.run.state.global_step < 7
    assert history[-1]["step"] == trainer.run.state.global_step


def steps_in(folder):
    return [path.name for path in checkpoints(folder)]


def test_another_run_in_the_folder_is_moved_aside(make):
    options = dict(save_steps=1, save_total_limit=2)
    make("run", args=dict(total_steps=5, **options)).train()
    trainer = make("run", args=dict(total_steps=3, **options))
    trainer.train()
    assert steps_in(trainer.output_dir) == ["checkpoint-2", "checkpoint-3"]
    assert steps_in(trainer.output_dir / "earlier-1") == ["checkpoint-4", "checkpoint-5"]
    assert (trainer.output_dir / "earlier-1" / "completions.jsonl").is_file()
    resumed = make("run", args=dict(total_steps=4, **options))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.run.state.global_step == 4
    assert [entry["step"] for entry in resumed.history] == [1, 2, 3, 4]


def test_what_a_resumed_run_had_done_later_is_moved_aside(make):
    options = dict(total_steps=4, save_steps=1, save_total_limit=None)
    make("run", args=options).train()
    trainer = make("run", args=options)
    trainer.train(resume_from_checkpoint=trainer.output_dir / "checkpoint-2")
    assert steps_in(trainer.output_dir) == [f"checkpoint-{i}" for i in (1, 2, 3, 4)]
    assert steps_in(trainer.output_dir / "earlier-1") == ["checkpoint-3", "checkpoint-4"]


class Fails(Trainer):
    failed = False

    def estimate(self, rollout):
        rollout = super().estimate(rollout)  # prompts, random numbers and moments have gone on
        if self.run.state.global_step == 2 and not self.failed:
            raise RuntimeError("no more")
        return rollout


@pytest.mark.parametrize("kept", [None, 2])
def test_an_exception_before_the_models_move_leaves_a_checkpoint(make, parameters, kept):
    """A reward that fails now and then costs the iteration it failed in, which begins anew."""
    options = dict(total_steps=4, lr_scheduler_type="linear")
    shaper = RewardShaper(normalize=True)
    whole = make("whole", args=options, shaper=shaper)
    whole.train()
    trainer = make("fails", kind=Fails, args={**options, "save_steps": kept}, shaper=shaper)
    with pytest.raises(RuntimeError, match="no more"):
        trainer.train()
    assert steps_in(trainer.output_dir) == ["checkpoint-2"]
    assert not (trainer.output_dir / "unfinished").exists()
    trainer.failed = True
    trainer.train()  # it can go on itself
    assert torch.equal(parameters(trainer.model), parameters(whole.model))
    resumed = make("fails", args=options, shaper=shaper)
    resumed.train(resume_from_checkpoint=trainer.output_dir / "checkpoint-2")
    assert torch.equal(parameters(resumed.model), parameters(whole.model))


def test_an_exception_within_an_update_leaves_the_models(make):
    class Breaks(Trainer):
        def update(self, rollout, roles=("critic", "policy"), loss=None):
            super().update(rollout, roles, loss)
            raise RuntimeError("half done")

    trainer = make(kind=Breaks)
    with pytest.raises(RuntimeError, match="half done"):
        trainer.train()
    assert (trainer.output_dir / "unfinished" / "policy" / "model.safetensors").is_file()
    assert steps_in(trainer.output_dir) == []


def test_an_exception_in_an_evaluation_leaves_a_checkpoint(make, world):
    trainer = make(eval_dataset=world.prompts(4), args=dict(total_steps=2, eval_steps=2))
    trainer.evaluate = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert steps_in(trainer.output_dir) == ["checkpoint-2"]


def test_a_second_ctrl_c_does_not_overwrite_a_checkpoint(make, parameters):
    class Impatient(Trainer):
        def estimate(self, rollout):
            if self.run.state.global_step == 1:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return super().estimate(rollout)

    trainer = make(kind=Impatient, args=dict(total_steps=3, save_steps=1))
    trainer.train()
    assert trainer.run.interrupted
    assert steps_in(trainer.output_dir) == ["checkpoint-1"]
    written = (trainer.output_dir / "checkpoint-1" / STATE).stat().st_mtime_ns
    trainer.train()
    assert (trainer.output_dir / "checkpoint-1" / STATE).stat().st_mtime_ns == written


def test_ctrl_c_in_the_warm_up_leaves_a_checkpoint_to_go_on_from(make, parameters):
    class Interrupted(Trainer):
        def score(self, rollout):
            if self.run.run_state.pretrained == 1:
                signal.raise_signal(signal.SIGINT)
            return super().score(rollout)

    options = dict(total_steps=1, critic_pretrain_steps=4)
    trainer = make("run", kind=Interrupted, args=options)
    trainer.train()
    assert steps_in(trainer.output_dir) == ["checkpoint-0"]
    resumed = make("run", args=options)
    resumed.train(resume_from_checkpoint=True)
    whole = make("whole", args=options)
    whole.train()
    assert torch.equal(parameters(resumed.model), parameters(whole.model))


def test_settings_changed_before_resuming_win_and_are_named(make):
    from mossrlhf import RewardShaper

    options = dict(total_steps=1, save_steps=1)
    make("run", shaper=RewardShaper(kl_coef=0.05), args=options).train()
    changed = dict(total_steps=2, save_steps=1, learning_rate=1e-5)
    trainer = make("run", shaper=RewardShaper(kl_coef=0.5), args=changed)
    with pytest.warns(UserWarning, match="when the run began") as caught:
        trainer.train(resume_from_checkpoint=True)
    said = " ".join(str(warning.message) for warning in caught)
    assert "learning_rate was 0.001 when the run began and is 1e-05 now" in said
    assert "kl_coef was 0.05 when the run began and is 0.5 now" in said
    assert trainer.shaper.kl_coef == 0.5
    assert trainer.history[-1]["policy/learning_rate"] == pytest.approx(1e-5)
    assert trainer.history[-1]["critic/learning_rate"] == pytest.approx(1e-3)


def test_overrides_of_update_need_no_roles_and_may_return_tensors(make):
    class Own(Trainer):
        def update(self, rollout):
            super().update(rollout)
            return {"mine": torch.tensor(3.0)}

    trainer = make(kind=Own, args=dict(critic_pretrain_steps=1))
    assert [entry.get("mine") for entry in trainer.train()] == [None, 3.0, 3.0]


def test_an_update_that_returns_nothing_is_told(make):
    class Silent(Trainer):
        def update(self, rollout):
            super().update(rollout)

    with pytest.raises(TypeError, match=r"update: returned NoneType, expected a dict of metrics"):
        make(kind=Silent).train()


def test_a_shaper_may_be_any_callable(make):
    def shaper(rollout):
        return rollout.mask * rollout.scores[:, None]

    trainer = make(shaper=shaper, args=dict(total_steps=1))
    trainer.train()
    resumed = make(shaper=shaper)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.run.state.global_step == 2


def test_the_signature_shows_every_part():
    shown = set(inspect.signature(Trainer).parameters)
    assert {"model", "reward", "train_dataset", "critic", "args", "loss", "callbacks"} <= shown


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (dict(rewards=len), "Trainer has no option 'rewards'; did you mean 'reward'?"),
        (dict(tokenizer=None), "here that is Trainer(processing_class=)"),
    ],
)
def test_parts_nobody_knows(make, part, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        make(**part)


ENOUGH = dict(train_dataset=[{"prompt": "a"}], eval_dataset=None, ptx_dataset=None, reward=len)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (dict(args={}), "args: got {}, expected TrainerConfig(...)"),
        (dict(loss=len), "loss: got <built-in function len>, expected a PPOMaxLoss"),
        (dict(generation_config={}), "generation_config: got {}, expected GenerationConfig(...)"),
        (dict(processing_class="gpt2"), "processing_class: got 'gpt2', expected a tokenizer"),
        (dict(accelerator=3), "accelerator: got 3, expected an accelerate.Accelerator"),
        (dict(shaper=3), "shaper: got 3, expected a RewardShaper, or a function"),
        (dict(shaper=RewardShaper), "got the class RewardShaper, expected RewardShaper(...)"),
        (dict(advantage=3), "advantage: got 3, expected an estimator, or a function"),
        (dict(train_dataset=None), "train_dataset: got NoneType, expected a sequence of records"),
        (dict(reward=3), "reward: got 3, expected a reward model"),
    ],
)
def test_parts_of_the_wrong_kind(parts, message):
    # Of the trainer itself the type checker of these tests would see them first.
    with pytest.raises(TypeError, match=re.escape(message)):
        require_parts({**ENOUGH, **parts})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (dict(ptx_dataset=[{"text": "a"}]), "PPOMaxLoss(ptx_coef=None) ignores it"),
        (
            dict(critic=False, args=dict(bootstrap_truncated=True)),
            "it needs the critic's values, and critic=False",
        ),
        (
            dict(loss=PPOMaxLoss(ptx_coef=0.1), ptx_dataset=[{"words": "a"}]),
            "text missing among ['words']",
        ),
        (
            dict(args=dict(total_steps=2.5)),
            "(total_steps=): got 2.5, expected a whole number",
        ),
    ],
)
def test_parts_that_would_be_ignored_or_fail_late(make, part, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**part)


def test_reference_answers_follow_the_prompts_and_the_sampler(make, world):
    trainer = make()
    dataset = world.prompts(4)
    first = trainer.respond(dataset, reference=True)
    dataset.reverse()
    assert trainer.respond(dataset, reference=True) is not first
    dataset.reverse()
    assert trainer.respond(dataset, reference=True) is first
    trainer.sampler = replace(trainer.sampler)
    assert trainer.respond(dataset, reference=True) is not first
