"""A templated dialogue world with a known true preference, for measuring over-optimization."""

from mossrlhf.toyworld.language import Language, Sentence, Topic
from mossrlhf.toyworld.world import Preference, Speaker, ToyWorld

__all__ = ["Language", "Preference", "Sentence", "Speaker", "Topic", "ToyWorld"]
