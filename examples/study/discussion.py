"""What people write on the page; numbers are left to the tables."""

LEAD = """
# Secrets of RLHF, run again

Thirteen findings of *Secrets of RLHF in Large Language Models Part I: PPO* ([arXiv
2307.04964](https://arxiv.org/abs/2307.04964)) and of one later paper, in a dialogue world small
enough for a laptop, whose true preference is known and never trained on. What was claimed, by
which number, and what verdict was expected were written down and committed before any of these
runs was made. `make study` makes all of them again; `python examples/secrets_study.py --quick`
shows in a minute that they run.
"""

METHOD = """
Every arm is a preset of the library with one part exchanged (`examples/study/arms.py`): same SFT
model, reward model, prompts, sampling, 100 iterations of 64 responses in minibatches of 16, and
one learning rate for policy and critic, that of `make demo`. **No arm was tuned**, so none is at
its best; six arms were run at a third of the rate as well, since a smaller step can hide a
collapse.

A claim is a number for each seed, of which the sign decides (or, where two things should be
alike, whether it lies within 0.3). It *holds* where the 95 % interval of Student's t over the
seeds lies on the claimed side, is *against* where it lies on the other, and is *open* otherwise.
A finding is reproduced where all its claims hold, partly where
some do, refuted where none does and one is against, else undecided. Of some fifty claims one or
two will be decided wrongly by chance. KL divergences are in nats per response (signed k1); the
library counts 15 and more as a collapse if the variety of the responses is gone as well.

Seeds 100 to 104 had not been looked at while world, library and study were written. What such a
world can show is the mechanism, not the size of an effect in a model of billions of weights.
"""

FRONTIER = """
Each line is the way of an arm through training, from the SFT model at the left; mean over the
seeds and five neighboring points, a dot at its end. All ways begin along nearly the same slope:
whatever raises the reward model's score at first raises the true quality as well. Beyond a
certain distance the score goes on and the quality falls. Penalties end the way about where it
turns, a larger η earlier; PPO-max stays on the slope and ends highest at both rates. Without a
penalty the way leads on, and normalizing and clipping the reward only make it shorter for the
same number of iterations. Importance sampling with its clip stops long before the turn. At a
third of the rate the picture is the same, on a smaller part of the way.
"""

DISCUSSION = {
    "F1": """
The collapse is real at this rate on every seed, and it is the reward model that is fooled, not
the optimizer that fails: the score rises and stays high while the true quality goes under that of
the SFT model. Length is no sign of it: answers grew on most seeds and shrank on one. At a third
of the rate, after as many iterations, part of the way lies behind: the score is as high, the
quality is that of SFT in the mean, and two seeds are still better. A smaller step (or an earlier
stop) hides what a longer run would show.
""",
    "F2": """
What P1 calls a delay is seen clearly for rewards clipped at 0.3, in the mean only for those
clipped at 0.8, and not for advantages: their clip bounds each token's weight, not what is
preferred. None of them ends near the SFT model, and none ends with a true quality above it.
Scaling alone passes the bound somewhat *later* than vanilla PPO, against the claim, since it
divides the reward by a number above one; then it collapses as well, sometimes worst of all. The
KL of collapsed runs is spread over a factor of ten, so that the interval of their mean reaches
below the bound where all five seeds lie above it: here the count of seeds says more than the
interval.
""",
    "F3": """
The KL penalty does all that is said of it. Two things came out otherwise. *Clipped entropy*, with
the SFT model's own as its target, slows the fall of the entropy or ends it, and lets the
distribution go anywhere: KL and true quality collapse as in vanilla PPO. P1 found it stable at a
target that was tuned; nothing was tuned here. *Importance sampling* alone does not collapse here,
but holds the policy about as close as the largest penalty, and learns least. The reason is the
clip: with the ratio taken to the reference, ε = 0.2 bounds how far a token's probability may move
from the SFT model's for good, where it usually bounds one step. P1 does not say whether its
importance sampling kept the clip. Together with the penalty it is stabler and ends lower, as P1
has it.
""",
    "F4": """
The order is strict on every seed, in score and in distance, and in Chinese as well; that one of
the four intervals reaches just past zero is what keeps the verdict at “partly”. What the paper
could not see, since it takes a true preference: the *true* quality of the three is alike. A
larger η gives up score that was worth nothing.
""",
    "F5": """
Run on vanilla PPO, as P1's pre-training is. Where the critic comes from matters little once it
has learned; pre-training makes the first iterations calmer, and does nothing against the collapse
that comes later. A policy without SFT, here a model of the same texts that never learned to
answer, is not clearly worse by the *score*, which is what P1 looks at: with nothing to hold it
near sense it fools the reward model as well as any other. By the true quality it ends lowest, but
that claim is weak: vanilla PPO with SFT ends below SFT as well.
""",
    "F6": """
No conflict of the two is seen. All three arms collapse, value clip and normalized advantages
together no deeper than either alone; beside normalized advantages the value clip even helps.
""",
    "F7": """
A tighter clip (0.1) slows the way and no clip at all speeds it up, but with any of them the
policy ends far from the SFT model and below it in quality; the clip bounds a step, the penalty
bounds the sum of steps.
""",
    "F8": """
Bounds of 0.5, 1 and none end alike to within the margin. The policy's gradient norms are seldom
above the lower bound here, the critic's in some three of ten steps, and Adam divides most of what
a bound changes out again: this says little of models in which gradients spike.
""",
    "F9": """
The variance of the advantages is in the order of λ, more or less by construction; what could have
failed is the last claim. With λ = 0 the score fluctuates a little more on four of five seeds,
which is not beyond doubt. But it learns slowly and ends lowest in score and quality, with shorter
answers: its critic has to carry the score back one token an iteration. λ = 1 ends a little lower
in quality than 0.9 and further away.
""",
    "F10": """
Whether the bonus is bare or has a target, and whether the target is the SFT model's entropy, a
tenth below or above: all of them end in collapse. So the fine line of P1 (δ_H moved by a tenth
fails) was not found, since the middle fails too. An entropy says how spread a distribution is,
and not where.
""",
    "F11": """
The 2,500 iterations are 10,000 optimizer steps, at the learning rate at which vanilla PPO is
beyond the bound before its thirtieth iteration. Nothing runs away: after the first hundreds of
iterations KL, length and perplexities move little, and the true quality is that of the reward
model's best, not of its worst.
""",
    "F12": """
By the true preference, as humans judge in P1, and for requests that ask for help and for such as
ask for harm. The Chinese world's harmless answers are the exception: there PPO-max wins and loses
alike. The widths are not comparable with P1's: a templated world knows fewer ties, and its judge
never errs. The reward model, which it was trained by, prefers it more often than the true
preference does: that claim was bound to hold, and the distance is the over-optimization that
PPO-max leaves.
""",
    "F13": """
Without pre-training the copied reward model is no critic: it says how good an unfinished answer
looks, in units of the raw score, where the critic is to say what will come of it in units of the
normalized one. Pre-training takes away more than half of that error before the first step of the
policy. After 100 iterations nothing of the difference is left, and no bias that decoupling λ
could mend: on one seed the critic with λ = 1 for its targets and no pre-training even agrees
worst with its returns. That is no wonder, since with some 16 tokens λ = 0.9 still sees the end of
the response. The paper that found the bias had thousands of tokens. (One thing was changed after
the runs: the error before PPO had been taken without any rewards seen where there is no
pre-training, hence in raw units; the two arms were made again, with the shaper acquainted with as
many rollouts as pre-training has.)
""",
}
"""By finding; what they say is held to the tables by eye, so they say nothing in numbers."""
