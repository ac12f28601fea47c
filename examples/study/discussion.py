"""What people write on the page; numbers are left to the tables."""

LEAD = """
# Secrets of RLHF, run again

Thirteen findings of *Secrets of RLHF in Large Language Models Part I: PPO* ([arXiv
2307.04964](https://arxiv.org/abs/2307.04964)) and of one later paper, in a dialogue world small
enough for a laptop, whose true preference is known, and reaches training only through noisy
preference pairs. What was claimed, by which number, and what verdict was expected were written
down and committed before any of these runs was made; one measurement was mended afterwards
([F13](#f13)), and the seeds were made five before any result was looked at. `make study` makes
all of them again; `python examples/secrets_study.py --quick` shows in a minute that they run.
"""

METHOD = """
Every arm is a preset of the library with one or two parts exchanged (`examples/study/arms.py`):
same SFT model (but for one arm), reward model, prompts, sampling, 100 iterations (but for F11) of
64 responses in minibatches of 16, and one learning rate for policy and critic, that of `make
demo`. **No arm was tuned**, so none need be at its best; six arms were run at a third of the rate
as well, since a smaller step can hide a collapse.

A claim is a number for each seed, of which the sign decides (or, where two things should be
alike, whether it lies within 0.3, or ten iterations in F2; a run that never passes the bound
counts as passing it at its last iteration). It *holds* where the 95 % interval of Student's t
over the seeds lies on the claimed side, is *against* where it lies on the other, and is *open*
otherwise. A finding is reproduced where all its claims hold, partly where some do, refuted where
none does and one is against, else undecided. Of some fifty claims a few may be decided wrongly by
chance: with five seeds and skewed figures the intervals are rough, and claims share runs. KL
divergences are in nats per response (signed k1); the library counts more than 15 as a collapse if
the responses' distinct-2 is below half of the reference's as well. In the pictures a line is the
mean over the seeds (the median of KL, losses, norms and perplexity under the SFT model), a band
goes from the smallest to the largest, and hairs are the seeds; axes of KL are linear below 1.

Seeds 100 to 104 had not been looked at while world, library and study were written; of other
seeds vanilla PPO, its KL penalties and PPO-max had been, so what was expected of those is no
blind guess. What such a world can show is the mechanism, not the size of an effect in a model of
billions of weights.
"""

FRONTIER = """
Each line is the way of an arm through training, from the SFT model at the left; mean over the
seeds and five neighboring points, a dot at its end. All ways rise at first, but not equally
steeply: at the same distance PPO-max and the larger η have more true quality than vanilla PPO.
Beyond a certain distance vanilla PPO's score stays high and its quality falls. Runs with a
penalty stop before or about there, a larger η earlier, and end higher than the way of vanilla PPO
ever comes. PPO-max ends highest in the mean of those drawn; against the penalties of 0.1 and 0.2
it does so on every seed, against 0.05 this is not beyond doubt, at a third of the rate still
less. (Its η is counted against a normalized reward, so it weighs more than the same η on raw
scores.) Without a penalty the way leads on; normalizing and clipping the reward ends at a shorter
mean distance, but at the same distance the quality is no better. Importance sampling with its
clip stays near the start and gains less. At a third of the rate the order is much the same, on a
smaller part of the way.
"""

