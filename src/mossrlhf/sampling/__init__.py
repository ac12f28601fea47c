"""Samplers: `Sampler` is their protocol, `HFSampler` the default."""

import warnings
from typing import Any

from mossrlhf.sampling.base import FREE, NEUTRAL, REFUSED, Sampler, assemble
from mossrlhf.sampling.continuous import ContinuousSampler
from mossrlhf.sampling.hf import HFSampler
from mossrlhf.sampling.vllm import Completion, Engine, SamplingSettings, VLLMEngine, VLLMSampler

__all__ = [
    "FREE",
    "NEUTRAL",
    "REFUSED",
    "Completion",
    "ContinuousSampler",
    "Engine",
    "HFSampler",
    "Sampler",
    "SamplingSettings",
    "VLLMEngine",
    "VLLMSampler",
    "assemble",
]

_RENAMED = {"Asked": "SamplingSettings", "Drawn": "Completion"}


def __getattr__(name: str) -> Any:
    """Resolve names of the last release."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(f"{__name__}.{name} is now {new}", DeprecationWarning, stacklevel=2)
    return globals()[new]
