"""The smallest honest PPO loop: plain torch and `generate`, full logits, nothing of this package.

    python benchmarks/minimal_loop.py [--shape tiny]

A peer of benchmarks/ppo_iteration.py: the same models, prompts, algorithm (TRL 1.12's PPO), options
and optimizer steps, and the same line of JSON. Prompts have one length here, and there are no
metrics, entropies, checks, checkpoints, adapters or processes: beside it, ours shows their cost.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from iteration_work import llama, parse, prompts
from measuring import peak_resident
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, get_scheduler

STAGES = ("collect", "score", "annotate", "estimate", "update")
PAD, END = 0, 2
RATE, KL, LAMBDA, CLIP, VALUE_COEF = 3e-6, 0.05, 0.95, 0.2, 0.1

Batch = dict[str, Tensor]
"""By name: "ids" ``[B, P + T]``; "mask" of response tokens, "states" (with that after an early
end), "logprobs", "ref_logprobs", "values", "advantages", "returns", each ``[B, T]``; "scores", and
"last", the position of the last token, ``[B]``."""


class Loop:
    """Four Llamas of random weights, and the five stages of an iteration."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.args, self.device = args, torch.device(args.device)
        self.policy = LlamaForCausalLM(llama(args)).to(self.device)
        self.reward = LlamaForSequenceClassification(llama(args, num_labels=1)).to(self.device)
        self.reference = copy.deepcopy(self.policy)
        self.critic = copy.deepcopy(self.reward)
        weights = [*self.policy.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0, fused=True)
        steps = args.iters * args.epochs * args.minibatches
        self.scheduler = get_scheduler("linear", self.optimizer, 0, steps)
        self.prompts = prompts(args, args.rollouts * args.iters).to(self.device)

    def collect(self, index: int) -> Batch:
        """Sample a response to each prompt of an iteration."""
        size, limit = self.args.rollouts, self.args.response
        given = self.prompts[index * size : (index + 1) * size]
        ids = self.policy.generate(
            given, attention_mask=torch.ones_like(given), do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, max_new_tokens=limit, eos_token_id=END, pad_token_id=PAD,
        )  # fmt: skip
        ids = F.pad(ids, (0, given.shape[1] + limit - ids.shape[1]), value=PAD)
        is_end = ids[:, given.shape[1] :] == END
        lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, limit)
        steps = torch.arange(limit, device=self.device)
        return {
            "ids": ids,
            "mask": steps < lengths[:, None],
            "states": steps <= lengths[:, None],
            "last": given.shape[1] + lengths - 1,
        }

    def score(self, batch: Batch) -> Batch:
        """Ask the reward model about every response."""
        hidden = self.reward.model(batch["ids"], use_cache=False).last_hidden_state
        scores = self.reward.score(hidden).squeeze(-1).float()
        return {**batch, "scores": scores.gather(1, batch["last"][:, None]).squeeze(1)}

    def annotate(self, batch: Batch) -> Batch:
        """Compute log-probs by policy and reference, and values."""
        return {
            **batch,
            "logprobs": self.logprobs(self.policy, batch),
            "ref_logprobs": self.logprobs(self.reference, batch),
            "values": self.values(batch),
        }

    def estimate(self, batch: Batch) -> Batch:
        """Shape rewards, and estimate advantages by GAE with γ = 1, whitened."""
        mask, states, values = batch["mask"], batch["states"], batch["values"]
        rewards = -KL * (batch["logprobs"] - batch["ref_logprobs"]) * mask
        rewards.scatter_add_(1, states.sum(1, keepdim=True) - 1, batch["scores"][:, None])
        after = carry = torch.zeros_like(batch["scores"])
        columns = []
        for t in reversed(range(mask.shape[1])):
            here = states[:, t]
            carry = torch.where(here, rewards[:, t] + after - values[:, t] + LAMBDA * carry, carry)
            after = torch.where(here, values[:, t], after)
            columns.append(carry * here)
        advantages = torch.stack(columns[::-1], dim=1)
        variance, mean = torch.var_mean(advantages[mask])
        whitened = (advantages - mean) * torch.rsqrt(variance + 1e-8) * mask
        return {**batch, "advantages": whitened, "returns": (advantages + values) * states}

    def update(self, batch: Batch) -> None:
        """Take epochs × minibatches optimizer steps."""
        size = self.args.rollouts // self.args.minibatches
        for _ in range(self.args.epochs):
            for rows in torch.randperm(self.args.rollouts, device=self.device).split(size):
                part = {name: value[rows] for name, value in batch.items()}
                for loss in (self.value_loss, self.policy_loss):
                    with self.autocast():
                        share = loss(part)
                    share.backward()
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()

    def policy_loss(self, part: Batch) -> Tensor:
        """Return the clipped surrogate, in the mean over tokens."""
        ratio = (self.logprobs(self.policy, part) - part["logprobs"]).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        per_token = torch.maximum(-ratio * part["advantages"], -clipped * part["advantages"])
        return (per_token * part["mask"]).sum() / part["mask"].sum()

    def value_loss(self, part: Batch) -> Tensor:
        """Return the coefficient times half the clipped squared error, in the mean over states."""
        values, old, returns = self.values(part), part["values"], part["returns"]
        clipped = old + (values - old).clamp(-CLIP, CLIP)
        per_state = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
        return VALUE_COEF * (per_state * part["states"]).sum() / part["states"].sum()

    def logprobs(self, model: LlamaForCausalLM, batch: Batch) -> Tensor:
        """Return ``[B, T]`` log-probs of the response tokens, from full logits ``[B, T, V]``."""
        hidden = model.model(batch["ids"], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, -self.args.response - 1 : -1]).float()
        targets = batch["ids"][:, -self.args.response :]
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return -nats.view_as(targets)

    def values(self, batch: Batch) -> Tensor:
        """Return ``[B, T]`` values of the states before each response token."""
        hidden = self.critic.model(batch["ids"], use_cache=False).last_hidden_state
        return self.critic.score(hidden[:, -self.args.response - 1 : -1]).squeeze(-1).float()

    def autocast(self) -> Any:
        """Compute in bfloat16 on CUDA, as the peers do."""
        return torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda")

    def iteration(self, index: int) -> tuple[Batch, dict[str, float]]:
        """Run the stages; return the batch, and the seconds of each stage."""
        seconds: dict[str, float] = {}
        batch: Any = index
        for stage in STAGES:
            start = time.perf_counter()
            if stage == "update":
                self.update(batch)
            else:
                with torch.no_grad(), self.autocast():
                    batch = getattr(self, stage)(batch)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[stage] = time.perf_counter() - start
        return batch, seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run iterations, and print what they took."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    loop, cuda = Loop(args), args.device == "cuda"
    taken, tokens = [], []
    for index in range(args.iters):
        batch, seconds = loop.iteration(index)
        taken.append(seconds)
        tokens.append(int(batch["mask"].sum()))
    totals = [sum(seconds.values()) for seconds in taken]
    warm = taken[1:] or taken
    found = {
        "who": "minimal loop",
        "iter_s": [round(total, 3) for total in totals],
        "median": round(median(totals[1:] or totals), 4),
        "peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20 if cuda else 0,
        "peak_rss_mb": peak_resident() / 2**20,
        "stages": {s: round(median(seconds[s] for seconds in warm), 6) for s in STAGES},
        "response_tokens": median(tokens[1:] or tokens),
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