DISCUSSION = {
    "F1": """
The collapse is real at this rate on every seed, and it is the reward model that is fooled, not
the optimizer that fails: the score rises and stays high while the true quality goes under that of
the SFT model. Length is a poor sign of it: answers grew on four seeds and shrank on one (at a
third of the rate they grew on all). At a third of the rate, after as many iterations, the score
is as high and the quality is that of SFT in the mean: three seeds below it, one level, one well
above. Probably a smaller step (or an earlier stop) only hides what a longer run would show.
""",
    "F2": """
What P1 calls a delay is seen clearly for rewards clipped at 0.3, in the mean only for those
clipped at 0.8 (where one seed makes most of it), and not for advantages. At this rate every run
ends beyond the bound and below SFT in true quality; at a third of it, rewards clipped at 0.3 end
a little above SFT in the mean. Scaling alone passes the bound *later* than vanilla PPO on every
seed, which P1's finding denies (its claim here, of less than ten iterations, stays open); why,
was not looked into. Then it collapses as well, on two seeds farthest of all five arms. The KL of
one arm's collapsed runs may spread over a factor of ten or more, so that the interval of their
mean reaches below the bound where all five seeds lie above it: here the count of seeds says more
than the interval.
""",
    "F3": """
The KL penalty does all that is said of it. Two things came out otherwise. *Clipped entropy*, with
the SFT model's own as its target, slows the fall of the entropy but does not hold it at its
target: KL passes the bound and the true quality falls below SFT's on every seed, as in vanilla
PPO; at a third of the rate two seeds end under the bound. P1 found it stable at a target that was
tuned; nothing was tuned here, the weight as little as the target. *Importance sampling* alone
does not collapse here (one seed passes the bound for a moment), but stays about as near to SFT as
with the largest penalty, and gains less score and quality than any penalty. The reason is
probably the clip: with the ratio taken to the reference, ε = 0.2 takes away the gradient once a
token's probability has moved that far from the SFT model's, and not merely from the last
iteration's. P1 does not say whether its importance sampling kept the clip. With the penalty added
it ends nearer to SFT and lower in score than the penalty alone, as P1 has it, and lower in true
quality as well.
""",
    "F4": """
The order is strict on every seed, in score and in distance, and in Chinese as well; that one of
the four intervals reaches just past zero is what keeps the verdict at “partly”. What the paper
could not see, having no true preference: in the mean over the English seeds the *true* quality of
the three is the same. Single seeds differ in both directions, by more than the margin used
elsewhere here, and in the one Chinese world it falls with η. So whether the score that a larger η
gives up was worth anything stays open.
""",
    "F5": """
Run on vanilla PPO, as P1's pre-training is. By the score it matters little where the critic comes
from (KL and true quality are too spread to tell); pre-training makes the first iterations calmer,
and does not prevent the collapse that comes later. A policy without SFT, here a model of the same
texts that never learned to answer, has the lower *score*, which is what P1 looks at, on four of
five seeds; on the fifth it has the highest of all, so the claim stays open. Its true quality is
the lowest of all arms in the mean, and below vanilla PPO's on four of five seeds; but it begins
far below SFT, and vanilla PPO ends below SFT as well, so the claim made of it is weak.
""",
    "F6": """
None of the claims, all made on the end of the run, holds, and one comes out against: beside
normalized advantages the value clip ends with a better true quality on every seed. That one claim
makes the verdict; the other three are open, and the spread of collapsed runs is too wide to call
the arms alike. All three arms pass the bound on every seed. Looked at only afterwards, the middle
of the run says the opposite: there the quality of both together lies below that of either alone
on every seed, and both together pass the bound before the value clip alone on every seed. So a
conflict that passes is not ruled out.
""",
    "F7": """
A tighter clip (0.1) passes the bound later on every seed; without a clip it is not passed sooner,
but four of five seeds end farther out. With any of them nearly every run ends far from the SFT
model and below it in quality (one run with the tighter clip ends above it). Presumably because
the clip bounds a step, the penalty the sum of steps.
""",
    "F8": """
Bounds of 0.5, 1 and none end alike to within the margin. A bound of 1 is hardly ever reached
here, so that 1 and none are nearly the same run; 0.5 is reached seldom by the policy's gradients
and in some three of ten logged iterations by the critic's. One run without a bound passed a KL of
15 for a moment and came back. This says little of models in which gradients spike often.
""",
    "F9": """
The variance of the advantages is in the order of λ, more or less by construction; what could have
failed is the last claim. With λ = 0 the score fluctuates a little more on four of five seeds,
which is not beyond doubt. But it learns slowly and ends lowest in score and quality, with shorter
answers: probably since its critic has to carry the score back token by token; it was still rising
at the end. λ = 1 ends farther from SFT than 0.9 on every seed; its quality is not clearly lower.
""",
    "F10": """
Whether the bonus is bare or has a target, and whether the target is the SFT model's entropy, a
tenth below or above: every run ends beyond the bound and below SFT in true quality, though not
each is flagged as collapsed in its last points. But the weight of the bonus, P1's, was too small
here to hold the entropy: it lies below its target nearly all the time, and there a target asks
for the same as a bare bonus. So this is no test of the fine line of P1 (δ_H moved by a tenth
fails).
""",
    "F11": """
The 2,500 iterations are 10,000 optimizer steps, at the learning rate at which vanilla PPO is
beyond the bound before its thirtieth iteration. Nothing runs away: after the first tenth the
perplexities move little, KL creeps up on one seed and stays far below the bound, the Chinese
answers get a little shorter, and the true quality stays where it was or rises a little on the
English seeds.
""",
    "F12": """
By the true preference (in P1 humans judge) PPO-max wins on requests for help and on requests for
harm, on every English seed. The Chinese requests for harm are the exception, on one seed: there
it wins about as often as it loses. The widths are not comparable with P1's: the judge is another,
and ties are mostly rarer. The reward model it was trained by prefers it by more than the true
preference does; that claim was bound to hold. Part of the distance may be over-optimization, part
is that the reward model knows hardly any ties and errs.
""",
    "F13": """
Without pre-training the copied reward model is a poor critic: presumably it says how good an
unfinished answer looks, in units of the raw score, where the critic is to say what will come of
it in units of the normalized one. Pre-training takes away more than half of that error before the
first step of the policy. After 100 iterations no difference in the mean is left, and no bias that
decoupling λ could mend: on every seed the critic that agrees worst with its returns is one with λ
= 1 for its targets, though the differences are small. Probably responses of some 16 tokens are
too short: λ = 0.9 still sees their end. The paper that found the bias had thousands of tokens.
(One thing was changed after the runs: the error before PPO had been taken without any rewards
seen where there is no pre-training, hence in raw units; the two arms were made again, with the
shaper acquainted with as many rollouts as pre-training has.)
""",
}
"""By finding; what they say is held to the tables by eye, so they say nothing in numbers."""
