"""Lists of tokens, made into a rollout."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mossrlhf.types import Rollout


def require_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError where there is no prompt, or an empty one."""
    empty = [index for index, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty or not prompts:
        raise ValueError(
            f"prompts: got {len(prompts)}, of which {empty} are empty; expected at least one, "
            "and at least one token in each"
        )


def assemble(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    ended: Sequence[bool],
    *,
    pad_token_id: int,
    device: torch.device | str = "cpu",
    logprobs: Sequence[Sequence[float]] | None = None,
) -> Rollout:
    """Build a rollout ``[prompt][response][pad]``, padded on the right; for custom samplers.

    Args:
        prompts: B lists of token ids, none empty.
        completions: B lists of token ids, none empty, each with the token that ends it.
        ended: B booleans: whether the response ended by itself, rather than at the length limit.
        pad_token_id: any id of the vocabulary; masks come from lengths.
        device: of the rollout.
        logprobs: B lists of the tokens' log-probabilities under the sampled distribution, nats;
            None if they are unknown.

    Returns:
        a `Rollout` of B sequences; its ``sampler_logprobs`` ``[B, T]`` are float32, and zero
        outside the mask.

    Raises:
        ValueError: if there is not one response to each prompt, a response has no token, a token
            has a negative id, or the log-probabilities are not one finite number per token.
    """
    require_prompts(prompts)
    for name, values in (("completions", completions), ("ended", ended), ("logprobs", logprobs)):
        if values is not None and len(values) != len(prompts):
            raise ValueError(
                f"{name}: got {len(values)} for {len(prompts)} prompts, expected one for each, in "
                "their order"
            )
    _require_tokens(completions)
    known = None
    if logprobs is not None:
        _require_one_per_token(completions, logprobs)
        known = _padded(logprobs, 0.0, torch.float32).to(device)
    rows = [[*prompt, *response] for prompt, response in zip(prompts, completions, strict=True)]
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    response_lengths = torch.tensor([len(response) for response in completions], device=device)
    length = max(len(response) for response in completions)
    mask = torch.arange(length, device=device) < response_lengths[:, None]
    return Rollout(
        input_ids=_padded(rows, pad_token_id, torch.long).to(device),
        prompt_lengths=prompt_lengths,
        response_lengths=response_lengths,
        truncated=~torch.tensor([bool(end) for end in ended], device=device),
        mask=mask,
        sampler_logprobs=known,
    )


def _padded(rows: Sequence[Sequence[float]], padding: float, dtype: torch.dtype) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows], dtype=dtype)


def _require_tokens(completions: Sequence[Sequence[int]]) -> None:
    empty = [index for index, response in enumerate(completions) if len(response) == 0]
    if empty:
        raise ValueError(
            f"completions: {empty} have no token, expected at least one in each; the token that "
            "ends a response belongs to it"
        )
    negative = [index for index, response in enumerate(completions) if min(response) < 0]
    if negative:
        raise ValueError(
            f"completions: {negative} hold negative ids, expected ids of tokens; padding is "
            "added here, so leave it out"
        )


def _require_one_per_token(
    completions: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]
) -> None:
    for index, (response, given) in enumerate(zip(completions, logprobs, strict=True)):
        if len(response) != len(given):
            raise ValueError(
                f"logprobs: got {len(given)} for the {len(response)} tokens of response {index}, "
                "expected one for each; pass None where the sampler does not know them"
            )
        odd = [at for at, value in enumerate(given) if not math.isfinite(value)]
        if odd:
            raise ValueError(
                f"logprobs: that of token {odd[0]} of response {index} is {given[odd[0]]}, "
                "expected a finite number of nats: a sampled token cannot have been impossible"
            )
