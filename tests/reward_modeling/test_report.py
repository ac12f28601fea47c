"""Reports: figures against numpy, files, plots, and the moments that PPO normalizes by."""

import json

import numpy as np
import pytest
import torch
import transformers
from preferences import pairs, reward_model

from mossrlhf import RewardReport, RewardShaper, RewardTrainer, RunningMoments
from mossrlhf.models import RewardModel
from mossrlhf.reward_modeling.report import calibration


def random_rewards(count=200):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, generator=generator) + torch.tensor([0.5, 0.0])


def test_figures_equal_numpys():
    scores = random_rewards()
    report = RewardReport.of(scores)
    table = scores.double().numpy()
    margins = table[:, 0] - table[:, 1]
    assert report.pairs == 200
    assert report.accuracy == pytest.approx((margins > 0).mean())
    p = report.accuracy
    assert report.standard_error == pytest.approx((p * (1 - p) / 200) ** 0.5)
    assert report.margin_mean == pytest.approx(margins.mean())
    assert report.margin_std == pytest.approx(margins.std())
    assert report.score_mean == pytest.approx(table.mean())
    assert report.score_std == pytest.approx(table.std())
    assert np.allclose(report.scores, table)


def test_accuracy_counts_ties_as_half_right():
    assert RewardReport.of(torch.tensor([[1.0, 1.0], [2.0, 1.0]])).accuracy == 0.75


def test_calibration_sorts_pairs_by_confidence():
    margins = torch.tensor([-3.0, 0.1, 2.0, -0.2, 0.0, 4.0]).double()
    low, high = calibration(margins, 2)
    sigmoid = lambda x: 1 / (1 + np.exp(-np.array(x)))  # noqa: E731
    assert low.pairs == high.pairs == 3
    assert low.confidence == pytest.approx(sigmoid([0.0, 0.1, 0.2]).mean())
    assert low.accuracy == pytest.approx((1 + 0 + 0.5) / 3)
    assert high.confidence == pytest.approx(sigmoid([2.0, 3.0, 4.0]).mean())
    assert high.accuracy == pytest.approx(2 / 3)


def test_calibration_error_shows_an_overconfident_model():
    generator = torch.Generator().manual_seed(0)
    margins = 2 * torch.randn(20000, generator=generator)
    coin = torch.rand(20000, generator=generator) < torch.sigmoid(margins)
    honest = torch.where(coin, margins, -margins)
    zero = torch.zeros_like(honest)
    assert RewardReport.of(torch.stack([honest, zero], 1)).calibration_error < 0.015
    assert RewardReport.of(torch.stack([4 * honest, zero], 1)).calibration_error > 0.1


def test_empty_and_non_finite_rewards_are_refused():
    for scores in (torch.zeros(0, 2), torch.tensor([[1.0, torch.nan]])):
        with pytest.raises(ValueError, match="expected finite scores of one pair at least"):
            RewardReport.of(scores)


def test_trainer_reports_and_keeps_the_moments(tokenizer, arguments, tmp_path):
    records = pairs(24)
    trainer = RewardTrainer(
        reward_model(),
        arguments(
            learning_rate=0.01, num_train_epochs=2, per_device_train_batch_size=8,
            eval_strategy="steps", eval_steps=2,
        ),
        processing_class=tokenizer, train_dataset=records, eval_dataset=records,
    )  # fmt: skip
    with pytest.raises(ValueError, match="score_mean"):
        RunningMoments.of_reward_model(trainer.reward_model)
    trainer.train()
    metrics = trainer.evaluate()
    report = trainer.report()
    assert report.accuracy == pytest.approx(metrics["eval_accuracy"])
    assert [step for step, _ in report.accuracy_by_step] == [2, 4, 6, 6]
    assert f"{report.accuracy:.1%}" in str(report)
    report.save(tmp_path / "report")
    kept = json.loads((tmp_path / "report" / "reward_report.json").read_text())
    assert kept["calibration"][0].keys() == {"confidence", "accuracy", "pairs"}
    assert (tmp_path / "report" / "reward_report.png").stat().st_size > 10_000

    trainer.save_model(str(tmp_path / "saved"))
    loaded = RewardModel.from_pretrained(tmp_path / "saved")
    moments = RunningMoments.of_reward_model(loaded, count=100)
    assert moments.mean == pytest.approx(metrics["eval_score_mean"])
    assert moments.std == pytest.approx(metrics["eval_score_std"])
    shaper = RewardShaper(normalize=True, moments=moments)
    first = shaper.shape(torch.full((4,), metrics["eval_score_mean"]))
    assert first.abs().max() < 1e-5  # their own standard deviation is 0


