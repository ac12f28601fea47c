"""One process of `test_distributed`: gradients of policies sharded by ZeRO-3, on the CPU."""

import os
import sys
from importlib import import_module
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from mossrlhf import ActorCritic, LossOutput, RewardModel
from mossrlhf.kernels import chunked_head as head
from mossrlhf.models import announce, token_path

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "Adam", "params": {"lr": 0.1, "torch_adam": True}},
}


def made(folder: Path, kind: str) -> torch.nn.Module:
    """Load the policy, with the head that this case is about."""
    policy = LlamaForCausalLM.from_pretrained(folder / "policy")
    if kind == "tied":
        policy.lm_head.weight = policy.model.embed_tokens.weight
    if kind != "adapted":
        return policy
    config = LoraConfig(target_modules=["q_proj", "lm_head"], r=4, init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(policy, config)


def loss_fn(stats, rows=None):
    """Some loss that wants the gradient of everything."""
    return LossOutput((stats.logprob + 0.1 * stats.entropy**2).sum() * dist.get_world_size())


def main(folder: Path) -> None:
    """Score and differentiate this process's share of the rollout; save what comes of it."""
    torch.set_num_threads(1)
    head.CPU_CHUNK_BYTES, head.MIN_CHUNK_ROWS = (
        1,
        16,
    )  # three chunks on one process, one on the other
    # Shared memory, for which it would compile C++ for a minute.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    rollout = torch.load(folder / "rollout.pt", weights_only=False)
    part = rollout.select(torch.arange(rank, len(rollout), count))
    result = {}
    for kind, fused in (("plain", True), ("plain", False), ("tied", True), ("adapted", False)):
        policy = made(folder, kind)
        critic = RewardModel.from_language_model(folder / "policy")
        model = ActorCritic(policy, critic, temperature=0.7)
        wanted = [p for p in policy.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, config=CONFIG, model_parameters=wanted)
        announce(model.policy, "model")
        with torch.no_grad():
            scored = model.score(part, entropy=True)
            values = model.values(part)[0][part.states]
        output = engine("policy", part, loss_fn, entropy=True, fused=fused)
        engine.backward(output.loss)
        gradient = torch.cat([safe_get_full_grad(p).flatten() for p in wanted])
        result[f"{kind} {'fused' if fused else 'recomputed'}"] = {
            "path": token_path(model.policy).reason,
            "sharded": all(p.numel() == 0 for p in model.parameters()),
            "scored": torch.stack([scored.logprob, scored.entropy]),
            "values": values,
            "gradient": gradient,
        }
    if rank == 0:
        torch.save(result, folder / "result.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort an interpreter that takes its time to end


if __name__ == "__main__":
    main(Path(sys.argv[1]))
