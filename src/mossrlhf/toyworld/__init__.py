"""A templated dialogue world with a known true preference, for measuring over-optimization."""

from mossrlhf.toyworld.language import Language, Sentence, Topic
from mossrlhf.toyworld.preference import Preference
from mossrlhf.toyworld.speaker import Speaker
from mossrlhf.toyworld.world import ToyWorld

__all__ = ["Language", "Preference", "Sentence", "Speaker", "Topic", "ToyWorld"]
