"""`plan`: what a run will need of memory, before anything of it is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from mossrlhf.config import TrainerConfig
from mossrlhf.loading.policy import checkpoint_activations, disable_dropout
from mossrlhf.loading.tokenizer import prompt_budget
from mossrlhf.loss import PPOMaxLoss, coupling
from mossrlhf.models import ActorCritic, SharedRewardModel
from mossrlhf.models.lora import is_peft_model, vocabulary_size
from mossrlhf.planning.arguments import require_plannable, where_frozen
from mossrlhf.planning.ledger import nbytes, tensors_of, untouched_randomness
from mossrlhf.planning.parts import Maker, Parts
from mossrlhf.planning.passes import Passes, Taken, Work, chunk_bytes
from mossrlhf.planning.report import MemoryPlan, RoleMemory
from mossrlhf.planning.spread import Spread
from mossrlhf.sampling import HFSampler
from mossrlhf.sampling.hf import WARPERS, warps

TOKEN_BYTES = 28
"""Of a response token in a rollout: seven float32 numbers."""


def plan(
    model: Any,
    *,
    reward: Any = None,
    critic: Any = None,
    ref_model: Any = None,
    args: TrainerConfig | None = None,
    peft_config: Any = None,
    generation_config: GenerationConfig | None = None,
    sampler: Any = None,
    loss: PPOMaxLoss | None = None,
    prompt_tokens: int | None = None,
    max_new_tokens: int | None = None,
    processes: int = 1,
    sharding: str | None = None,
    frozen: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cuda",
) -> MemoryPlan:
    """Say what a run of `Trainer` will need of each device's memory, and when.

    Nothing is loaded but configurations: models are made without weights, and their passes run
    on the meta device, where the bytes of every tensor are counted for as long as it is held.

    Args:
        model: the policy, as for `Trainer`; a configuration of transformers will do.
        reward: as for `Trainer`, or a configuration; functions need nothing. A ``PeftConfig``
            stands for an adapter that is yet to be trained over the policy's base.
        critic: as for `Trainer`, or a configuration.
        ref_model: as for `Trainer`, or a configuration.
        args: sizes, precision, gradient checkpointing.
        peft_config: as for `Trainer`.
        generation_config: its ``max_new_tokens`` counts.
        sampler: an `HFSampler`, whose ``batch_size`` counts too.
        loss: what is minimized.
        prompt_tokens: of the longest prompt; None for `TrainerConfig.max_prompt_length`.
        max_new_tokens: of the longest response; None for that of `sampler` or
            `generation_config`, else 512.
        processes: devices, one to each.
        sharding: None (each holds everything), "fsdp", "zero3" or "zero2".
        frozen: where reference and reward models are: "whole" on each device, "sharded", or
            "offloaded" to the CPU until they are asked. It follows from `sharding` and
            ``offload_frozen``, and anything else is refused; None for what follows.
        dtype: of weights that are loaded by name; None for that of their configuration. What is
            trained is float32 at least, as with `Trainer`.
        device: "cuda" or "cpu"; chunks of logits and optimizers differ.

    Returns:
        the plan: a table when printed.

    Raises:
        ValueError: where a length is not known, a number or word is out of range, processes cannot
            share the rollout, or it cannot be told whether adapters start without effect.
        TypeError: where an argument is of another kind.

    Source: ours.
    """
    given = {name: value for name, value in locals().items() if name != "model"}
    require_plannable(given)
    args = args or TrainerConfig()
    frozen = where_frozen(frozen, sharding, args)
    args.require_shareable(processes)
    with untouched_randomness():
        parts = Maker(dtype).parts(model, reward, critic, ref_model, peft_config)
        asked = generation_config or GenerationConfig(max_new_tokens=max_new_tokens or 512)
        sampler = sampler or HFSampler(generation_config=asked, eos_token_id=0, pad_token_id=0)
        response = max_new_tokens or int(sampler.max_new_tokens)
        prompt = prompt_tokens or args.max_prompt_length
        if prompt is None:
            raise ValueError(
                "prompt_tokens: got None, and TrainerConfig(max_prompt_length=) is None too; say "
                "how many tokens the longest prompt has"
            )
        prompt_budget(parts.policy, args, response)
        work = _work(args, processes, prompt, response, sampler, device, loss)
        for module in parts.modules():
            if args.disable_dropout:
                disable_dropout(module)
        if args.gradient_checkpointing:
            checkpoint_activations(parts.policy)
            if parts.critic is not None:
                checkpoint_activations(parts.critic.backbone)
        passes = Passes(parts, work)
        sampling, scoring = passes.sampling(), passes.scoring()
        kept, gradients = passes.update(args.gradient_checkpointing or not args.disable_dropout)
    roles = _roles(parts, reward)
    if frozen == "offloaded" and device == "cpu":
        frozen = "whole"  # the CPU is where they wait
    spread = Spread(parts, processes, sharding, frozen, args.bf16)
    found = _Found(parts, work, args, sampling, scoring, kept, gradients)
    return _put_together(found, roles, spread, partial(plan, model), given)


@dataclass(frozen=True)
class _Found:
    parts: Parts
    work: Work
    args: TrainerConfig
    sampling: Taken
    scoring: Mapping[str, Taken]
    kept: Mapping[str, Taken]
    gradients: int


def _put_together(
    found: _Found, roles: dict[str, RoleMemory], spread: Spread, again: Any, given: dict[str, Any]
) -> MemoryPlan:
    work = found.work
    shared = {name: spread.share(name, role) for name, role in roles.items()}
    held = sum(role.weights + role.optimizer for role in shared.values())
    row = 8 * work.length + work.response * (TOKEN_BYTES + 1) + 24
    rollout = row * (work.rollout + work.minibatch)
    lent = {name: spread.lent(name) for name in ("reference", "reward")}
    peaks = {name: taken.peak for name, taken in found.scoring.items()}
    # Rewards are asked first, and are gone again when policy, reference and critic are.
    judged = peaks.pop("reward", 0) + lent["reward"]
    scored = max(judged, max(peaks.values()) + lent["reference"] + spread.gathered)
    # Gradients are there in full while they are made; under sharding a share of them stays.
    less = found.gradients - spread.gradients(found.gradients)
    passed = max(taken.peak for taken in found.kept.values()) - less
    stepped = found.gradients - less
    extra = spread.extra(found.gradients)
    phases = {
        "sampling": held + found.sampling.peak + spread.gathered,
        "scoring": held + rollout + scored,
        "update": held + rollout + max(passed, stepped) + extra,
    }
    vocabulary = vocabulary_size(found.parts.policy)
    return MemoryPlan(
        roles=shared,
        kept={role: taken.kept for role, taken in found.kept.items()},
        scoring={role: taken.peak for role, taken in found.scoring.items()},
        kv_cache=found.sampling.kept,
        logits=chunk_bytes(vocabulary, work.updated * work.response, work),
        rollout=rollout,
        extra=extra,
        lent={name: size for name, size in lent.items() if size},
        phases=phases,
        settings=_settings(found, spread, given),
        work=work,
        given=given,
        planned=again,
    )


def _work(
    args: TrainerConfig, processes: int, prompt: int, response: int, sampler: Any, device: str,
    loss: PPOMaxLoss | None,
) -> Work:  # fmt: skip
    rollout = args.rollout_size // processes
    minibatch = max(1, args.minibatch_size // processes)

    def at_a_time(rows: int) -> int:
        size = min(rows, args.micro_batch_size or rows)
        budget = args.max_tokens
        return size if budget is None else max(1, min(size, budget // (prompt + response)))

    ours = isinstance(sampler, HFSampler)
    batch = sampler.batch_size if ours else None
    drawing = ours and bool(sampler.effective.do_sample)
    return Work(
        prompt=prompt,
        response=response,
        rollout=rollout,
        drawn=min(rollout, batch or rollout),
        minibatch=minibatch,
        scored=at_a_time(rollout),
        updated=at_a_time(minibatch),
        cuda=device == "cuda",
        bf16=args.bf16,
        fused=coupling(loss or PPOMaxLoss()) is None,
        warped=drawing and any(warps(sampler.effective, name) for name in WARPERS),
    )


def _roles(parts: Parts, reward: Any) -> dict[str, RoleMemory]:
    both = ActorCritic(parts.policy, parts.critic)
    models = [parts.critic, *(model for model, _ in parts.rewards)]
    on_base = [model for model in models if isinstance(model, SharedRewardModel)]
    lent = {id(p) for model in on_base for p in model.own_parameters().values()}

    def of(module: nn.Module, role: str) -> RoleMemory:
        shares = isinstance(module, SharedRewardModel)
        own: list[torch.Tensor] = list(tensors_of(module).values())
        if isinstance(module, SharedRewardModel):
            own = list(module.own_parameters().values())
        elif role == "policy":
            own = [tensor for tensor in own if id(tensor) not in lent]
        trained = both.trained_parameters(role) if role in ("policy", "critic") else []
        return RoleMemory(
            parameters=sum(p.numel() for p in own if isinstance(p, nn.Parameter)),
            trained=sum(p.numel() for p in trained),
            weights=nbytes(own),
            gradients=nbytes(trained),
            optimizer=2 * nbytes(trained) + 4 * len(trained),  # two moments, and a count of steps
            note="on the policy's base" if shares else "",
        )

    absent = RoleMemory(note="none")
    reference = RoleMemory(note="the policy, adapters off")
    roles = {
        "policy": of(parts.policy, "policy"),
        "critic": absent if parts.critic is None else of(parts.critic, "critic"),
        "reference": reference if parts.reference is None else of(parts.reference, "reference"),
        "reward": RoleMemory(note="none given" if reward is None else "a function"),
    }
    if each := [of(model, "reward") for model, _ in parts.rewards]:
        counted, size = sum(r.parameters for r in each), sum(r.weights for r in each)
        roles["reward"] = RoleMemory(counted, weights=size, note=each[0].note)
    return roles


def _settings(found: _Found, spread: Spread, given: dict[str, Any]) -> dict[str, str]:
    work, args = found.work, found.args
    processes = f"{spread.processes} process{'es' if spread.processes > 1 else ''}"
    how_shared = f" ({spread.words})" if spread.processes > 1 else ""
    kind = "adapters" if is_peft_model(found.parts.policy) else "all weights trained"
    precision = "bfloat16 autocast" if work.bf16 else "no autocast"
    how = "checkpointed" if args.gradient_checkpointing else "not checkpointed"
    size = found.parts.rewards[0][1] if found.parts.rewards else 0
    scored = f"{work.scored} x {work.length} tokens"
    return {
        "where": ", ".join([processes + how_shared, given["device"], kind, precision]),
        "update": f"{work.updated} x {work.length} tokens, {how}",
        "policy": scored,
        "critic": scored,
        "reference": scored,
        "reward": f"{min(size, work.rollout)} x {work.length} tokens",
        "sampling": f"{work.drawn} x {work.length} tokens",
        "rollout": f"{work.rollout} responses, {work.minibatch} again",
        "extra": spread.words,
        "lent": "gathered" if spread.frozen == "sharded" else "from the CPU",
    }
