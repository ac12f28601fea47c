"""What `VLLMEngine` asks of vLLM, on a tiny model with weights of its own. It is not vLLM.

The weights go stale unless they are sent, and so does what is remembered of prompts. Tokens are
drawn one prompt at a time, by plain arithmetic.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from mossrlhf.sampling.vllm import WeightReceiver


@dataclass(kw_only=True)
class SamplingParams:
    """The fields that are known, and no others."""

    n: int = 1
    presence_penalty: float = 0.1  # wrong on purpose, as are the others: all must be given
    frequency_penalty: float = 0.1
    repetition_penalty: float = 1.3
    temperature: float = 3.0
    top_p: float = 0.1
    top_k: int = 1
    min_p: float = 0.5
    seed: int | None = None
    stop: list[str] | None = field(default_factory=lambda: ["."])
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int = 1
    min_tokens: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = 1
    detokenize: bool = True


class Runner:
    """Holds the model of a worker, which takes weights by their names in a checkpoint."""

    def __init__(self, model):
        self.model = SimpleNamespace(load_weights=self.load)
        self.within = model

    @torch.no_grad()
    def load(self, weights):
        own = self.within.state_dict()
        for name, weight in weights:
            own[name].copy_(weight)  # a name that is not known, or another shape, raises


class Worker:
    """As vLLM's: without an extension it takes no weights."""

    def __init__(self, model):
        self.model_runner = Runner(model)


class ExtendedWorker(WeightReceiver, Worker):
    """As vLLM makes it of ``worker_extension_cls``."""


class LLM:
    """A stand-in for ``vllm.LLM``.

    Args:
        model: a causal language model of its own.
        extended: whether it has been built with our extension of workers.
        logprobs_mode: of vLLM.
        eos: the checkpoint's own end, which is heeded unless it is ignored.
    """

    def __init__(self, model, extended=True, logprobs_mode="processed_logprobs", eos=0):
        self.model, self.eos = model.eval(), eos
        self.workers = [(ExtendedWorker if extended else Worker)(model)]
        config = SimpleNamespace(
            logprobs_mode=logprobs_mode,
            get_vocab_size=lambda: model.get_input_embeddings().num_embeddings,
        )
        self.llm_engine = SimpleNamespace(model_config=config)
        self.remembered: dict[tuple[int, ...], torch.Tensor] = {}
        self.asked: list[Any] = []
        self.files: list[str] = []

    def collective_rpc(self, method, args=()):
        self.files += args
        return [getattr(worker, method)(*args) for worker in self.workers]

    def reset_prefix_cache(self):
        self.remembered.clear()

    def generate(self, prompts, params, use_tqdm):
        assert len(prompts) == len(params)
        self.asked += params
        pairs = zip(prompts, params, strict=True)
        return [SimpleNamespace(outputs=[self.draw(p["prompt_token_ids"], q)]) for p, q in pairs]

    @torch.no_grad()
    def logits(self, ids):
        return self.model(torch.tensor([ids])).logits[0, -1]

    def draw(self, prompt, params):
        generator = torch.Generator().manual_seed(params.seed)
        ends = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else {self.eos})
        tokens, logprobs = [], []
        if tuple(prompt) not in self.remembered:
            self.remembered[tuple(prompt)] = self.logits(prompt)
        while len(tokens) < params.max_tokens and not ends & set(tokens):
            raw = self.logits(prompt + tokens) if tokens else self.remembered[tuple(prompt)]
            scores = processed(raw, prompt + tokens, params)
            if params.temperature == 0:
                token = int(scores.argmax())
            else:
                token = int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
            mode = self.llm_engine.model_config.logprobs_mode
            said = (scores if mode == "processed_logprobs" else raw).log_softmax(-1)
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=float(said[token]))})
        return SimpleNamespace(
            token_ids=tokens,
            logprobs=None if params.logprobs is None else logprobs,
            finish_reason="stop" if ends & set(tokens) else "length",
        )


def processed(logits, seen, params):
    """Penalty, temperature, min-p, top-k and top-p, in vLLM's order."""
    assert params.presence_penalty == params.frequency_penalty == 0
    scores = logits.clone()
    said = torch.tensor(sorted(set(seen)))
    scores[said] = torch.where(
        scores[said] > 0,
        scores[said] / params.repetition_penalty,
        scores[said] * params.repetition_penalty,
    )
    if params.temperature:
        scores = scores / params.temperature
    shares = scores.softmax(-1)
    scores[shares < params.min_p * shares.max()] = -torch.inf
    if params.top_k > 0:
        scores[scores < scores.topk(params.top_k).values[-1]] = -torch.inf
    ordered, places = scores.softmax(-1).sort(descending=True)
    beyond = ordered.cumsum(0) - ordered >= params.top_p
    scores[places[beyond]] = -torch.inf
    return scores
