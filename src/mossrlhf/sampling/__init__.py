"""Drawing responses: the sampler protocol, and what stands behind it."""

from mossrlhf.sampling.distribution import FREE, NEUTRAL, REFUSED
from mossrlhf.sampling.hf import HFSampler
from mossrlhf.sampling.protocol import Sampler

__all__ = ["FREE", "NEUTRAL", "REFUSED", "HFSampler", "Sampler"]
