"""The handwritten text of the page; numbers are in the tables."""

LEAD = """
# Reproducing the paper's findings

Thirteen findings of *Secrets of RLHF in Large Language Models Part I: PPO* ([arXiv
2307.04964](https://arxiv.org/abs/2307.04964)) and of one later paper, in a dialogue world small
enough for a laptop. Its true preference is known, and reaches training only through noisy
preference pairs. The claims, their measures and the expected verdicts were committed before any
of these runs. Two things changed later: one measurement was corrected ([F13](#f13)), and the
number of seeds was raised to five before any result was seen. `make study` repeats all runs;
`python examples/secrets_study.py --quick` tests in a minute that they run.
"""

METHOD = """
Every arm is a preset of the library with one or two components replaced
(`examples/study/arms.py`). All have the same SFT model (except for one arm), reward model, prompts
and sampling. They run 100 iterations (except for F11) of 64 responses in minibatches of 16, at one
learning rate for policy and critic, that of `make demo`. **No arm was tuned**, so an arm may not
be at its best. Six arms also run at a third of the rate, since a smaller step can hide a collapse.

A claim is a number for each seed, and its sign decides. If two arms should be equal, it must be
within 0.3, or ten iterations in F2; a run that never passes the bound counts as passing it at its
last iteration. A claim *holds* if the 95 % interval of Student's t over the seeds is on the claimed
side, is *against* if it is on the other side, and *open* otherwise. A finding is reproduced if all
its claims hold, partly if some do, refuted if none does and one is against, else undecided. Of some
fifty claims a few may be decided wrongly by chance: with five seeds and skewed numbers the
intervals are rough, and claims share runs.

KL divergences are in nats per response (signed k1). The library counts more than 15 as a collapse
if the responses' distinct-2 is also below half of the reference's. In the figures a line is the
mean over the seeds (the median for KL, losses, norms and perplexity under the SFT model). A band
is their range, and thin lines are the seeds. Axes of KL are linear below 1.

The seeds 100 to 104 were not used while world, library and study were written. Vanilla PPO, its KL
penalties and PPO-max had run on other seeds, so their expectations are not blind guesses. Such a
world can show a mechanism, not the size of an effect in a model of billions of weights.
"""

FRONTIER = """
Each line is the path of an arm through training, from the SFT model at the left. It is the mean
over the seeds and five neighboring points, with a dot at its end. All paths rise at first, but not
equally steeply: at the same distance PPO-max and the larger η have more true quality than vanilla
PPO. Beyond a certain distance vanilla PPO's score stays high and its quality falls. Runs with a
penalty stop before that distance or near it, with a larger η earlier, and end above the whole path
of vanilla PPO. PPO-max has the highest final mean of these arms. It is above the penalties of 0.1
and 0.2 on every seed; against 0.05 this is uncertain, and more so at a third of the rate. (Its η
applies to a normalized reward, so it weighs more than the same η on raw scores.) Without a penalty
the path continues; normalizing and clipping the reward ends at a shorter mean distance, but at the
same distance the quality is no better. Importance sampling with its clip stays near the start and
gains less. At a third of the rate the order is similar, on a smaller part of the path.
"""

