"""Options of the loss, the shaper and the estimators, and what stands in their places."""

import torch

from bad_inputs.room import Room
from mossrlhf import (
    AdvantageEstimator,
    Advantages,
    GroupRelative,
    PPOMaxLoss,
    RewardShaper,
    presets,
)
from mossrlhf.minibatches import RolloutBuffer, split
from mossrlhf.reward_shaping import RollingReturnMoments, RunningMoments

room = Room("PPOMaxLoss, RewardShaper, AdvantageEstimator")
row = room.row


def options(given, gets, kind, **values):
    """A row on options of a component."""
    row(given, gets, lambda shop: kind(**values))


options(
    "a negative clip",
    "ValueError: PPOMaxLoss(policy_clip=): got -0.2, expected a number in (0, 1]",
    PPOMaxLoss,
    policy_clip=-0.2,
)
options(
    "a clip with one end",
    "ValueError: PPOMaxLoss(policy_clip=): got (0.2,), expected a number, or a pair (low, high)",
    PPOMaxLoss,
    policy_clip=(0.2,),
)
options(
    "a clip in quotes",
    "TypeError: PPOMaxLoss(policy_clip=): got '0.2', expected a number, or a pair (low, high)",
    PPOMaxLoss,
    policy_clip="0.2",
)
options(
    "a value clip of 0",
    "ValueError: PPOMaxLoss(value_clip=): got 0, expected a number in (0, inf] (None disables it",
    PPOMaxLoss,
    value_clip=0,
)
options(
    "a dual clip of 1",
    "ValueError: PPOMaxLoss(dual_clip=): got 1.0, expected a number in (1, inf]",
    PPOMaxLoss,
    dual_clip=1.0,
)
options(
    "a coefficient that is NaN",
    "ValueError: PPOMaxLoss(entropy_coef=): got nan, expected a number in [0, inf]",
    PPOMaxLoss,
    entropy_coef=float("nan"),
)
options(
    "an entropy target without a weight",
    "ValueError: PPOMaxLoss(entropy_target=2.0): entropy_coef is None, so the target has no weight",
    PPOMaxLoss,
    entropy_target=2.0,
)
row(
    "an entropy target above ln V",
    "ValueError: PPOMaxLoss(entropy_target=35.0): a distribution over 185 tokens has at most ln "
    "185 "
    "= 5.2 nats, so the target would never bind",
    lambda shop: shop.trainer(loss=PPOMaxLoss(entropy_coef=0.01, entropy_target=35.0)),
)
options(
    "a switch in quotes",
    "TypeError: PPOMaxLoss(advantage_norm=): got 'no', expected True or False",
    PPOMaxLoss,
    advantage_norm="no",
)
row(
    "a function for a loss",
    "TypeError: loss: got <function …expected a PPOMaxLoss; for another algorithm subclass it",
    lambda shop: shop.trainer(loss=lambda stats: 0.0),
)
row(
    "the class for the object",
    "TypeError: loss: got the class PPOMaxLoss, expected PPOMaxLoss(...)",
    lambda shop: shop.trainer(loss=PPOMaxLoss),
)


@row(
    "a loss of one's own that is a mean",
    "ValueError: policy_loss: returned …expected one number per token",
)
def reduced(shop):
    class Mean(PPOMaxLoss):
        def policy_loss(self, logprob, old_logprob, advantage):
            return (logprob * advantage).mean()

    return shop.stepped(loss=Mean())


options(
    "a negative KL coefficient",
    "ValueError: RewardShaper(kl_coef=): got -0.1, expected a number in [0, inf]",
    RewardShaper,
    kl_coef=-0.1,
)
options(
    "a bound of 0 on rewards",
    "ValueError: RewardShaper(clip=): got 0.0, expected a number in (0, inf]",
    RewardShaper,
    clip=0.0,
)
options(
    "normalizing and scaling at once",
    "ValueError: RewardShaper(normalize=True, scale=True): both divide by the running std",
    RewardShaper,
    normalize=True,
    scale=True,
)
options(
    "normalizing by a rolling sum",
    "ValueError: RewardShaper(normalize=True, moments=RollingReturnMoments()): the mean of a "
    "rolling sum is not that of the scores; use scale=True with it",
    RewardShaper,
    normalize=True,
    moments=RollingReturnMoments(),
)
options(
    "a dict for moments",
    "TypeError: RewardShaper(moments=): got {'mean': 0.0}, expected RunningMoments(...)",
    RewardShaper,
    moments={"mean": 0.0},
)
row(
    "moments of a reward model that was never evaluated",
    "ValueError: model: its configuration has ('score_mean', 'score_std') = (None, None)…expected "
    "two numbers, which RewardTrainer.evaluate() leaves there",
    lambda shop: RunningMoments.of_reward_model(shop.reward_model()),
)
row(
    "a reward per token for a shaper that normalizes",
    "ValueError: RewardShaper(normalize=True): a reward gave a number per token, expected one per "
    "response",
    lambda shop: shop.stepped(
        reward=dense, shaper=RewardShaper(normalize=True), args=dict(rollout_size=8)
    ),
)


