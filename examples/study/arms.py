"""The arms: each a preset of the library with one component replaced.

All run at the same rates, with the same rollouts, minibatches, prompts and sampling. Numbers of the
paper are marked P1; the others are ours and were fixed before the first run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import LlamaForCausalLM

from mossrlhf import AdvantageEstimator, PPOMaxLoss, RewardModel, RewardShaper, presets
from mossrlhf.demo import copied
from mossrlhf.reward_shaping import RollingReturnMoments
from study.plan import LONG
from study.preparing import Prepared

Change = Callable[[Prepared], Mapping[str, Any]]


def nothing(prepared: Prepared) -> Mapping[str, Any]:
    return {}


def fine_tuned(prepared: Prepared) -> LlamaForCausalLM:
    return copied(prepared.policy)


def language_model(prepared: Prepared) -> LlamaForCausalLM:
    return copied(prepared.base)


def reward_model(prepared: Prepared) -> None:
    """No critic is given: the trainer then copies the reward model."""


def fine_tuned_critic(prepared: Prepared) -> RewardModel:
    return RewardModel(copied(prepared.policy).model)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to run PPO.

    Args:
        title: in tables and legends.
        preset: the preset it is a variant of.
        change: options and components that replace the preset's, for a prepared world.
        policy: the initial policy and reference.
        critic: the initial critic; None for a copy of the reward model.
        pretrained: whether there is a critic warm-up.
        critic_evaluated: whether its values are compared with Monte-Carlo continuations.
        judged_apart: whether harmless and harmful requests are also evaluated separately.
    """

    title: str
    preset: Callable[..., dict[str, Any]] = presets.vanilla_ppo
    change: Change = nothing
    policy: Callable[[Prepared], LlamaForCausalLM] = fine_tuned
    critic: Callable[[Prepared], RewardModel | None] = reward_model
    pretrained: bool = False
    critic_evaluated: bool = False
    judged_apart: bool = False

    def parts(self, prepared: Prepared, pretrain: int, **options: Any) -> dict[str, Any]:
        """Return keyword arguments of `Trainer`.

        Args:
            prepared: the world of the run.
            pretrain: iterations of critic warm-up, if the arm has one.
            options: of `TrainerConfig`, the same in all arms.
        """
        options["critic_pretrain_steps"] = pretrain if self.pretrained else 0
        return self.preset(**{**options, **self.change(prepared)})


def shaped(**settings: Any) -> Change:
    """A change of the shaper, created for each run, since it has running moments."""
    return lambda prepared: {"shaper": RewardShaper(**{"kl_coef": None, **settings})}


def scaled(prepared: Prepared) -> Mapping[str, Any]:
    """P1's scaling, by the standard deviation of a rolling discounted sum of scores."""
    return {"shaper": RewardShaper(kl_coef=None, scale=True, moments=RollingReturnMoments())}


def lost(**settings: Any) -> Change:
    """A change of vanilla PPO's loss."""
    loss = PPOMaxLoss(**{"policy_clip": 0.2, "value_clip": None, **settings})
    return lambda prepared: {"loss": loss}


def both(*changes: Change) -> Change:
    """Several changes at once."""
    return lambda prepared: {k: v for change in changes for k, v in change(prepared).items()}


def options(**settings: Any) -> Change:
    """Other options of `TrainerConfig`."""
    return lambda prepared: settings


def entropy_target(times: float) -> Change:
    """An entropy target of `times` the SFT model's entropy, untuned, with P1's weight."""
    return lambda prepared: {
        "loss": PPOMaxLoss(
            value_clip=None, entropy_coef=0.01, entropy_target=times * prepared.entropy
        )
    }


def estimated(**settings: Any) -> Change:
    """Another λ of PPO-max's estimator."""
    return lambda prepared: {"advantage": AdvantageEstimator(**{"lam": 0.9, **settings})}


MAX: dict[str, Any] = dict(preset=presets.ppo_max, pretrained=True)
"""PPO-max as the preset has it: η = 0.05, δ = 0.8, value clip 0.2, λ = 0.9, gradient bound 1."""

