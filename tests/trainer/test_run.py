"""The bookkeeping of a run: who decides, what is remembered, what reaches the trackers."""

from itertools import chain, repeat

import pytest
import torch
from transformers import EarlyStoppingCallback

from mossrlhf import presets
from mossrlhf.monitor import CollapseWatch, StillWatch
from mossrlhf.tracking import completion_table


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
    wishes = chain([0.0, 0.0], repeat(1.0))  # looked at twice in each iteration

    def from_elsewhere(flags):
        # As if the other of two processes had been asked to stop in its second iteration.
        return flags + torch.tensor([next(wishes), 0.0, 0.0])

    original = trainer.engine.reduce
    monkeypatch.setattr(
        trainer.engine,
        "reduce",
        lambda t: from_elsewhere(t) if t.shape == (3,) else original(t),
    )
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
    accelerator = trainer.accelerator
    monkeypatch.setattr(accelerator, "init_trackers", lambda name: None)
    monkeypatch.setattr(accelerator, "log", lambda metrics, step: logged.append((step, metrics)))
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
    still = StillWatch(model)
    still(1.0), still(1.0)
    fresh = StillWatch(model)
    fresh.load_state_dict(still.state_dict())
    with pytest.warns(UserWarning, match="not moving"):
        fresh(1.0)


def test_checkpoints_hold_the_watches(make):
    trainer = make(args=dict(save_steps=1, total_steps=1))
    trainer.train()
    trainer.run.collapse.flags.append(True)
    trainer.run.still.still = 2
    from mossrlhf.resume import save_checkpoint

    resumed = make("resumed", args=dict(total_steps=1))
    resumed.train(resume_from_checkpoint=save_checkpoint(trainer))
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
    original = type(trainer)._answer
    monkeypatch.setattr(
        type(trainer),
        "_answer",
        lambda self, d, reference: asked.append(d) or original(self, d, reference),
    )
    trainer.reference_distinct_2()
    prompts = [str(record["prompt"]) for record in asked[0]]
    assert len(prompts) == 8
    assert prompts == [prompts[0]] * 4 + [prompts[4]] * 4


def test_only_some_reference_answers_are_kept(make, world):
    trainer = make()
    datasets = [world.prompts(2, seed=seed) for seed in range(9)]
    first = trainer.answer(datasets[0], reference=True)
    assert trainer.answer(datasets[0], reference=True) is first
    for dataset in datasets[1:]:
        trainer.answer(dataset, reference=True)
    assert len(trainer._references) <= 4
    again = trainer.answer(datasets[0], reference=True)
    assert again is not first
    assert torch.equal(again.input_ids, first.input_ids)


@pytest.mark.parametrize("limit", [dict(micro_batch_size=1), dict(max_tokens=60)], ids=str)
def test_pre_training_data_is_split_like_everything_else(make, parameters, world, limit):
    from mossrlhf import PPOMaxLoss

    sizes = []

    def run(name, **args):
        trainer = make(
            name,
            loss=PPOMaxLoss(ptx_coef=1.0),
            ptx_dataset=world.sft_examples(16),
            model=None,
            args=dict(total_steps=1, **args),
        )
        trainer.model.double()
        original = trainer.engine._accumulate

        def noted(sync, role, part, share, **extra):
            if role == "ptx":
                sizes.append(part["labels"].numel())
            return original(sync, role, part, share, **extra)

        trainer.engine._accumulate = noted
        batch = trainer._ptx_batch(4)
        stats = {}
        trainer.engine._backward_ptx(batch, trainer.loss, stats)
        grads = torch.cat(
            [p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None]
        )
        return grads, stats["ptx/loss"]

    whole, loss = run("whole")
    count = len(sizes)
    split, split_loss = run("split", **limit)
    assert len(sizes) - count > count
    assert torch.linalg.vector_norm(split - whole) <= 1e-12 * torch.linalg.vector_norm(whole)
    assert split_loss == pytest.approx(float(loss), rel=1e-12)


def test_writing_a_checkpoint_leaves_the_console_alone(make, capfd):
    make(args=dict(total_steps=1)).train()
    assert "Writing model shards" not in capfd.readouterr().err


def test_the_last_iteration_is_logged_however_it_ends(make):
    trainer = make(args=dict(total_steps=9, logging_steps=7, learning_rate=3e-2, max_kl=0.01))
    history = trainer.train()
    assert 1 < trainer.run.state.global_step < 7
    assert history[-1]["step"] == trainer.run.state.global_step
