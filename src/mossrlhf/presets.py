"""Named compositions of components, with the source of every number.

Each returns keyword arguments of `Trainer`. Options of `TrainerConfig` and other components
replace the preset's::

    preset = presets.ppo_max(total_steps=200, advantage=AdvantageEstimator(lam=0.95))
    Trainer(model, reward=reward, train_dataset=prompts, **preset)
"""

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from mossrlhf.advantage import AdvantageEstimator
from mossrlhf.config import TrainerConfig
from mossrlhf.loss import PPOMaxLoss
from mossrlhf.reward_shaping import RewardShaper

P1_RATES = {"learning_rate": 5e-7, "critic_learning_rate": 1.65e-6}
"""P1: the critic learns 3.3 times as fast as the policy."""

MOSS_RATES = {"learning_rate": 5e-7, "critic_learning_rate": 1.5e-6}
"""MOSS-RLHF's scripts: three times as fast."""

COMPONENTS = ("shaper", "advantage", "loss", "generation_config")
"""Arguments of `Trainer` that replace a preset's component."""

OF_TRAINERS = frozenset([
    "accelerator", "callbacks", "critic", "eval_dataset", "model", "peft_config",
    "processing_class", "ptx_dataset", "ref_model", "reward", "sampler", "train_dataset",
])  # fmt: skip
"""Arguments of `Trainer` that no preset sets."""


def ppo_max(**options: Any) -> dict[str, Any]:
    """PPO-max, the paper's algorithm.

    KL penalty η = 0.05 (P1), scores normalized by running moments (P1) and clipped at δ = 0.8
    (recommended in P1, App. B.1), value and surrogate clip 0.2 (MOSS-RLHF), GAE γ = 1, λ = 0.9
    (P1, App. C.3), gradient norms clipped at 1 (MOSS-RLHF), learning rates 5e-7 (P1, MOSS-RLHF)
    and 1.65e-6 (P1), warm-up over 10 % (P1), 128 responses in minibatches of 32 (P1 §5.1), the
    critic warmed up for 50 iterations (P1 gives no number).

    Args:
        options: of `TrainerConfig`, or `COMPONENTS`. A ``learning_rate`` without a
            ``critic_learning_rate`` sets the critic's to 3.3 times as much, P1's proportion.
    Source: P1 §5.4.
    """
    return _composed(
        options,
        {**_rates(P1_RATES, options), "critic_pretrain_steps": 50},
        shaper=RewardShaper(kl_coef=0.05, normalize=True, clip=0.8),
        advantage=AdvantageEstimator(gamma=1.0, lam=0.9),
        loss=PPOMaxLoss(policy_clip=0.2, value_clip=0.2),
    )


def vanilla_ppo(**options: Any) -> dict[str, Any]:
    """PPO with only the clipped surrogate and GAE, the baseline of PPO-max.

    No KL penalty, no reward normalization or clip, no value clip, no critic warm-up, no bound on
    gradients; surrogate clip 0.2 (MOSS-RLHF), GAE γ = 1, λ = 0.9 (P1), rates as in `ppo_max`.

    Args:
        options: of `TrainerConfig`, or `COMPONENTS`; the critic's learning rate follows the
            policy's as in `ppo_max`.
    Source: P1 §5.2 (vanilla PPO).
    """
    return _composed(
        options,
        {**_rates(P1_RATES, options), "max_grad_norm": None},
        shaper=RewardShaper(kl_coef=None),
        advantage=AdvantageEstimator(gamma=1.0, lam=0.9),
        loss=PPOMaxLoss(policy_clip=0.2, value_clip=None),
    )