DISCUSSION = {
    "F1": """
The collapse occurs at this rate on every seed. The reward model is exploited; the optimizer does
not fail. The score rises and stays high while the true quality falls below that of the SFT model.
Length is a poor sign of it: responses grew on four seeds and shrank on one (at a third of the rate
they grew on all). At a third of the rate, after as many iterations, the score is as high, and the
mean quality is that of SFT: three seeds below it, one equal, one well above. Probably a smaller
step (or an earlier stop) only hides the result of a longer run.
""",
    "F2": """
The delay of P1 is clear for rewards clipped at 0.3. For those clipped at 0.8 it shows only in the
mean (mostly because of one seed), and not for advantages. At this rate every run ends beyond the
bound and below SFT in true quality; at a third of it, rewards clipped at 0.3 end a little above
SFT in the mean. Scaling alone passes the bound *later* than vanilla PPO on every seed, which
contradicts P1's finding (its claim here, of less than ten iterations, stays open). We did not
investigate the reason. Then it collapses as well, on two seeds farthest of all five arms. The KL of
one arm's collapsed runs may differ by a factor of ten or more. The interval of their mean then
reaches below the bound although all five seeds are above it: here the count of seeds is more
informative than the interval.
""",
    "F3": """
The KL penalty has all the claimed effects. Two results differ. *Clipped entropy*, with the SFT
model's entropy as its target, slows the fall of the entropy but does not hold it at its target. KL
passes the bound and the true quality falls below SFT's on every seed, as in vanilla PPO; at a third
of the rate two seeds end under the bound. P1 found it stable with a tuned target; here neither
target nor weight was tuned.

*Importance sampling* alone does not collapse here (one seed passes the bound for a moment). It
stays about as near to SFT as with the largest penalty, and gains less score and quality than any
penalty. The reason is probably the clip: with the ratio relative to the reference, ε = 0.2 removes
the gradient once a token's probability has moved that far from the SFT model's, not only from the
last iteration's. P1 does not state whether its importance sampling kept the clip. With the penalty
added it ends nearer to SFT and lower in score than the penalty alone, as in P1, and lower in true
quality as well.
""",
    "F4": """
The order is strict on every seed, in score and in distance, and in Chinese as well. The verdict is
only “partly” because one of the four intervals reaches just past zero. The paper had no true
preference. Here the mean *true* quality over the English seeds is the same for all three. Single
seeds differ in both directions, by more than the margin of the other claims, and in the one Chinese
world it falls with η. So it stays open whether the score that a larger η costs was worth anything.
""",
    "F5": """
These arms modify vanilla PPO, as P1's pre-training does. The initial critic matters little for the
score (KL and true quality vary too much to decide). Pre-training makes the first iterations calmer,
but does not prevent the later collapse. A policy without SFT is here a model of the same texts that
was never trained to respond. Its *score*, which P1 looks at, is lower on four of five seeds; on the
fifth it is the highest of all, so the claim stays open. Its mean true quality is the lowest of all
arms, and below vanilla PPO's on four of five seeds. But it starts far below SFT, and vanilla PPO
ends below SFT as well, so this claim is weak.
""",
    "F6": """
None of the claims, all about the end of the run, holds, and one is against: with normalized
advantages the value clip ends with a better true quality on every seed. This claim decides the
verdict; the other three are open, and collapsed runs vary too much to call the arms equal. All
three arms pass the bound on every seed. An analysis after the fact finds the opposite in the middle
of the run: there the quality of both together is below that of either alone on every seed, and both
together pass the bound before the value clip alone on every seed. So a temporary conflict is not
ruled out.
""",
    "F7": """
A tighter clip (0.1) passes the bound later on every seed. Without a clip it is not passed sooner,
but four of five seeds end farther from SFT. With any of them nearly every run ends far from the SFT
model and below it in quality (one run with the tighter clip ends above it). Presumably the clip
bounds a single step, and the penalty the sum of steps.
""",
    "F8": """
Bounds of 0.5, 1 and none end alike to within the margin. A bound of 1 is hardly ever reached
here, so 1 and none are nearly the same run. The policy's gradients rarely reach 0.5; the critic's
do in some three of ten logged iterations. One run without a bound passed a KL of 15 for a moment
and came back. This is weak evidence for models whose gradients spike often.
""",
    "F9": """
The variance of the advantages is in the order of λ, more or less by construction; only the last
claim could have failed. With λ = 0 the score fluctuates a little more on four of five seeds, which
is uncertain. But it learns slowly and ends lowest in score and quality, with shorter responses.
Probably its critic has to propagate the score back token by token; the score was still rising at
the end. λ = 1 ends farther from SFT than 0.9 on every seed; its quality is not clearly lower.
""",
    "F10": """
The bonus has no target, or the SFT model's entropy as a target, or a tenth less or more. In each
case every run ends beyond the bound and below SFT in true quality, though not each is flagged as
collapsed in its last points. But the weight of the bonus, P1's, was too small here to hold the
entropy. It is below its target nearly all the time, and there a target has the same gradient as a
plain bonus. So this does not test P1's sensitivity (a change of δ_H by a tenth fails).
""",
    "F11": """
The 2,500 iterations are 10,000 optimizer steps, at the learning rate at which vanilla PPO is
beyond the bound before its thirtieth iteration. Nothing diverges: after the first tenth the
perplexities change little. KL rises slowly on one seed and stays far below the bound, the Chinese
responses get a little shorter, and the true quality stays constant or rises a little on the English
seeds.
""",
    "F12": """
By the true preference (in P1 by humans) PPO-max wins on harmless and on harmful requests, on every
English seed. The Chinese harmful requests are the exception, on one seed: there it wins about as
often as it loses. The margins are not comparable with P1's, since the preference differs and ties
are mostly rarer. The training reward model prefers it by more than the true preference does; that
claim could hardly fail. Part of the difference may be over-optimization. Another part is that the
reward model has hardly any ties and makes errors.
""",
    "F13": """
Without pre-training the copied reward model is a poor critic. Presumably it predicts the raw reward
of an unfinished response, while the critic should predict the normalized return. Pre-training
removes more than half of that error before the first step of the policy. After 100 iterations
there is no difference in the mean, and no bias that decoupling λ could correct: on every seed the
critic that matches its returns worst has λ = 1 for its targets, though the differences are small.
Probably responses of some 16 tokens are too short: λ = 0.9 still sees their end. The paper that
found the bias had thousands of tokens.

(One thing was changed after the runs. Without pre-training, the error before PPO had been measured
before the shaper saw any reward, hence in raw units. The two arms were run again, with a shaper
that has seen as many rollouts as in pre-training.)
""",
}
"""By finding; checked against the tables by eye, so they contain no measured numbers."""
