"""A rollout that no sampler drew: the same on every process and in every test."""

import torch

from mossrlhf import Rollout, ToyWorld


def recorded_rollout(world: ToyWorld, responses: torch.Tensor | None = None) -> Rollout:
    """Eight responses of very different lengths behind prompts of very different lengths.

    Args:
        world: whose tokens.
        responses: ``[8]`` other lengths.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = torch.tensor([3, 9, 5, 14, 4, 6, 11, 8])
    if responses is None:
        responses = torch.tensor([12, 1, 7, 3, 12, 2, 9, 5])
    longest = int(responses.max())
    ids = torch.randint(6, len(world.tokenizer()), (8, 14 + longest), generator=generator)
    return Rollout(
        input_ids=ids[:, : int((prompts + responses).max())],
        prompt_lengths=prompts,
        response_lengths=responses,
        truncated=responses == longest,
        mask=torch.arange(longest) < responses[:, None],
        columns={key: [r[key] for r in world.prompts(8)] for key in ("prompt", "topic")},
    )