def moss_rlhf_2023(language: str, **options: Any) -> dict[str, Any]:
    """The settings of MOSS-RLHF's released scripts, with fewer details than the paper.

    Reward scaling by the running std of scores, surrogate and value clip 0.2, one gradient bound
    of 1 for policy and critic together, KL penalty 0.01 (en) or 0.1 (zh), GAE λ = 0.95, learning
    rates 5e-7 and 1.5e-6 with inverse-square-root decay, rollouts of 2 in one batch of 2 for one
    epoch: one step per rollout, so the ratio is about 1 and neither clip normally binds. No
    reward clip, no advantage normalization, no PTX, no critic warm-up. Sampling at
    temperature 0.8, top-p 0.9, repetition penalty 1.1, at most 512 tokens. Log-probabilities are
    at temperature 1 in MOSS-RLHF, at 0.8 in this library.

    Args:
        language: "en" or "zh".
        options: of `TrainerConfig`, or `COMPONENTS`. A ``learning_rate`` without a
            ``critic_learning_rate`` sets the critic's to three times as much, the scripts'
            proportion.

    Raises:
        ValueError: if the language is neither.

    Source: MOSS-RLHF (``train_ppo_{en,zh}.sh``, ``config.py``).
    """
    coefficients = {"en": 0.01, "zh": 0.1}
    if language not in coefficients:
        raise ValueError(
            f"language: got {language!r}, expected 'en' or 'zh', the languages of the scripts"
        )
    settings = {
        **_rates(MOSS_RATES, options),
        "lr_scheduler_type": "inverse_sqrt",
        "rollout_size": 2,
        "minibatch_size": 2,
        "num_ppo_epochs": 1,
        "max_grad_norm": 1.0,
        "clip_grad_jointly": True,
    }
    return _composed(
        options,
        settings,
        shaper=RewardShaper(kl_coef=coefficients[language], scale=True),
        advantage=AdvantageEstimator(gamma=1.0, lam=0.95),
        loss=PPOMaxLoss(policy_clip=0.2, value_clip=0.2),
        generation_config=GenerationConfig(
            max_new_tokens=512, do_sample=True, temperature=0.8, top_p=0.9, repetition_penalty=1.1
        ),
    )


def trl_ppo(**options: Any) -> dict[str, Any]:
    """TRL 1.12's PPO: its estimator, placement of the score, clips and coefficients.

    Advantages whitened over the rollout (unbiased variance), score one step after the end of a
    response, KL penalty 0.05 by k1, clips 0.2, value coefficient 0.1 and one learning rate of
    3e-6, decaying linearly, four epochs, no bound on gradients (its config has one that its loop
    never reads), temperature 0.7, responses of at most 53 tokens.

    Args:
        options: of `TrainerConfig`, or `COMPONENTS`. The critic learns at the policy's rate
            unless it is given a ``critic_learning_rate``.
    Source: TRL 1.12.0, ``trl.experimental.ppo``.
    """
    settings = {
        "learning_rate": 3e-6,
        "critic_learning_rate": options.get("learning_rate", 3e-6),
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "num_ppo_epochs": 4,
        "minibatch_size": options.get("rollout_size", 128),  # one minibatch an epoch
        "max_grad_norm": None,
    }
    return _composed(
        options,
        settings,
        shaper=RewardShaper(kl_coef=0.05, score_after_end=True),
        advantage=AdvantageEstimator(gamma=1.0, lam=0.95, whiten=True, correction=1),
        loss=PPOMaxLoss(policy_clip=0.2, value_clip=0.2, value_coef=0.1),
        generation_config=GenerationConfig(max_new_tokens=53, do_sample=True, temperature=0.7),
    )


def _composed(
    options: Mapping[str, Any], settings: Mapping[str, Any], **components: Any
) -> dict[str, Any]:
    """Replace the preset's components and settings by the given ones."""
    given = {name: options[name] for name in COMPONENTS if name in options}
    others = {name: value for name, value in options.items() if name not in COMPONENTS}
    if stray := others.keys() & OF_TRAINERS:
        raise TypeError(
            f"presets: {min(stray)!r} is an argument of Trainer itself; pass it there: "
            f"Trainer(..., {min(stray)}=..., **preset)"
        )
    return {"args": TrainerConfig(**{**settings, **others}), **components, **given}


def _rates(published: Mapping[str, float], options: Mapping[str, Any]) -> dict[str, float]:
    """Keep the published ratio of the two learning rates if only the policy's is given."""
    given = options.get("learning_rate")
    if given is None:
        return dict(published)
    proportion = published["critic_learning_rate"] / published["learning_rate"]
    return {**published, "critic_learning_rate": given * proportion}
