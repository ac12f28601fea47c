"""One process of `test_distributed`: gradients of a policy sharded by FSDP2, on the CPU."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard


def main(folder: Path, fused: bool) -> None:
    """Differentiate a loss of this process's share of the rollout; save all of the gradient."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    from transformers import LlamaForCausalLM

    from mossrlhf import ActorCritic, LossOutput
    from mossrlhf.kernels import chunked_head as head
    from mossrlhf.models import token_path

    head.CPU_CHUNK_BYTES, head.MIN_CHUNK_ROWS = 1, 16  # sixteen tokens
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    policy = LlamaForCausalLM.from_pretrained(folder / "policy", dtype=torch.float64)
    model = ActorCritic(policy, temperature=0.7)
    assert token_path(model.policy).by_hidden
    for layer in model.policy.model.layers:
        fully_shard(layer)
    fully_shard(model)
    rollout = torch.load(folder / "rollout.pt", weights_only=False)
    part = rollout.select(torch.arange(rank, len(rollout), count))

    def loss_fn(stats, rows=None):
        return LossOutput((stats.logprob + 0.1 * stats.entropy**2).sum() * count)

    with torch.no_grad():  # first, as the trainer does
        scored = model.score(part, entropy=True)
    model("policy", part, loss_fn, entropy=True, fused=fused).loss.backward()
    sharded = all(hasattr(p, "full_tensor") for p in model.parameters())
    gradient = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
    if rank == 0:
        scored = torch.stack([scored.logprob, scored.entropy])
        result = {"gradient": gradient, "sharded": sharded, "scored": scored}
        torch.save(result, folder / "result.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort an interpreter that takes its time to end


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "fused")