def dense(*, completion_ids):
    return torch.zeros(len(completion_ids), max(map(len, completion_ids)))


row(
    "a shaper of one's own that returns a number per response",
    "ValueError: shaper: returned (8,), expected rewards per token, (8, ",
    lambda shop: shop.stepped(shaper=lambda rollout: rollout.scores),
)
row(
    "a shaper of one's own that returns None",
    "TypeError: shaper: returned NoneType, expected rewards per token, a tensor",
    lambda shop: shop.stepped(shaper=lambda rollout: None),
)
row(
    "a shaper of one's own that returns NaN",
    "NonFiniteError: not finite: …; the step was not taken. In the minibatch, rewards of "
    "sample 0 is not finite (process 0, prompt …); …read_fault('…') returns the batch",
    lambda shop: shop.stepped(shaper=lambda rollout: rollout.mask * float("nan")),
)
options(
    "a discount above 1",
    "ValueError: AdvantageEstimator(gamma=): got 1.1, expected a number in [0, 1]",
    AdvantageEstimator,
    gamma=1.1,
)
options(
    "a λ that is NaN",
    "ValueError: AdvantageEstimator(lam=): got nan, expected a number in [0, 1]",
    AdvantageEstimator,
    lam=float("nan"),
)
options(
    "an option of another library",
    "TypeError: AdvantageEstimator has no option 'gae_lambda'; here that is "
    "AdvantageEstimator(lam=",
    AdvantageEstimator,
    gae_lambda=0.9,
)
options(
    "a correction of 2",
    "ValueError: AdvantageEstimator(correction=): got 2, expected a number in [0, 1]",
    AdvantageEstimator,
    correction=2,
)
row(
    "groups of another size than the samples per prompt",
    "ValueError: advantage: its groups are of 4, but TrainerConfig(samples_per_prompt=2): set both",
    lambda shop: shop.trainer(
        advantage=GroupRelative(group_size=4), args=dict(samples_per_prompt=2)
    ),
)
options(
    "groups of one",
    "ValueError: GroupRelative(group_size=): got 1, expected a number in [2, inf]",
    GroupRelative,
    group_size=1,
)
row(
    "an estimator of one's own that returns a tensor",
    "TypeError: advantage: returned Tensor, expected Advantages(advantages, returns)",
    lambda shop: shop.stepped(advantage=lambda rewards, values, mask: rewards - values),
)
row(
    "an estimator of one's own that returns a number per response",
    "ValueError: advantage: returned advantages (8,) and returns (8,), expected (8, ",
    lambda shop: shop.stepped(
        advantage=lambda rewards, values, mask: Advantages(rewards.sum(1), rewards.sum(1))
    ),
)
row(
    "values of a critic that there is not",
    "ValueError: TrainerConfig(bootstrap_truncated=True): it needs the critic's values, and "
    "critic=False; leave one of them out",
    lambda shop: shop.trainer(critic=False, args=dict(bootstrap_truncated=True)),
)
row(
    "a preset for a language that there is none for",
    "ValueError: language: got 'fr', expected 'en' or 'zh'",
    lambda shop: presets.moss_rlhf_2023("fr"),
)
row(
    "minibatches of an empty buffer",
    "ValueError: rollouts: got none, expected at least one",
    lambda shop: list(RolloutBuffer().minibatches(4)),
)
row(
    "a token budget of 0",
    "ValueError: max_tokens: got 0, expected at least 1",
    lambda shop: split(shop.trainer().collect(), max_tokens=0),
)
