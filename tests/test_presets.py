"""Presets: the published numbers, and learning rates that stay in proportion."""

import inspect
from functools import partial

import pytest

from mossrlhf import PPOMaxLoss, Trainer, presets

MOSS = partial(presets.moss_rlhf_2023, "en")


def rates(preset, **options):
    args = preset(**options)["args"]
    return args.learning_rate, args.critic_learning_rate


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        (presets.ppo_max, (5e-7, 1.65e-6)),
        (presets.vanilla_ppo, (5e-7, 1.65e-6)),
        (MOSS, (5e-7, 1.5e-6)),
        (presets.trl_ppo, (3e-6, 3e-6)),
    ],
)
def test_learning_rates_are_the_published_ones(preset, published):
    assert rates(preset) == published


@pytest.mark.parametrize(
    ("preset", "proportion"),
    [(presets.ppo_max, 3.3), (presets.vanilla_ppo, 3.3), (MOSS, 3.0), (presets.trl_ppo, 1.0)],
)
def test_the_critics_rate_follows_the_policys(preset, proportion):
    assert rates(preset, learning_rate=1e-3) == pytest.approx((1e-3, proportion * 1e-3))
    assert rates(preset, learning_rate=1e-3, critic_learning_rate=2e-4) == (1e-3, 2e-4)


@pytest.mark.parametrize("preset", [presets.ppo_max, presets.vanilla_ppo, MOSS, presets.trl_ppo])
def test_the_critics_rate_alone_leaves_the_policys(preset):
    assert rates(preset, critic_learning_rate=1.0) == (rates(preset)[0], 1.0)


@pytest.mark.parametrize("preset", [presets.ppo_max, presets.vanilla_ppo, MOSS, presets.trl_ppo])
def test_a_component_given_stands_in_place_of_the_presets(preset):
    loss = PPOMaxLoss(policy_clip=0.3)
    parts, usual = preset(loss=loss, total_steps=7), preset(total_steps=7)
    assert parts.pop("loss") is loss
    del usual["loss"]
    assert repr(parts) == repr(usual)
    assert parts["args"].total_steps == 7


def test_what_is_neither_an_option_nor_a_component_is_refused():
    with pytest.raises(TypeError, match="no option 'rewards'"):
        presets.ppo_max(rewards=None)
    with pytest.raises(
        TypeError, match=r"'critic' is an argument of Trainer itself; pass it there"
    ):
        presets.ppo_max(critic=False)


def test_arguments_of_the_trainer_are_known():
    ours = set(presets.COMPONENTS) | presets.OF_TRAINERS | {"args"}
    assert ours == set(inspect.signature(Trainer).parameters)


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="language: got 'fr', expected 'en' or 'zh'"):
        presets.moss_rlhf_2023("fr")
