"""Findings F1 to F13: claims and expected verdicts, fixed before any of these runs."""

from study.claims import (
    ALIKE,
    NATS,
    QUALITY,
    SCORE,
    above_sft,
    alike,
    bias,
    collapses,
    error_before,
    higher,
    later,
    long_change,
    nearer,
    ratio,
    stays,
    wins,
)
from study.plan import LONG
from study.statistics import COLLAPSE_KL, Claim, Finding

CURVES = ("score", "true_quality", "kl", "length", "perplexity_policy", "perplexity_sft")

FINDINGS = (
    Finding(
        id="F1",
        title="Vanilla PPO: the score rises, then patterns collapse",
        source="P1 Fig. 4",
        expected="reproduced, but for the length, which may go either way",
        claims=(
            above_sft("vanilla", "reward_score"),
            collapses("vanilla"),
            Claim(
                "perplexity under the policy ends below SFT's",
                lambda s: (
                    s["vanilla"].curve("perplexity_policy")[0]
                    - s["vanilla"].held("perplexity_policy")
                ),
                "perplexity",
            ),
            above_sft("vanilla", sign=-1),
            Claim(
                "responses grow longer",
                lambda s: s["vanilla"].held("length") - s.sft["response_length"],
                "tokens",
            ),
        ),
        arms=("vanilla", "ppo_max"),
        panels=CURVES,
        chinese=True,
    ),
    Finding(
        id="F2",
        title="Normalizing and clipping rewards or advantages delays collapse, scaling does not",
        source="P1 Fig. 6",
        expected="partly: scaling alone does nothing, normalizing and clipping alone too little",
        claims=(
            later("reward_clip_0.3", "vanilla"),
            later("reward_clip_0.8", "vanilla"),
            later("advantage_clip_0.3", "vanilla"),
            collapses("reward_scaling"),
            Claim(
                "`reward_scaling` passes KL 15 within 10 iterations of `vanilla`",
                lambda s: s["reward_scaling"].passage - s["vanilla"].passage,
                "iterations",
                within=10,
            ),
        ),
        arms=(
            "vanilla",
            "reward_scaling",
            "reward_clip_0.3",
            "reward_clip_0.8",
            "advantage_clip_0.3",
        ),
        panels=CURVES,
    ),
    Finding(
        id="F3",
        title="A KL penalty, or clipped entropy, gives lasting stability; importance sampling "
        "alone does not, and with the penalty it is stabler and ends lower",
        source="P1 Fig. 7",
        expected="partly: the penalty holds; importance sampling alone holds as well",
        claims=(
            stays("kl_0.05"),
            above_sft("kl_0.05"),
            stays("entropy_target"),
            collapses("importance"),
            nearer("kl_and_importance", "kl_0.05"),
            higher("reward_score", "kl_0.05", "kl_and_importance", SCORE),
        ),
        arms=("vanilla", "kl_0.05", "entropy_target", "importance", "kl_and_importance"),
        panels=CURVES,
    ),
    Finding(
        id="F4",
        title="Larger η: lower score, smaller deviation, in strict order (0.05, 0.1, 0.2)",
        source="P1 Fig. 15",
        expected="reproduced",
        claims=(
            higher("reward_score", "kl_0.05", "kl_0.1", SCORE),
            higher("reward_score", "kl_0.1", "kl_0.2", SCORE),
            nearer("kl_0.1", "kl_0.05"),
            nearer("kl_0.2", "kl_0.1"),
        ),
        arms=("vanilla", "kl_0.05", "kl_0.1", "kl_0.2"),
        panels=CURVES,
        chinese=True,
    ),
    Finding(
        id="F5",
        title="A critic from the reward model and one from SFT converge alike; pre-training it "
        "removes the early fluctuation; a policy without SFT fails",
        source="P1 Fig. 8",
        expected="partly: too few seeds to call two collapsing runs alike",
        claims=(
            alike("reward_score", "critic_sft", "vanilla", SCORE),
            Claim(
                "the early drop of the score is smaller with `critic_pretrained`",
                lambda s: (
                    s["vanilla"].early_drop("score") - s["critic_pretrained"].early_drop("score")
                ),
                SCORE,
            ),
            ratio(
                "the value loss of the first 20 iterations is smaller with `critic_pretrained`",
                "vanilla",
                "critic_pretrained",
                lambda run: sum(run.curve("value_loss")[:10]) / len(run.curve("value_loss")[:10]),
            ),
            higher("reward_score", "vanilla", "no_sft", SCORE),
            above_sft("no_sft", sign=-1),
        ),
        arms=("vanilla", "critic_sft", "critic_pretrained", "no_sft"),
        panels=("score", "true_quality", "kl", "value_loss", "explained_variance", "length"),
    ),
    Finding(
        id="F6",
        title="Value clip and advantage normalization conflict",
        source="P1 Fig. 14",
        expected="undecided",
        claims=(
            nearer("value_clip", "value_clip_advantage_norm"),
            nearer("advantage_norm", "value_clip_advantage_norm"),
            higher("true_quality", "value_clip", "value_clip_advantage_norm", QUALITY),
            higher("true_quality", "advantage_norm", "value_clip_advantage_norm", QUALITY),
        ),
        arms=("vanilla", "value_clip", "advantage_norm", "value_clip_advantage_norm"),
        panels=CURVES,
    ),
    Finding(
        id="F7",
        title="The surrogate clip alone does not stabilize as the KL penalty does",
        source="P1 Fig. 17",
        expected="reproduced",
        claims=(
            nearer("kl_0.05", "vanilla"),
            nearer("kl_0.05", "surrogate_clip_0.1"),
            higher("true_quality", "kl_0.05", "vanilla", QUALITY),
            higher("true_quality", "kl_0.05", "surrogate_clip_0.1", QUALITY),
        ),
        arms=("vanilla", "surrogate_clip_0.1", "surrogate_unclipped", "kl_0.05"),
        panels=CURVES,
    ),
    Finding(
        id="F8",
        title="The threshold of the gradient clip hardly matters",
        source="P1 Fig. 18",
        expected="reproduced",
        claims=(
            alike("reward_score", "gradient_0.5", "ppo_max", SCORE),
            alike("true_quality", "gradient_0.5", "ppo_max", QUALITY),
            alike("reward_score", "gradient_free", "ppo_max", SCORE),
            alike("true_quality", "gradient_free", "ppo_max", QUALITY),
        ),
        arms=("gradient_0.5", "ppo_max", "gradient_free"),
        panels=("score", "true_quality", "kl", "policy_grad_norm", "critic_grad_norm", "length"),
    ),
    Finding(
        id="F9",
        title="λ = 0: small variance, unstable; λ = 1: high variance",
        source="P1 Fig. 19",
        expected="partly: the variance is in that order; responses of 16 tokens are too short for "
        "λ = 0 to become unstable",
        claims=(
            ratio(
                "advantages vary more with `lam_1` than with λ = 0.9",
                "lam_1",
                "ppo_max",
                lambda run: run.last("advantages_std"),
            ),
            ratio(
                "and with λ = 0.9 more than with `lam_0`",
                "ppo_max",
                "lam_0",
                lambda run: run.last("advantages_std"),
            ),
            ratio(
                "the score fluctuates more with `lam_0` than with λ = 0.9",
                "lam_0",
                "ppo_max",
                lambda run: run.fluctuation("score"),
            ),
        ),
        arms=("lam_0", "ppo_max", "lam_1"),
        panels=("score", "true_quality", "kl", "advantages_std", "value_loss", "length"),
    ),
    Finding(
        id="F10",
        title="An entropy bonus without a tuned clip collapses",
        source="P1 Fig. 16",
        expected="partly: the bonus collapses; the target is not so fine a line",
        claims=(
            collapses("entropy_bonus"),
            stays("entropy_target"),
            collapses("entropy_target_0.9"),
            collapses("entropy_target_1.1"),
        ),
        arms=("entropy_bonus", "entropy_target", "entropy_target_0.9", "entropy_target_1.1"),
        panels=("score", "true_quality", "kl", "entropy", "length", "perplexity_sft"),
    ),
    Finding(
        id="F11",
        title="PPO-max is stable over 10,000 optimizer steps",
        source="P1 Fig. 9",
        expected="reproduced",
        claims=(
            Claim(
                "it counts as collapsed in no logged iteration (0.5 less the largest flag)",
                lambda s: 0.5 - max(s[LONG].curve("collapsed")),
                "flag",
            ),
            Claim(
                "KL over the last tenth is under 15",
                lambda s: COLLAPSE_KL - s[LONG].last("kl"),
                NATS,
            ),
            Claim(
                "true quality of the last tenth is at most 0.3 below the second tenth's",
                lambda s: long_change("true_quality")(s) + ALIKE,
                QUALITY,
            ),
            wins(LONG, "held_out"),
        ),
        arms=(LONG,),
        panels=CURVES,
        chinese=True,
    ),
    Finding(
        id="F12",
        title="PPO-max is preferred to its SFT model",
        source="P1 Fig. 10",
        expected="reproduced",
        claims=(
            wins("ppo_max", "held_out"),
            wins("ppo_max", "helpful"),
            wins("ppo_max", "harmless"),
            wins("ppo_max", "held_out", "reward_"),
        ),
        arms=("ppo_max",),
        panels=(),
        chinese=True,
    ),
    Finding(
        id="F13",
        title="A critic from the reward model, with λ < 1 for its own targets, is biased; "
        "pre-training and λ = 1 for its targets mend it",
        source="arXiv 2503.01491",
        expected="partly: pre-training mends the start; short responses leave little bias to mend",
        claims=(
            Claim(
                "before PPO the critic errs more without pre-training",
                lambda s: error_before("unpretrained")(s) - error_before("ppo_max")(s),
                "normalized reward",
            ),
            Claim(
                "after PPO |bias| is larger with λ = 0.9 than with 1 for its targets",
                lambda s: bias("unpretrained")(s) - bias("unpretrained_decoupled")(s),
                "normalized reward",
            ),
            higher("true_quality", "decoupled", "unpretrained", QUALITY),
        ),
        arms=("unpretrained", "unpretrained_decoupled", "ppo_max", "decoupled"),
        panels=("score", "true_quality", "kl", "value_loss", "explained_variance", "length"),
    ),
)