ARMS: Mapping[str, Arm] = {
    "vanilla": Arm(title="vanilla PPO"),
    # F2, P1 Fig. 6; δ = 0.8 is P1's (App. B.1), 0.3 ours
    "reward_scaling": Arm(
        title="reward scaling",
        change=scaled,
    ),
    "reward_clip_0.3": Arm(title="reward norm., clip 0.3", change=shaped(normalize=True, clip=0.3)),
    "reward_clip_0.8": Arm(title="reward norm., clip 0.8", change=shaped(normalize=True, clip=0.8)),
    "advantage_clip_0.3": Arm(
        title="advantage norm., clip 0.3", change=lost(advantage_norm=True, advantage_clip=0.3)
    ),
    # F3, P1 Fig. 7, and F10, Fig. 16
    "kl_0.05": Arm(title="KL penalty 0.05", change=shaped(kl_coef=0.05)),
    "entropy_target": Arm(title="entropy at the SFT model's", change=entropy_target(1.0)),
    "importance": Arm(title="importance sampling", change=lost(reference_ratio=True)),
    "kl_and_importance": Arm(
        title="KL 0.05 and importance sampling",
        change=both(shaped(kl_coef=0.05), lost(reference_ratio=True)),
    ),
    "entropy_bonus": Arm(title="entropy bonus", change=lost(entropy_coef=0.01)),
    "entropy_target_0.9": Arm(title="entropy target 10 % lower", change=entropy_target(0.9)),
    "entropy_target_1.1": Arm(title="entropy target 10 % higher", change=entropy_target(1.1)),
    # F4, P1 Fig. 15
    "kl_0.1": Arm(title="KL penalty 0.1", change=shaped(kl_coef=0.1)),
    "kl_0.2": Arm(title="KL penalty 0.2", change=shaped(kl_coef=0.2)),
    # F5, P1 Fig. 8
    "critic_sft": Arm(title="critic from the SFT model", critic=fine_tuned_critic),
    "critic_pretrained": Arm(title="critic pre-trained", pretrained=True),
    "no_sft": Arm(title="policy without SFT", policy=language_model),
    # F6, P1 Fig. 14
    "value_clip": Arm(title="value clip 0.2", change=lost(value_clip=0.2)),
    "advantage_norm": Arm(title="advantage norm.", change=lost(advantage_norm=True)),
    "value_clip_advantage_norm": Arm(
        title="value clip and advantage norm.", change=lost(value_clip=0.2, advantage_norm=True)
    ),
    # F7, P1 Fig. 17
    "surrogate_clip_0.1": Arm(title="surrogate clip 0.1", change=lost(policy_clip=0.1)),
    "surrogate_unclipped": Arm(title="no surrogate clip", change=lost(policy_clip=None)),
    # F8, P1 Fig. 18
    "gradient_0.5": Arm(
        title="PPO-max, gradients at 0.5", change=options(max_grad_norm=0.5), **MAX
    ),
    "gradient_free": Arm(
        title="PPO-max, gradients unbounded", change=options(max_grad_norm=None), **MAX
    ),
    # F9, P1 Fig. 19
    "lam_0": Arm(title="PPO-max, λ = 0", change=estimated(lam=0.0), **MAX),
    "lam_1": Arm(title="PPO-max, λ = 1", change=estimated(lam=1.0), **MAX),
    # F12, P1 Fig. 10, and F13
    "ppo_max": Arm(title="PPO-max", critic_evaluated=True, judged_apart=True, **MAX),
    "unpretrained": Arm(
        title="PPO-max, critic not pre-trained", preset=presets.ppo_max, critic_evaluated=True
    ),
    "unpretrained_decoupled": Arm(
        title="not pre-trained, λ of the critic 1",
        preset=presets.ppo_max,
        change=estimated(value_lam=1.0),
        critic_evaluated=True,
    ),
    "decoupled": Arm(
        title="PPO-max, λ of the critic 1",
        change=estimated(value_lam=1.0),
        critic_evaluated=True,
        **MAX,
    ),
    # F11, P1 Fig. 9
    LONG: Arm(title="PPO-max, 10,000 steps", judged_apart=True, **MAX),
}