def test_report_refuses_no_dataset_and_several(tokenizer, arguments):
    trainer = RewardTrainer(reward_model(), arguments(), processing_class=tokenizer)
    for dataset in (None, {"one": pairs(2)}):
        with pytest.raises(ValueError, match="pass one: report"):
            trainer.report(dataset)


def test_plots_show_the_steps_if_there_are_any(tmp_path):
    history = [{"step": 5, "eval_accuracy": 0.6}, {"step": 10, "eval_accuracy": 0.7}, {"loss": 1}]
    report = RewardReport.of(random_rewards(), history)
    assert [axes.get_title("left")[:8] for axes in report.plot().axes] == [
        "Margins ", "Rewards ", "Accuracy", "Accuracy",
    ]  # fmt: skip
    assert len(RewardReport.of(random_rewards(3)).plot(tmp_path / "new" / "r.svg").axes) == 3
    same = torch.ones(4, 2)  # an untrained head
    assert RewardReport.of(same).plot(tmp_path / "r.png").axes


def test_moments_are_those_of_the_first_of_several_sets(tokenizer, arguments):
    trainer = RewardTrainer(
        reward_model(), arguments(), processing_class=tokenizer,
        eval_dataset={"one": pairs(6), "two": pairs(3)},
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_one_score_mean"] != metrics["eval_two_score_mean"]
    assert trainer.reward_model.config.score_mean == metrics["eval_one_score_mean"]
    assert trainer.reward_model.config.score_std == metrics["eval_one_score_std"]


def test_best_model_gets_its_moments_from_the_log_if_only_weights_are_loaded(
    tokenizer, arguments, monkeypatch
):
    """FSDP and DeepSpeed load weights only."""
    trainer = RewardTrainer(reward_model(), arguments(), processing_class=tokenizer)
    trainer.state.log_history = [
        {"step": step, "eval_score_mean": float(step), "eval_score_std": 2.0 * step}
        for step in (1, 2, 3)
    ] + [{"step": 2, "loss": 0.5}]
    trainer.state.best_global_step = 2
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(transformers.Trainer, "_load_best_model", lambda _: None)
    trainer._load_best_model()
    config = trainer.reward_model.config
    assert (config.score_mean, config.score_std) == (2.0, 4.0)


def test_accuracy_by_step_is_that_of_the_first_of_several_sets(tokenizer, arguments):
    trainer = RewardTrainer(
        reward_model(), arguments(eval_strategy="steps", eval_steps=1, num_train_epochs=1),
        processing_class=tokenizer, train_dataset=pairs(4),
        eval_dataset={"one": pairs(6), "two": pairs(3)},
    )  # fmt: skip
    trainer.train()
    curve = trainer.report(pairs(3)).accuracy_by_step
    logged = [e for e in trainer.state.log_history if "eval_one_accuracy" in e]
    assert curve == [(e["step"], e["eval_one_accuracy"]) for e in logged]
    assert curve


def test_training_clears_the_moments_of_the_untrained_model(tokenizer, arguments):
    trainer = RewardTrainer(
        reward_model(), arguments(num_train_epochs=1), processing_class=tokenizer,
        train_dataset=pairs(4), eval_dataset=pairs(3),
    )  # fmt: skip
    trainer.evaluate()
    assert trainer.reward_model.config.score_mean is not None
    trainer.train()
    assert trainer.reward_model.config.score_mean is None
