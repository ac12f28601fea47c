"""What a sampler asks of an engine that holds weights of its own, and how it keeps them current."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from mossrlhf.models.lora import adapter_layers, checksums, merged_state_dict, unwrap_peft


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How an engine shall draw: nothing of it is left to the engine's or a checkpoint's defaults.

    Args:
        temperature: 0 for the likeliest token each time.
        top_p: in (0, 1]; 1 for all tokens.
        top_k: 0 for all tokens.
        min_p: 0 for all tokens.
        repetition_penalty: 1 for none.
        max_new_tokens: length limit, in tokens.
        ends: ids that end a response, and no others do; the one drawn belongs to the response.

    Source: ours.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    max_new_tokens: int
    ends: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One response of an engine.

    Args:
        token_ids: the one that ends it included.
        logprobs: of each token, nats; None where the engine returned none.
        finish_reason: "stop" where it ended, "length" at the limit; anything else is a fault.

    Source: ours.
    """

    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str | None


@runtime_checkable
class Engine(Protocol):
    """Draws responses with weights of its own.

    Source: ours.
    """

    @property
    def vocabulary(self) -> int | None:
        """Tokens it chooses among; None where that is not known."""

    @property
    def processed_logprobs(self) -> bool:
        """Whether log-probabilities are of what was drawn from, after temperature, top-p …"""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take all weights of a policy, by the names they have in its checkpoint."""

    def reset_prefix_cache(self) -> None:
        """Forget keys and values of earlier weights."""

    def generate(
        self, prompts: Sequence[Sequence[int]], asked: Asked, seeds: Sequence[int]
    ) -> list[Drawn]:
        """Draw one response for each of B prompts (token ids), each with a seed of its own."""


class Synchronizer:
    """Gives an engine a policy's weights, where they are not those it was given last.

    Whether they are is told by the sum of each weight's bits, read on the weight's own device, and
    by torch's counters of changes in place: optimizers that write past these (DeepSpeed) are seen
    by the one, changes that leave a sum as it was by the other. Adapters that are switched on or
    off are seen too. Reading all weights takes about as long as decoding one token.

    Args:
        engine: whose weights are kept current.

    Source: ours.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.times = 0
        self._given: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.engine!r}, times={self.times})"

    def __call__(self, model: nn.Module) -> bool:
        """Make the engine's weights the model's.

        Args:
            model: a transformers model, with or without adapters.

        Returns:
            whether anything had to be sent.
        """
        current = fingerprint(model)
        if current == self._given:
            return False
        self._given = None  # where sending breaks off, the engine has neither
        self.engine.load_weights(checkpoint_weights(model).items())
        self.engine.reset_prefix_cache()
        self._given, self.times = current, self.times + 1
        return True


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Tell a model's weights, and which of its adapters speak, from earlier ones.

    Args:
        model: a transformers model, with or without adapters.

    Source: ours.
    """
    state: dict[str, Tensor] = unwrap_peft(model).state_dict()
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
    """Return a model's weights as its checkpoint has them: adapters merged in, tied ones once.

    Args:
        model: a transformers model, with or without adapters; it is left as it is.

    Source: LoRA §4.1: W + (α/r) B A; names: ``save_pretrained`` of transformers.
    """
    bare: Any = unwrap_peft(model)
    state: Mapping[str, Tensor] = merged_state_dict(bare)
    taken: set[tuple[Any, ...]] = set()
    once = {}
    for name, weight in state.items():
        place = (weight.device, weight.data_ptr(), weight.shape)
        if weight.numel() and place in taken:
            continue
        taken.add(place)
        once[name] = weight
    return _as_saved(bare, once)


def _as_saved(model: Any, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Undo what transformers does to names and shapes as it loads (experts, for one)."""
    from transformers import PreTrainedModel

    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return state
    if not isinstance(model, PreTrainedModel):
        return state
    saved: dict[str, Tensor] = revert_weight_conversion(model, state)
    return saved
