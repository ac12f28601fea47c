"""A rollout that no sampler drew: the same on every process and in every test."""

import torch

from mossrlhf import Rollout, ToyWorld


def recorded_rollout(world: ToyWorld) -> Rollout:
    """Eight responses of very different lengths behind prompts of very different lengths."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.tensor([3, 9, 5, 14, 4, 6, 11, 8])
    responses = torch.tensor([12, 1, 7, 3, 12, 2, 9, 5])
    ids = torch.randint(6, len(world.tokenizer()), (8, 26), generator=generator)
    return Rollout(
        input_ids=ids[:, : int((prompts + responses).max())],
        prompt_lengths=prompts,
        response_lengths=responses,
        truncated=responses == 12,
        mask=torch.arange(12) < responses[:, None],
        columns={key: [r[key] for r in world.prompts(8)] for key in ("prompt", "topic")},
    )
