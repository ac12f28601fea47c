"""Drawing responses: the sampler protocol, and what stands behind it."""

from mossrlhf.sampling.assembling import assemble
from mossrlhf.sampling.continuous import ContinuousSampler
from mossrlhf.sampling.distribution import FREE, NEUTRAL, REFUSED
from mossrlhf.sampling.engines import Asked, Drawn, Engine
from mossrlhf.sampling.hf import HFSampler
from mossrlhf.sampling.protocol import Sampler
from mossrlhf.sampling.vllm import VLLMSampler
from mossrlhf.sampling.vllm_engine import VLLMEngine

__all__ = [
    "FREE",
    "NEUTRAL",
    "REFUSED",
    "Asked",
    "ContinuousSampler",
    "Drawn",
    "Engine",
    "HFSampler",
    "Sampler",
    "VLLMEngine",
    "VLLMSampler",
    "assemble",
]
