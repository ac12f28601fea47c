"""Engines that generate with weights of their own, and the synchronization of those weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mossrlhf.models.adapters import adapter_layers, merged_state_dict
from mossrlhf.models.beneath import checksums
from mossrlhf.options import inside


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How an engine shall sample; neither its own nor a checkpoint's defaults apply.

    Args:
        temperature: 0 for the likeliest token each time.
        top_p: in (0, 1]; 1 for all tokens.
        top_k: 0 for all tokens.
        min_p: 0 for all tokens.
        repetition_penalty: 1 for none.
        max_new_tokens: length limit, in tokens.
        ends: the only token ids that end a response, of which they are the last.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    max_new_tokens: int
    ends: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One response of an engine.

    Args:
        token_ids: up to and including the end token.
        logprobs: of each token, nats; None if the engine returned none.
        finish_reason: "stop" for an end token, "length" for the limit; anything else is an error.
    """

    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str | None


@runtime_checkable
class Engine(Protocol):
    """Generates responses with weights of its own."""

    @property
    def vocabulary(self) -> int | None:
        """Vocabulary size; None if unknown."""

    @property
    def processed_logprobs(self) -> bool:
        """Whether log-probs are of the sampled distribution, after temperature, top-p …"""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load all weights of a policy, named as in its checkpoint."""

    def reset_prefix_cache(self) -> None:
        """Drop keys and values of earlier weights."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        seeds: Sequence[int],
    ) -> list[Completion]:
        """Generate one response for each of B prompts (token ids), each with its own seed."""


class Synchronizer:
    """Sends a policy's weights to an engine whenever they differ from those sent last.

    Changes are detected by the sum of each weight's bits, computed on its device, and by torch's
    counters of in-place changes: the first sees optimizers that bypass the counters (DeepSpeed),
    the second sees changes that keep the sum. Adapters that were switched on or off are seen too.
    Reading all weights takes about as long as decoding one token.

    Args:
        engine: that receives the weights; `times` counts how often.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.times = 0
        self._sent: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.engine!r}, times={self.times})"

    def __call__(self, model: nn.Module) -> bool:
        """Send the weights of a model, with or without adapters; return whether that was needed."""
        current = weight_checksums(model)
        if current == self._sent:
            return False
        self._sent = None  # if sending fails, the engine may hold some of both
        self.engine.load_weights(checkpoint_weights(model).items())
        self.engine.reset_prefix_cache()
        self._sent, self.times = current, self.times + 1
        return True


def weight_checksums(model: nn.Module) -> dict[str, Any]:
    """Return what changes along with a model's weights or its active adapters, by name."""
    state: dict[str, Tensor] = inside(model).state_dict()
    sums = checksums(state)
    found: dict[str, Any] = {
        name: (None if weight.is_inference() else weight._version, sums.get(name))
        for name, weight in state.items()
    }
    for index, layer in enumerate(adapter_layers(model)):
        adapters = bool(layer.disable_adapters), tuple(layer.active_adapters)
        found[f"adapters of {index}"] = (*adapters, repr(getattr(layer, "scaling", None)))
    return found


def checkpoint_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """Return weights as ``save_pretrained`` names them: adapters merged, tied ones once.

    Source: LoRA §4.1: W + (α/r) B A.
    """
    base: Any = inside(model)
    seen: set[tuple[Any, ...]] = set()
    state: dict[str, Tensor] = {}
    for name, weight in merged_state_dict(base).items():
        place = (weight.device, weight.data_ptr(), weight.shape)
        if weight.numel() and place in seen:
            continue
        seen.add(place)
        state[name] = weight
    if not isinstance(base, PreTrainedModel):
        return state
    reverted: dict[str, Tensor] = revert_weight_conversion(base, state)  # of experts, for one
    return reverted
