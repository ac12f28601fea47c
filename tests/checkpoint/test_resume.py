"""What a run goes on with: the best that was kept, adapters of the same make, settings in force."""

import json
import random
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from mossrlhf import TrainerConfig, last_checkpoint
from mossrlhf.checkpoint.folders import STATE, checkpoints, finish_renames
from mossrlhf.checkpoint.save_load import is_saved, save_checkpoint
from mossrlhf.logging import completion_table
from mossrlhf.models import RewardModel, add_adapters, save_adapters
from mossrlhf.run import is_best


def names(trainer):
    return [path.name for path in checkpoints(trainer.output_dir)]


def test_the_best_is_kept_however_its_folder_is_named(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = dict(metric_for_best_model="response/length_tokens", save_total_limit=1, save_steps=1)
    first = build(Path("out"), args=dict(total_steps=2, **options))
    first.train()
    best = Path(first.run.state.best_model_checkpoint).name
    again = build(Path("out"), args=dict(total_steps=5, **options), callbacks=[Never()])
    again.train(resume_from_checkpoint=(tmp_path / "out" / "checkpoint-2").resolve())
    assert {best, "checkpoint-5"} <= set(names(again))


class Never(TrainerCallback):
    """Lets nothing be better than the best so far."""

    def on_step_begin(self, args, state, control, **kwargs):
        state.best_metric = 1e9


def test_adapters_of_another_make_are_refused(make, policy):
    lora = dict(r=2, target_modules=["q_proj"])
    make(args=dict(total_steps=1), model=policy(0), peft_config=LoraConfig(**lora)).train()
    other = make(
        args=dict(total_steps=2), model=policy(0), peft_config=LoraConfig(lora_alpha=64, **lora)
    )
    with pytest.raises(ValueError, match=r"adapter 'default' was made with lora_alpha=8, .* 64"):
        other.train(resume_from_checkpoint=True)


def test_a_state_of_which_anything_has_turned_is_damaged(make):
    trainer = make(args=dict(total_steps=1))
    trainer.train()
    file = trainer.output_dir / "checkpoint-1" / STATE
    content = file.read_bytes()
    places = random.Random(0).sample(range(len(content)), 40)
    for place in places:
        turned = bytearray(content)
        turned[place] ^= 1 << random.Random(place).randrange(7)
        if bytes(turned).split() == content.split():
            continue  # a space or a line's end: it says the same
        file.write_bytes(bytes(turned))
        with pytest.raises((ValueError, FileNotFoundError), match="mossrlhf"):
            make(args=dict(total_steps=2)).train(resume_from_checkpoint=True)
    file.write_bytes(content)
    make(args=dict(total_steps=2)).train(resume_from_checkpoint=True)


def test_going_back_with_the_same_trainer_moves_the_other_future_aside(make):
    trainer = make(args=dict(total_steps=4, save_steps=1, save_total_limit=None))
    trainer.train()
    trainer.train(resume_from_checkpoint=trainer.output_dir / "checkpoint-1")
    rows = completion_table(trainer.output_dir / "completions.jsonl")
    assert sorted({row["step"] for row in rows}) == [1, 2, 3, 4]
    assert len(rows) == 4 * len([row for row in rows if row["step"] == 1])
    aside = checkpoints(trainer.output_dir / "earlier-1")
    assert [path.name for path in aside] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_other_settings_hold_and_are_named(make, world):
    make(args=dict(total_steps=1)).train()
    changed = dict(weight_decay=0.1, adam_beta2=0.5, seed=5, rollout_size=4)
    later = make(args=dict(total_steps=2, **changed), train_dataset=world.prompts(7))
    with pytest.warns(UserWarning, match="resume_from_checkpoint") as told:
        later.train(resume_from_checkpoint=True)
    said = " ".join(str(warning.message) for warning in told)
    for name in (*changed, r"len(train_dataset)"):
        assert f"{name} was" in said
    for optimizer in later.engine.optimizers.values():
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
        assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.5)}


