"""`HFSampler`: transformers' `generate`, with finished rows removed from the batch."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mossrlhf.models.backbone import accepts
from mossrlhf.models.lora import unwrap_peft
from mossrlhf.options import check_range, strict
from mossrlhf.sampling.base import (
    ConfiguredSampler,
    assemble,
    departures,
    require_no_watermark,
    require_prompts,
)
from mossrlhf.types import Rollout


class PreallocatedLayer(DynamicLayer):
    """A `DynamicLayer` that allocates `room` tokens whenever its buffers are full."""

    keys: Tensor
    values: Tensor

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._view: Tensor | None = None

    @classmethod
    def of(cls, layer: DynamicLayer, room: int) -> "PreallocatedLayer":
        """Take over the keys and values of a layer."""
        made = cls(room)
        made.__dict__.update(vars(layer))
        return made

    def update(
        self,
        key_states: Float[Tensor, "B H N D"],
        value_states: Float[Tensor, "B H N E"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T E"]]:
        """Append N tokens; return views of all T keys and values in the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # The keys may be empty, or replaced by somebody else, as `batch_select_indices` does.
        held = self.keys.shape[-2] if self.keys.ndim == key_states.ndim else 0
        total = held + key_states.shape[-2]
        valid = self._buffers is not None and self.keys is self._view
        if not valid or self._buffers is None or total > self._buffers[0].shape[-2]:
            size = max(total, held + self.room)
            self._buffers = (
                _enlarged(self.keys, key_states, held, size),
                _enlarged(self.values, value_states, held, size),
            )
        keys, values = self._buffers
        keys[..., held:total, :] = key_states
        values[..., held:total, :] = value_states
        self.keys, self.values = keys[..., :total, :], values[..., :total, :]
        self._view = self.keys
        return self.keys, self.values

    def batch_select_indices(self, indices: Int[Tensor, " K"]) -> None:
        """Keep K rows."""
        super().batch_select_indices(indices)
        # Frees the old buffers now: until the next token, all layers would hold both.
        self._buffers = self._view = None


def _enlarged(old: Tensor, new: Tensor, held: int, size: int) -> Tensor:
    buffer = new.new_empty(*new.shape[:-2], size, new.shape[-1])
    if held:
        buffer[..., :held, :] = old
    return buffer


def preallocate(cache: Any, room: int) -> None:
    """Have the plain layers of a `DynamicCache` allocate `room` tokens at a time, in place."""
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = PreallocatedLayer.of(layer, room)
        elif type(layer) is PreallocatedLayer:
            layer.room = room


