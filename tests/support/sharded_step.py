"""One process of `test_sharded`: a whole step of PPO under FSDP2 or ZeRO, on the CPU.

Accelerate passes over both on a CPU, so its state is told what a GPU's launcher would have said;
from there on it calls ``fully_shard`` and ``deepspeed.initialize`` itself.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType


@dataclass(frozen=True)
class Case:
    """What is run.

    Args:
        kind: one, fsdp2, zero2, zero3, or zero3offloaded.
        dtype: of all weights.
        adapters: whether policy and critic are adapters on one base, activations recomputed.
    """

    kind: str
    dtype: str = "float64"
    adapters: bool = False

    @classmethod
    def of(cls, word: str) -> "Case":
        """Read kind:dtype, with :adapters behind it or not."""
        kind, dtype, *more = word.split(":")
        return cls(kind, dtype, bool(more))


def told(accelerator: Accelerator, kind: str) -> Accelerator:
    """Tell accelerate's state how to spread the weights."""
    if kind == "fsdp2":
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
        )
    if kind.startswith("zero"):
        import deepspeed

        # Shared memory, for which it would compile C++ for a minute.
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        deepspeed.init_distributed(dist_backend="gloo")
        zero: dict[str, Any] = {"stage": int(kind[4])}
        if kind[4] == "3":
            zero["stage3_param_persistence_threshold"] = 0
        if kind.endswith("offloaded"):
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        config = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
        plugin = DeepSpeedPlugin(hf_ds_config=config)
        accelerator.state.distributed_type = DistributedType.DEEPSPEED
        accelerator.state.deepspeed_plugins = {"default": plugin}
        plugin.select(_from_accelerator_state=True)
        accelerator.deepspeed_engine_wrapped = None  # as where it is launched so
    return accelerator


def reward(*, completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Some reward that is not the same for all."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def built(folder: Path, case: Case) -> Any:
    """Make the trainer that all kinds have in common."""
    from transformers import GenerationConfig, LlamaForCausalLM

    from mossrlhf import (
        AdvantageEstimator,
        PPOMaxLoss,
        RewardModel,
        RewardShaper,
        ToyWorld,
        Trainer,
    )
    from mossrlhf.config import TrainerConfig
    from mossrlhf.distributed.processes import make_accelerator

    world = ToyWorld()
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    config = world.model_config(hidden_size=16, num_layers=2)
    config.tie_word_embeddings = False
    judge = RewardModel.from_language_model(LlamaForCausalLM(config).to(dtype))
    torch.nn.init.normal_(judge.score.weight)
    policy = LlamaForCausalLM(config).to(dtype)
    parts: dict[str, Any] = {}
    if case.adapters:
        from peft import LoraConfig

        settings = dict(target_modules=["q_proj", "down_proj"])  # no effect yet: no second base
        parts |= dict(peft_config=LoraConfig(r=4, **settings), critic=LoraConfig(r=2, **settings))
    args = TrainerConfig(
        output_dir=str(folder / f"{case.kind}{int(case.adapters)}{case.dtype}"),
        rollout_size=8,
        minibatch_size=8,
        num_ppo_epochs=2,
        learning_rate=1e-3,
        critic_learning_rate=2e-3,
        weight_decay=0.1,
        warmup_steps=0,
        max_grad_norm=0.05,
        disable_tqdm=True,
        max_tokens=34 if case.kind == "fsdp2" else None,  # three micro-batches here, two there
        gradient_checkpointing=case.adapters,
    )
    return Trainer(
        policy,
        reward=[reward, (judge, 0.5)],
        train_dataset=world.prompts(8),
        eval_dataset=world.prompts(5),  # three for one process, two for the other
        processing_class=world.tokenizer(),
        generation_config=GenerationConfig(max_new_tokens=12, do_sample=False),
        ptx_dataset=world.sft_examples(16),
        shaper=RewardShaper(normalize=True),
        advantage=AdvantageEstimator(whiten=True),
        loss=PPOMaxLoss(entropy_coef=0.01, advantage_norm=True, ptx_coef=0.1),
        args=args,
        accelerator=told(make_accelerator(args), case.kind),
        **parts,
    )


def in_force(trainer: Any, kind: str) -> dict[str, bool]:
    """Say by what the weights are spread, by what they are made of."""
    from torch.distributed.fsdp import FSDPModule

    from mossrlhf.distributed.sharding import is_sharded

    if trainer.ref_model is not None:  # and the reward model
        frozen = [trainer.ref_model, *trainer.rewards.models()]
        assert [is_sharded(model) for model in frozen] == [kind[:5] in ("fsdp2", "zero3")] * 2
    parameters = list(trainer.model.parameters())
    blocks = [m for m in trainer.model.modules() if type(m).__name__.endswith("DecoderLayer")]
    return {
        "fsdp2": all(type(p.data).__name__ == "DTensor" for p in parameters)
        and all(isinstance(block, FSDPModule) for block in blocks)
        and isinstance(trainer.model, FSDPModule),
        "zero2": getattr(trainer.engine.model, "zero_optimization_stage", lambda: 0)() == 2
        and trainer.engine.zero.single_partition_of_fp32_groups[0].numel()
        < sum(p.numel() for p in trainer.policy.parameters()),
        "zero3": all(hasattr(p, "ds_id") and p.numel() == 0 for p in parameters),
    }


@contextmanager
def held_gradients(trainer: Any, kind: str) -> Iterator[list[int]]:
    """Note after each micro-batch how many bytes of gradients are held in plain tensors.

    Accelerate forgets FSDP2 every now and then on a CPU, and would not let gradients wait.
    """
    seen: list[int] = []
    accumulate = trainer.engine._accumulate
    state = trainer.accelerator.state
    known = state.distributed_type

    def noted(*given: Any, **options: Any) -> Any:
        if kind == "fsdp2":
            state.distributed_type = DistributedType.FSDP
        output = accumulate(*given, **options)
        parameters = [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Parameter)]
        gradients = [p.grad for p in parameters if type(p.grad) is torch.Tensor]
        seen.append(sum({id(g): g.nbytes for g in gradients}.values()))
        return output

    trainer.engine._accumulate = noted
    try:
        yield seen
    finally:
        state.distributed_type = known
        del trainer.engine._accumulate