def test_other_reward_models_are_told(make, reward_model):
    make(args=dict(total_steps=1)).train()
    later = make(args=dict(total_steps=2), reward=reward_model(7))
    with pytest.warns(UserWarning, match="reward models are not those the run began with"):
        later.train(resume_from_checkpoint=True)


def test_a_warm_up_that_went_on_is_not_saved_yet(make):
    trainer = make(args=dict(total_steps=1, critic_pretrain_steps=3, save_steps=2))
    trainer.pretrain_critic()
    assert trainer.run.run_state.pretrained == 3
    assert not is_saved(trainer.run.run_state)  # checkpoint-0 is of the second
    trainer.run.run_state.pretrained = 2
    assert is_saved(trainer.run.run_state)


class Counting(TrainerCallback, ExportableState):
    def __init__(self, by):
        self.by, self.total = by, 0

    def state(self):
        return {"args": {"by": self.by}, "attributes": {"total": self.total}}

    def on_step_end(self, *args, **kwargs):
        self.total += self.by


@pytest.mark.filterwarnings("ignore:You are adding")
def test_callbacks_of_one_class_have_a_state_each(make):
    make(args=dict(total_steps=2), callbacks=[Counting(1), Counting(100)]).train()
    later = [Counting(1), Counting(100)]
    make(args=dict(total_steps=3), callbacks=later).train(resume_from_checkpoint=True)
    assert [callback.total for callback in later] == [3, 300]


def test_nothing_that_is_not_a_number_is_the_best():
    args = TrainerConfig(metric_for_best_model="m")
    assert not is_best(args, None, {"m": float("nan")})
    assert is_best(args, None, {"m": -1.0})


def test_a_line_of_nothing_is_passed_over(make):
    trainer = make(args=dict(total_steps=1))
    trainer.train()
    path = trainer.output_dir / "completions.jsonl"
    rows = completion_table(path)
    path.write_text(path.read_text() + "\0\0\0\0\n" + '{"step": 2, "prom', encoding="utf-8")
    assert completion_table(path) == rows
    make(args=dict(total_steps=2)).train(resume_from_checkpoint=True)
    assert {row["step"] for row in completion_table(path)} == {1, 2}


def test_who_looks_in_between_two_renames_does_no_harm(make, monkeypatch):
    trainer = make(args=dict(total_steps=1))
    trainer.train()
    rename, looked = Path.rename, []

    def looking(self, target):
        done = rename(self, target)
        if str(target).endswith(".old"):
            looked.append(last_checkpoint(trainer.output_dir))
        return done

    monkeypatch.setattr(Path, "rename", looking)
    trainer.run.state.best_metric = 5.0
    save_checkpoint(trainer.run.run_state)
    assert len(looked) == 1
    state = json.loads((trainer.output_dir / "checkpoint-1" / STATE).read_text())
    assert state["best_metric"] == 5.0
    assert not list(trainer.output_dir.glob(".checkpoint*"))


def test_a_name_is_given_back_once(make):
    trainer = make(args=dict(total_steps=1))
    trainer.train()
    shutil.move(trainer.output_dir / "checkpoint-1", trainer.output_dir / ".checkpoint-1.old")
    finish_renames(trainer.output_dir)
    assert names(trainer) == ["checkpoint-1"]


def test_rewards_may_be_resumed_from_adapters(make, policy, tmp_path):
    """Another adapter on the same base is another reward, and no other base."""
    for seed in (1, 2):
        judge = RewardModel.from_language_model(policy(0))
        add_adapters(judge, LoraConfig(r=2, target_modules=["q_proj"]))
        judge.score.weight.data.fill_(float(seed))
        save_adapters(judge, tmp_path / f"judge{seed}")
    lora = dict(peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    first = make(args=dict(total_steps=1), model=policy(0), reward=tmp_path / "judge1", **lora)
    first.train()
    later = make(args=dict(total_steps=2), model=policy(0), reward=tmp_path / "judge2", **lora)
    with pytest.warns(UserWarning, match="reward models are not those"):
        later.train(resume_from_checkpoint=True)