def can_drop_rows(cache: Any) -> bool:
    """Whether all layers of a cache hold keys and values and nothing else, as subclasses may."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer, PreallocatedLayer)
    layers = getattr(cache, "layers", [])
    return isinstance(cache, DynamicCache) and all(type(layer) in plain for layer in layers)


WARPERS: dict[str, tuple[Any, Callable[[Any], LogitsProcessor]]] = {
    "temperature": (1.0, TemperatureLogitsWarper),
    "top_h": (None, TopHLogitsWarper),
    "top_k": (0, TopKLogitsWarper),
    "top_p": (1.0, TopPLogitsWarper),
    "min_p": (None, MinPLogitsWarper),
    "typical_p": (1.0, TypicalLogitsWarper),
    "epsilon_cutoff": (0.0, EpsilonLogitsWarper),
    "eta_cutoff": (0.0, EtaLogitsWarper),
}
"""Fields that `generate` applies after every custom processor, in its order (transformers 5.23):
the value at which each does nothing, and the processor it applies otherwise."""


class SamplingProcessor(LogitsProcessor):
    """Warps and samples in place of `generate`, and records the log-prob of each token.

    Use it with `greedy_config`, under which `generate` takes the only token left above −∞.
    Penalties are applied before it, nothing after it. A row's tokens depend on its own logits and
    numbers alone: `uniform` ``[B, T]``, in [0, 1), one for each token to sample.
    """

    def __init__(self, config: GenerationConfig, uniform: Float[Tensor, "B T"]) -> None:
        require_no_watermark(config)
        self.warpers = LogitsProcessorList()
        for name, (_, warper) in WARPERS.items():
            if warps(config, name):
                # Of all warpers this one alone holds a tensor.
                placed = {"device": uniform.device} if name == "eta_cutoff" else {}
                self.warpers.append(warper(getattr(config, name), **placed))
        self._uniform = uniform
        self._logprobs: list[Tensor] = []

    def __call__(
        self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        """Sample the next token of each row; return 0 at that token and −∞ elsewhere."""
        scores = self.warpers(input_ids, scores.float())
        logprobs = scores.sub_(scores.logsumexp(-1, keepdim=True))
        tokens = inverse_cdf(logprobs.exp(), self._uniform[:, len(self._logprobs)])[:, None]
        self._logprobs.append(logprobs.gather(1, tokens).squeeze(1))
        return logprobs.fill_(-torch.inf).scatter_(1, tokens, 0.0)

    @property
    def logprobs(self) -> Float[Tensor, "B T"]:
        """``[B, T]`` log-probs of the sampled tokens, nats."""
        if not self._logprobs:
            raise ValueError(
                "model: its generate has passed over logits_processor=, which samples the tokens; "
                "hand it on, or pass Trainer(sampler=) a sampler of your own"
            )
        return torch.stack(self._logprobs, dim=1)


BLOCK = 256
"""Probabilities that `inverse_cdf` sums as one block: a vocabulary is then some hundred numbers."""


def inverse_cdf(p: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Return the first token whose cumulative probability exceeds a number.

    Blocks are summed in float32 and everything else in float64, so that a token of 1e-8 keeps its
    share; the rounding of a block's sum, about 1e-7 of it, goes to its last token.

    Source: inverse transform sampling (Devroye, 1986, ch. II.2).
    """
    rows, size = p.shape
    if short := -size % BLOCK:
        p = torch.nn.functional.pad(p, (0, short))
    blocks = p.view(rows, -1, BLOCK)
    sums = blocks.sum(-1).double()
    total = sums.cumsum(-1)
    wanted = uniform.double()[:, None] * total[:, -1:]
    block = _first_beyond(total, wanted)
    inner = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK)).squeeze(1).double().cumsum(-1)
    wanted = wanted - (total.gather(1, block) - sums.gather(1, block))
    return (block * BLOCK + _first_beyond(inner, wanted)).squeeze(1)


def _first_beyond(total: Tensor, wanted: Tensor) -> Tensor:
    """Return where a cumulative sum first exceeds a number, at most where it last rises."""
    last_rise = (total < total[:, -1:]).sum(-1, keepdim=True)
    return torch.searchsorted(total, wanted, right=True).minimum(last_rise)


def warps(config: GenerationConfig, name: str) -> bool:
    """Whether `generate` acts on a field of `WARPERS`; it ignores values out of range."""
    value, neutral = getattr(config, name), WARPERS[name][0]
    if value is None:
        return False
    match name:
        case "top_p" | "typical_p":
            return bool(value < 1)
        case "epsilon_cutoff" | "eta_cutoff":
            return bool(0 < value < 1)
    return bool(value != neutral)


def greedy_config(config: GenerationConfig) -> GenerationConfig:
    """Return a copy that leaves warping and sampling to a `SamplingProcessor`."""
    greedy = copy.deepcopy(config)
    for name in WARPERS:
        setattr(greedy, name, None)  # `generate` warns of any other value that it goes unused
    greedy.do_sample = False
    return greedy


FROM_ROWS = frozenset([*WARPERS, "do_sample", "repetition_penalty"])
"""Fields whose effect depends on a row's tokens alone, not on where the prompt ended."""


