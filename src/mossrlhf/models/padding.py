"""Whether a model needs to be told which tokens are padding."""

from weakref import WeakKeyDictionary

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from mossrlhf.distributed.sharding import is_sharded

_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def needed_mask(
    backbone: nn.Module, attention_mask: Shaped[Tensor, "B L"], right_padded: bool | None = None
) -> Tensor | None:
    """Return the mask a backbone is to be given: none, where it would change no token's state.

    Padding on the right is behind every token, and where none looks ahead it is of no consequence.
    Without a mask attention takes its causal kernels, which do half of the work.

    Args:
        backbone: a bare transformer.
        attention_mask: ``[B, L]``.
        right_padded: whether all padding is on the right; None to look, which on CUDA would have
            the host wait, and is not done there.

    Source: ours.
    """
    if right_padded is None:
        right_padded = attention_mask.device.type == "cpu" and _is_behind(attention_mask)
    return None if right_padded and looks_back(backbone) else attention_mask.long()


def _is_behind(mask: Tensor) -> bool:
    mask = mask.bool()
    return bool(mask[:, 0].all()) and not bool((mask[:, 1:] & ~mask[:, :-1]).any())


def looks_back(backbone: nn.Module) -> bool:
    """Whether a token's hidden state depends on the tokens up to it alone: asked, and remembered.

    Args:
        backbone: a bare transformer. One that is sharded is asked beforehand, or not at all: then
            the answer is no.

    Source: ours; asked rather than looked up, since some models look ahead by configuration.
    """
    known = _known.get(backbone)
    if known is None:
        if is_sharded(backbone):
            return False
        known = _known[backbone] = _probed(backbone)
    return known


@torch.no_grad()
def _probed(backbone: nn.Module) -> bool:
    weight: Tensor = backbone.get_input_embeddings().weight  # type: ignore[operator]
    ids = torch.arange(12, device=weight.device).view(2, 6) * 7 % len(weight)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    other = torch.where(mask.bool(), ids, (ids + 1) % len(weight))
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.autocast(weight.device.type, enabled=False):
            told, untold, otherwise = (
                backbone(input_ids=tokens, attention_mask=given, use_cache=False).last_hidden_state
                for tokens, given in ((ids, mask), (ids, None), (other, None))
            )
    except Exception:  # whatever it is that such a model cannot do
        return False
    finally:
        for module, mode in modes:
            module.training = mode
    seen = mask.bool()
    told, untold, otherwise = told[seen].float(), untold[seen].float(), otherwise[seen].float()
    # To the bit, since in half precision a look ahead may be as small as rounding.
    if not torch.equal(untold, otherwise):
        return False
    tolerance = 1e-5 if weight.dtype in (torch.float32, torch.float64) else 0.02
    return bool((told - untold).abs().max() <= tolerance * told.abs().max())
