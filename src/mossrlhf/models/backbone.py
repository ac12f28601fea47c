"""Hidden states of a bare transformer: packed or padded, with a mask only where one is needed."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mossrlhf.distributed.sharding import is_sharded
from mossrlhf.models.lora import unwrap_peft

PACKED_ATTENTION = "mossrlhf_packed"
"""What transformers calls `packed_attention`, which is selected during a packed forward only."""

MIN_PADDING = 0.05
"""Share of padding from which packing pays; on CPUs only."""

_lock = RLock()
"""Threads may share a configuration, and would restore what another has set."""

_causal: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_packable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def last_hidden_states(
    backbone: Any,
    input_ids: Int[Tensor, "B L"],
    attention_mask: Shaped[Tensor, "B L"],
    right_padded: bool | None = None,
) -> Float[Tensor, "B L D"]:
    """Return a bare transformer's last hidden states, which are meaningless on padding."""
    mask = needed_mask(backbone, attention_mask, right_padded)
    if mask is not None:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return _forward(backbone, input_ids, attention_mask=mask, position_ids=positions)
    tokens = attention_mask.bool()
    # Only on CPUs: elsewhere, reading the share of padding would synchronize.
    padded = tokens.device.type == "cpu" and float(tokens.float().mean()) < 1 - MIN_PADDING
    if padded and can_pack(backbone):
        return _packed_forward(backbone, input_ids, tokens)
    return _forward(backbone, input_ids)


def _forward(backbone: Any, input_ids: Tensor, **options: Any) -> Tensor:
    """Call a backbone with those of the options that its ``forward`` takes."""
    kind: Any = type(backbone)
    taken = _parameters(kind)
    options = {"use_cache": False, **options}
    options = {name: value for name, value in options.items() if not taken or name in taken}
    found: Tensor = backbone(input_ids=input_ids, **options).last_hidden_state
    return found


