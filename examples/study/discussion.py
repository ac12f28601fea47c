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

FRONTIER = ""

DISCUSSION = {f"F{number}": "" for number in range(1, 14)}