def flat(trainer: Any) -> torch.Tensor:
    """All weights, one after the other."""
    from mossrlhf.distributed.sharding import gathered_tensor

    return torch.cat([gathered_tensor(p).flatten() for p in trainer.model.parameters()])


def taken(folder: Path, case: Case, one: str | None) -> dict[str, Any]:
    """Take the step, and return what came of it."""
    from mossrlhf.checkpoint.save_load import load_checkpoint, save_checkpoint

    torch.set_default_dtype(getattr(torch, case.dtype))
    trainer = built(folder, case)
    accelerator = trainer.accelerator
    result: dict[str, Any] = {"in_force": in_force(trainer, case.kind)}
    recorded = torch.load(folder / "rollout.pt", weights_only=False)
    rollout = recorded.select(torch.arange(accelerator.process_index, 8, accelerator.num_processes))
    result["before"] = flat(trainer)
    # The reference before anyone else, and the critic alone first, as in its warm-up.
    result["reference"] = trainer.respond(trainer.eval_dataset, reference=True).completions()
    estimated = trainer.estimate(trainer.annotate(trainer.score(rollout)))
    with held_gradients(trainer, case.kind) as result["held"]:
        result["warm-up"] = trainer.update(estimated, ("critic",))
    result["critic alone"] = flat(trainer)
    result["metrics"] = trainer.step(rollout)
    again = trainer.annotate(rollout)
    names = ("logprobs", "ref_logprobs", "values", "entropies")
    result["scored"] = {name: getattr(again, name) for name in names}
    result["evaluated"] = trainer.evaluate()
    result["drawn"] = trainer.respond(trainer.eval_dataset).completions()
    result["in_force_still"] = in_force(trainer, case.kind)
    result["parameters"] = flat(trainer)
    # Whole, and in the layout of one process; then that one's in place of what there is here.
    result["checkpoint"] = str(save_checkpoint(trainer.run.run_state))
    if one is not None:
        load_checkpoint(trainer.run.run_state, one)
        result["resumed"] = flat(trainer)
        trainer.output_dir /= "again"
        result["again"] = str(save_checkpoint(trainer.run.run_state))
    return result


def main(folder: Path, words: list[str]) -> None:
    """Run some cases one after the other; words are a case and the checkpoint of one process."""
    torch.set_num_threads(1)
    from mossrlhf.kernels import chunked_head as head

    head.CPU_CHUNK_BYTES, head.MIN_CHUNK_ROWS = 1, 16  # sixteen tokens
    results = {}
    for word in words:
        name, _, one = word.partition("@")
        results[name] = taken(folder, Case.of(name), one or None)
    rank = os.environ.get("RANK", "0")
    torch.save(results, folder / f"result{rank}.pt")
    if rank == "0":
        torch.save(results, folder / "result.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort an interpreter that takes its time to end


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