@cache
def _parameters(kind: type[nn.Module]) -> frozenset[str]:
    """Return the parameters of ``forward``; none where it takes any keyword."""
    parameters = inspect.signature(kind.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return frozenset()
    return frozenset(p.name for p in parameters)


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the ``forward`` of a model, unwrapped from PEFT, names an argument."""
    return argument in inspect.signature(unwrap_peft(model).forward).parameters


def needed_mask(
    backbone: nn.Module, attention_mask: Shaped[Tensor, "B L"], right_padded: bool | None = None
) -> Tensor | None:
    """Return the mask to pass: None for what is known to be right padding and causal attention."""
    if right_padded is None:
        # Unknown on CUDA, where reading the mask would synchronize: it is passed then.
        right_padded = attention_mask.device.type == "cpu" and _is_right_padded(attention_mask)
    # Without a mask, attention runs its causal kernels, which do half of the work.
    return None if right_padded and is_causal(backbone) else attention_mask.long()


def _is_right_padded(mask: Tensor) -> bool:
    mask = mask.bool()
    return bool(mask[:, 0].all()) and not bool((mask[:, 1:] & ~mask[:, :-1]).any())


def is_causal(backbone: nn.Module) -> bool:
    """Whether a hidden state depends on the tokens up to it alone; probed once and remembered."""
    # Not looked up, since some models attend to later tokens by configuration.
    return _remembered(_causal, backbone, _probe_causal)


def can_pack(backbone: Any) -> bool:
    """Whether packed sequences give the same hidden states; probed once and remembered."""
    # Layers that recompute their activations in the backward pass would no longer find
    # `packed_attention` selected. Windows are looked up: the probe is shorter than any of them.
    recomputes = any(
        isinstance(module, CheckpointWrapper) or getattr(module, "gradient_checkpointing", False)
        for module in backbone.modules()
    )
    if recomputes or not attends_to_everything(backbone.config):
        return False
    return _remembered(_packable, backbone, _probe_packing)


def _remembered(
    known: WeakKeyDictionary[nn.Module, bool], backbone: nn.Module, probe: Callable[[Any], bool]
) -> bool:
    """Probe a backbone once; not a sharded one, whose probe would be a collective call."""
    if backbone not in known:
        if is_sharded(backbone):
            return False
        with evaluation_mode(backbone), torch.no_grad():
            try:
                known[backbone] = probe(backbone)
            except Exception:  # whatever a model raises that cannot be probed
                known[backbone] = False
    return known[backbone]


def _probe_causal(backbone: Any) -> bool:
    weight: Tensor = backbone.get_input_embeddings().weight
    ids = torch.arange(12, device=weight.device).view(2, 6) * 7 % len(weight)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    seen = mask.bool()
    changed = torch.where(seen, ids, (ids + 1) % len(weight))
    with torch.autocast(weight.device.type, enabled=False):
        masked, unmasked, other = (
            backbone(input_ids=tokens, attention_mask=given, use_cache=False).last_hidden_state
            for tokens, given in ((ids, mask), (ids, None), (changed, None))
        )
    # Bit by bit: in half precision a dependence may be as small as rounding.
    same = torch.equal(unmasked[seen], other[seen])
    return same and _close(unmasked[seen], masked[seen], weight.dtype)


def _probe_packing(backbone: Any) -> bool:
    weight: Tensor = backbone.get_input_embeddings().weight
    ids = torch.arange(15, device=weight.device).view(3, 5) * 7 % len(weight)
    tokens = torch.arange(5, device=weight.device) < torch.tensor([[2], [5], [3]]).to(weight.device)
    with _lock, torch.autocast(weight.device.type, enabled=False):
        padded, packed = _forward(backbone, ids), _packed_forward(backbone, ids, tokens)
    return _close(packed[tokens], padded[tokens], weight.dtype)


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 0.02
    found, expected = found.float(), expected.float()
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def attends_to_everything(config: Any) -> bool:
    """Whether all layers use sdpa, and attend to all tokens up to the current one."""
    text = text_config(config)
    implementation = getattr(text, "_attn_implementation", None)
    if implementation not in ("sdpa", PACKED_ATTENTION):  # by another thread
        return False
    if kinds := getattr(text, "layer_types", None):
        return set(kinds) == {"full_attention"}
    windows = ("sliding_window", "attention_chunk_size")
    return all(getattr(text, name, None) is None for name in windows)


def text_config(config: Any) -> Any:
    """Return the configuration of a multimodal model's language part, or the one given."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _packed_forward(backbone: Any, input_ids: Tensor, tokens: Tensor) -> Tensor:
    """Return hidden states ``[B, L, D]`` of sequences read as one row, zero on padding."""
    lengths = tokens.sum(1)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)[tokens]
    kept = tuple(length for length in lengths.tolist() if length)
    options: dict[str, Any] = dict(position_ids=positions[None], lengths=kept)
    config = text_config(backbone.config)
    with _lock:
        own = config._attn_implementation
        config._attn_implementation = PACKED_ATTENTION
        try:
            flat = _forward(backbone, input_ids[tokens][None], **options)[0]
        finally:
            config._attn_implementation = own
    return flat.new_zeros(*tokens.shape, flat.shape[-1]).masked_scatter(tokens[..., None], flat)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    lengths: tuple[int, ...] = (),
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each of the packed sequences: ``[1, H, N, d]`` → ``[1, N, H, d]``."""
    if not lengths:  # a padded pass of another thread, which shares the configuration
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    beyond = ("sliding_window", "softcap", "s_aux", "position_bias", "cache")
    given = [name for name in beyond if kwargs.get(name) is not None]
    if given or attention_mask is not None or sum(lengths) != query.shape[2]:
        raise ValueError(
            f"packed_attention: cannot do {given or 'masks'}, or was not told the lengths"
        )
    # Split once: each slice would have a gradient as large as the whole.
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    found = [sdpa_attention_forward(module, *part, None, **kwargs)[0] for part in parts]
    return torch.cat(found, dim=1), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def group_by_length(
    lengths: Int[Tensor, " B"], size: int | None = None, max_tokens: int | None = None
) -> list[Int[Tensor, " K"]]:
    """Group rows of similar length: at most `size` rows and `max_tokens` tokens with padding.

    A row longer than `max_tokens` gets a group of its own.
    """
    groups: list[list[int]] = []
    order = lengths.argsort(stable=True)
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        rows = len(groups[-1]) + 1 if groups else 1
        # In ascending order the newest row is the longest of its group.
        fits = max_tokens is None or rows * length <= max_tokens
        if groups and fits and (size is None or rows <= size):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [torch.tensor(group) for group in groups]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for the block, then each module back into its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