@torch.no_grad()
def generate_in_segments(
    model: nn.Module,
    ids: Int[Tensor, "B P"],
    attention_mask: Bool[Tensor, "B P"],
    config: GenerationConfig,
    uniform: Float[Tensor, "B T"],
    segment: int | None = None,
) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generate until each row has an end token, or T tokens."""
    sampling = bool(config.do_sample)
    given = greedy_config(config) if sampling else copy.deepcopy(config)
    given.return_dict_in_generate = True
    ends = torch.tensor(config.eos_token_id, device=ids.device).view(-1)
    size, limit = uniform.shape
    tokens = ids.new_full((size, limit), config.pad_token_id)
    logprobs = torch.zeros(size, limit, dtype=torch.float32, device=ids.device)
    rows, cache, done = torch.arange(size, device=ids.device), None, 0
    if segment is None or not _can_continue(model, config):
        segment = limit
    while done < limit:
        given.max_new_tokens = min(segment, limit - done)
        processor = SamplingProcessor(config, uniform[rows, done:]) if sampling else None
        ids, cache = _generate(model, ids, attention_mask, given, processor, cache)
        new = ids.shape[1] - attention_mask.shape[1]
        tokens[rows, done : done + new] = ids[:, attention_mask.shape[1] :]
        if processor is not None:
            # Where transformers defers its stopping check, one token more was sampled.
            logprobs[rows, done : done + new] = processor.logprobs[:, :new]
        attention_mask = nn.functional.pad(attention_mask, (0, new), value=True)
        done += new
        unfinished = ~torch.isin(tokens[rows, :done], ends).any(dim=1)
        if not unfinished.any():
            break
        if cache is None:
            segment = limit  # each further segment would begin at the prompt
        elif not unfinished.all() and can_drop_rows(cache):
            kept = unfinished.nonzero().squeeze(1)
            ids, attention_mask, rows = ids[kept], attention_mask[kept], rows[kept]
            cache.batch_select_indices(kept)
        preallocate(cache, min(segment, limit - done))
    return tokens, logprobs


def _generate(
    model: Any,
    ids: Tensor,
    attention_mask: Tensor,
    config: GenerationConfig,
    processor: SamplingProcessor | None,
    cache: Any,
) -> tuple[Tensor, Any]:
    """Return the ids with new tokens, and the cache of all but the last."""
    options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    if processor is not None:
        options["logits_processor"] = [processor]
    if isinstance(unwrap_peft(model), GenerationMixin):
        # Each process holds whole weights here, and generates at its own pace.
        options["synced_gpus"] = False
    output = model.generate(
        ids, attention_mask=attention_mask.long(), generation_config=config, **options
    )
    if isinstance(output, Tensor):  # a custom `generate` may return the tokens alone
        return output, None
    return output.sequences, output.get("past_key_values")


def _can_continue(model: nn.Module, config: GenerationConfig) -> bool:
    """Whether a second `generate` from the cache gives what one call would."""
    base = unwrap_peft(model)
    adapters = getattr(model, "peft_config", {}).values()
    return (
        isinstance(base, GenerationMixin)
        and config.cache_implementation is None
        and config.use_cache is not False
        and accepts(base, "past_key_values")  # Mamba's state has another name
        and departures(config).keys() <= FROM_ROWS
        and not any(adapter.is_prompt_learning for adapter in adapters)  # put in again each time
    )


@strict
@dataclass(frozen=True, kw_only=True)
class HFSampler(ConfiguredSampler):
    """Generates responses with transformers' ``generate``.

    Every field that shapes the distribution is set here. ``generate`` would fill unset ones from
    the checkpoint (a top-k of 50, its own temperature or penalty), which training would not know
    of. `effective` is the resulting config.

    Args:
        generation_config: ``max_new_tokens`` must be set; unset temperature, top-k, top-p and
            penalty mean the policy's own distribution.
        eos_token_id: token(s) that end a response.
        pad_token_id: any id of the vocabulary; masks come from lengths.
        batch_size: prompts at a time; None for all at once.
        segment: tokens after which finished responses leave the batch; None to wait for the last.
            Like `batch_size` it changes speed and memory alone.

    Raises:
        ValueError: if ``max_new_tokens`` is missing, a number defines no distribution (a
            temperature of 0), or the config asks for beams, for several sequences per prompt
            (that is `TrainerConfig.samples_per_prompt`), for a field in `REFUSED`, or, while
            sampling, for a watermark.

    Source: C: temperature 0.8, top-p 0.9, repetition penalty 1.1, at most 512 tokens.
    """

    batch_size: int | None = None
    segment: int | None = 16

    def __post_init__(self) -> None:
        check_range("HFSampler", "batch_size", self.batch_size, 1)
        check_range("HFSampler", "segment", self.segment, 1)
        super().__post_init__()

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        batch_size: int | None = None,
    ) -> "HFSampler":
        """Take the end and padding tokens that the config leaves open from a tokenizer.

        Args:
            tokenizer: needs an eos token; without a padding token, eos pads.
            generation_config: its own ``eos_token_id`` and ``pad_token_id`` take precedence.
            batch_size: prompts at a time.

        Raises:
            ValueError: if neither names an end token.
        """
        return cls._for_tokenizer(tokenizer, generation_config, batch_size=batch_size)

    @torch.no_grad()
    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Rollout:
        """Generate one response for each prompt; Args: those of `Sampler`.

        Raises:
            ValueError: if there is no prompt, or an empty one.
            FloatingPointError: if the model's logits are not finite.
        """
        require_prompts(prompts)
        # All random numbers at once, so that no way to split the work changes a response.
        uniform = torch.rand(len(prompts), self.max_new_tokens, dtype=torch.float64)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        order = lengths.argsort(stable=True)  # prompts of similar length together: little padding
        sampling = bool(self.effective.do_sample)
        defaults = greedy_config(self.effective) if sampling else self.effective
        generated: dict[int, tuple[list[int], list[float]]] = {}
        with _generation_config(model, defaults):
            for rows in order.split(self.batch_size or len(prompts)):
                batch = [prompts[row] for row in rows]
                responses = self._generate(model, batch, uniform[rows])
                generated.update(zip(rows.tolist(), responses, strict=True))
        completions, logprobs = zip(*(generated[row] for row in range(len(prompts))), strict=True)
        _require_finite(logprobs)
        return assemble(
            prompts,
            completions,
            [response[-1] in self.ends for response in completions],
            pad_token_id=self.pad_token_id,
            device=next(model.parameters()).device,
            logprobs=logprobs if sampling else None,
        )

    def _generate(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], uniform: Tensor
    ) -> list[tuple[list[int], list[float]]]:
        """Return the tokens of each response, up to its end token, and their log-probs."""
        device = next(model.parameters()).device
        width = max(len(prompt) for prompt in prompts)
        # `generate` continues the last column, so here alone padding is on the left.
        ids = [[self.pad_token_id] * (width - len(prompt)) + [*prompt] for prompt in prompts]
        mask = [[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts]
        tokens, logprobs = generate_in_segments(
            model,
            torch.tensor(ids, device=device),
            torch.tensor(mask, device=device),
            self.effective,
            uniform.to(device),
            self.segment,
        )
        is_end = torch.isin(tokens, torch.tensor(self.ends, device=device))
        first_end = is_end.int().argmax(dim=1) + 1
        lengths = torch.where(is_end.any(dim=1), first_end, tokens.shape[1]).tolist()
        rows = zip(tokens.tolist(), logprobs.tolist(), lengths, strict=True)
        return [(response[:length], known[:length]) for response, known, length in rows]


def _require_finite(logprobs: Sequence[Sequence[float]]) -> None:
    """Raise FloatingPointError where a policy's logits were not finite."""
    broken = [row for row, known in enumerate(logprobs) if not math.isfinite(sum(known))]
    if broken:
        raise FloatingPointError(
            f"model: its logits are not finite in responses to {len(broken)} of {len(logprobs)} "
            f"prompts, the first of them number {broken[0]}; its weights are broken, or too large "
            "for their type"
        )


@contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Have `generate` take unset fields from a config, not from the checkpoint's."""
    # An adapted model may hold one of its own, which PEFT hands on to the base model.
    held = [
        (holder, holder.generation_config)
        for holder in (model, unwrap_peft(model))
        if "generation_config" in vars(holder)
    ]
    for holder, _ in held:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, own in held:
            holder.generation_config = own
