"""The passes of an iteration over models without weights, and the bytes each of them takes."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mossrlhf.functional.reduce import upcast
from mossrlhf.kernels.head import chunks
from mossrlhf.kernels.torch_rows import block_rows
from mossrlhf.models import ActorCritic, RewardModel, SharedRewardModel
from mossrlhf.models.token_path import output_head
from mossrlhf.planning.dry import Dry, backward
from mossrlhf.planning.ledger import Ledger, nbytes, tensors_of
from mossrlhf.planning.parts import Parts
from mossrlhf.roles import as_reference
from mossrlhf.sampling import draws
from mossrlhf.signature import inside


@dataclass(frozen=True)
class Work:
    """How much there is to do at a time on a device.

    Args:
        prompt: tokens of the longest prompt.
        response: tokens of the longest response.
        rollout: responses of this process.
        drawn: of those, how many at once.
        minibatch: responses of this process in an optimizer step.
        scored: responses in a micro-batch of scoring.
        updated: responses in a micro-batch of an update.
        cuda: whether on a GPU.
        bf16: whether to compute in bfloat16.
        fused: whether the loss's gradient is made along with it.
        warped: whether temperature, top-p and the like are on.
        noted: whether what the sampler notes of each token spares the policy's scoring.

    Source: ours.
    """

    prompt: int
    response: int
    rollout: int
    drawn: int
    minibatch: int
    scored: int
    updated: int
    cuda: bool
    bf16: bool
    fused: bool = True
    warped: bool = False
    noted: bool = False

    @property
    def length(self) -> int:
        """Tokens of a prompt with its response."""
        return self.prompt + self.response


@dataclass(frozen=True)
class Taken:
    """What a pass takes beyond weights and optimizer states, bytes.

    Args:
        peak: the most at once, gradients included.
        kept: what its forward keeps for its backward; for sampling, the KV cache.

    Source: ours.
    """

    peak: int
    kept: int = 0


class _TokenLoss(torch.autograd.Function):
    """The room that `kernels.linear` takes, and none of its work; one chunk is like the others."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, work: Work) -> Tensor:
        ctx.work = work
        ctx.save_for_backward(hidden, weight)
        ctx.made = _head_room(hidden, weight, work, ctx.needs_input_grad if work.fused else ())
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        made, ctx.made = ctx.made, None
        if not ctx.work.fused:
            made = _head_room(hidden, weight, ctx.work, ctx.needs_input_grad)
        like = zip(made, (hidden, weight), strict=True)
        return *(None if g is None else g.to(x.dtype) for g, x in like), None


def _head_room(hidden: Tensor, weight: Tensor, work: Work, wanted: Any) -> list[Tensor | None]:
    """Make what `kernels.head.Head` makes: operands in one type, gradients, a chunk of logits."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if work.bf16 and dtype != torch.float64:
        dtype = torch.bfloat16
    if not work.cuda and dtype in (torch.bfloat16, torch.float16):
        dtype = torch.float32
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    operands = hidden.to(dtype), weight.to(dtype)
    gradients: list[Tensor | None] = [None, None]
    for i, given in enumerate((hidden, weight)):
        if len(wanted) > i and wanted[i]:
            gradients[i] = given.new_zeros(given.shape, dtype=wide)
    rows = next(chunks(len(hidden), len(weight), work.cuda))
    logits = hidden.new_empty(rows.stop - rows.start, len(weight), dtype=wide)
    if not work.cuda:  # two blocks of scratch memory while a chunk is computed
        logits.new_empty(2 * block_rows(*logits.shape), len(weight))
    if any(g is not None for g in gradients) and dtype != wide:
        torch.empty_like(logits, dtype=dtype)
    del operands
    return gradients


def chunk_bytes(vocabulary: int, tokens: int, work: Work) -> int:
    """Return the bytes of one chunk of logits in float32.

    Args:
        vocabulary: V.
        tokens: N of a micro-batch.
        work: says where.

    Source: ours.
    """
    rows = next(chunks(tokens, vocabulary, work.cuda))
    return 4 * vocabulary * (rows.stop - rows.start)


class Passes:
    """Sampling, scoring and update of some models, each run once on the meta device.

    Args:
        parts: the models.
        work: how much at a time.

    Source: ours.
    """

    def __init__(self, parts: Parts, work: Work) -> None:
        self.parts = parts
        self.work = work
        self._held = list(tensors_of(*parts.modules()).values())
        self._dry = Dry(work.bf16)

    def _ids(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
        return ids, torch.ones_like(ids)

    def _values(self, model: nn.Module, rows: int) -> Tensor:
        """What a critic or reward model says of every token, or of every sequence."""
        ids, mask = self._ids(rows, self.work.length)
        if not isinstance(model, RewardModel):
            said: Tensor = model(ids, mask)
            return said
        speaking = model.speaking() if isinstance(model, SharedRewardModel) else nullcontext()
        with speaking:
            # Causal models are told of no padding on the right.
            hidden = model.backbone(ids, use_cache=False).last_hidden_state
        with self._dry.in_full():
            head, wide = model.score, upcast(hidden)
            bias = None if head.bias is None else head.bias.to(wide)
            return nn.functional.linear(wide, head.weight.to(wide), bias).squeeze(-1)

    def _hidden(self, policy: nn.Module, rows: int) -> Tensor:
        """Hidden states ``[N, D]`` before each token of the responses."""
        work = self.work
        ids, _ = self._ids(rows, work.length)
        backbone: Any = inside(policy).base_model
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
        places = torch.zeros(rows * work.response, dtype=torch.long, device="meta")
        return hidden[places, places]

    @torch.no_grad()
    def sampling(self) -> Taken:
        """Draw responses: the prompts at once, then the last token of all."""
        work, policy = self.work, self.parts.policy.eval()
        ledger = Ledger(self._held)
        with self._dry, self._dry.forward(), ledger:
            rows = work.drawn
            output = policy(**self._with_positions(rows, 0, work.prompt))
            left = self._drawn(output.logits)
            prefill, cache = ledger.peak, output.past_key_values
            del output
            # The cache as it stands before the last token, in the types the prompts left it in.
            held = _grown(cache, work.length - 1 - work.prompt)
            ledger.forget_peak()
            output = policy(**self._with_positions(rows, work.length - 1, 1), past_key_values=held)
            self._drawn(output.logits)
            del output, left
            kept = nbytes(_cached(held))
        return Taken(max(prefill, ledger.peak), kept)

    def _with_positions(self, rows: int, start: int, count: int) -> dict[str, Any]:
        ids, _ = self._ids(rows, count)
        mask = torch.ones(rows, start + count, dtype=torch.long, device="meta")
        positions = torch.arange(start, start + count, device="meta")[None].expand(rows, -1)
        asked: dict[str, Any] = dict(input_ids=ids, attention_mask=mask, use_cache=True)
        return {**asked, "position_ids": positions, "logits_to_keep": 1}

    def _drawn(self, logits: Tensor) -> tuple[Tensor, ...]:
        """What ``generate`` makes of the logits of one position, and `Draws` of those.

        Returns what is still there while it is made anew, a token later.
        """
        scores = logits[:, -1, :].to(copy=True, dtype=torch.float32)
        if not self.work.warped:
            _drawn_from(scores)
            return (scores,)
        ordered, places = torch.sort(scores)
        summed = ordered.softmax(-1).cumsum(-1)
        beyond = summed <= 0
        warped = scores.masked_fill(beyond.scatter(1, places, beyond), 0.0)
        del ordered, places, summed, beyond
        _drawn_from(warped)
        return scores, warped

    @torch.no_grad()
    def scoring(self) -> dict[str, Taken]:
        """Score a micro-batch by policy, reference and critic, and one by each reward model."""
        parts, work = self.parts, self.work
        taken = {}
        if not work.noted:
            taken["policy"] = self._scored(lambda: self._statistics(parts.policy, work.scored))
        with as_reference(parts.reference, parts.policy) as reference:
            taken["reference"] = self._scored(lambda: self._statistics(reference, work.scored))
        if parts.critic is not None:
            critic = parts.critic.eval()
            taken["critic"] = self._scored(lambda: self._values(critic, work.scored))
        for model, size in parts.rewards:
            rows = min(size, work.rollout)
            one = self._scored(lambda m=model, n=rows: self._values(m, n))  # type: ignore[misc]
            taken["reward"] = max(one, taken.get("reward", one), key=lambda t: t.peak)
        return taken

    def _scored(self, run: Callable[[], Any]) -> Taken:
        ledger = Ledger(self._held)
        with self._dry, self._dry.forward(), ledger:
            run()
        return Taken(ledger.peak)

    def _statistics(self, policy: nn.Module, rows: int) -> None:
        policy.eval()
        _head_room(self._hidden(policy, rows), _weight_of(policy), self.work, ())

    def update(self, train: bool) -> tuple[dict[str, Taken], int]:
        """Run forward and backward of critic and policy, gradients adding up.

        Args:
            train: whether the models are in training mode.

        Returns:
            by role what its forward keeps and its peak, and the bytes of all gradients after.
        """
        parts, work = self.parts, self.work
        ledger = Ledger(self._held)
        taken: dict[str, Taken] = {}
        runs: dict[str, Callable[[], Tensor]] = {}
        if (critic := parts.critic) is not None:
            runs["critic"] = lambda: self._value_loss(critic)
        runs["policy"] = self._policy_loss
        for module in (parts.policy, critic):
            if module is not None:
                module.train(train)
        both = ActorCritic(parts.policy, critic)
        for role, run in runs.items():
            if work.minibatch > work.updated:  # then one comes with the gradients there already
                with ledger:
                    self._fill_gradients(both, role)
            ledger.forget_peak()
            before = ledger.live
            with self._dry, ledger:
                with self._dry.forward():
                    loss = run()
                kept = ledger.live - before
                backward(loss)
                del loss
            taken[role] = Taken(ledger.peak, kept)
        models = tensors_of(parts.policy, critic).values()
        gradients = nbytes(p.grad for p in models if p.grad is not None)
        for parameter in models:
            parameter.grad = None
        return taken, gradients

    def _fill_gradients(self, both: ActorCritic, role: str) -> None:
        critic = both.critic
        beneath = isinstance(critic, SharedRewardModel) and critic.adapter is None
        reached = both.trained_parameters(role)
        if role == "critic" and beneath:  # a head on the policy reaches beneath it
            reached = reached + both.trained_parameters("policy")
        for parameter in reached:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)

    def _value_loss(self, critic: RewardModel) -> Tensor:
        values = self._values(critic, self.work.updated)
        return values[:, -self.work.response :].square().sum()

    def _policy_loss(self) -> Tensor:
        policy = self.parts.policy
        hidden = self._hidden(policy, self.work.updated)
        loss: Tensor = _TokenLoss.apply(hidden, _weight_of(policy), self.work)
        return loss


def _drawn_from(logprobs: Tensor) -> None:
    """What `Draws` makes of the log-probabilities: probabilities, in whole blocks."""
    p = logprobs.exp()
    if short := -p.shape[-1] % draws.BLOCK:
        nn.functional.pad(p, (0, short))


def _weight_of(policy: nn.Module) -> Tensor:
    head: Any = output_head(policy)
    layer = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    weight: Tensor = layer.weight
    return weight


def _cached(cache: Any) -> Iterator[Tensor]:
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, Tensor):
                yield value


def _grown(cache: Any, tokens: int) -> Any:
    """Let a cache of transformers grow by some tokens, layer by layer."""
    for layer in cache.layers:
        more = [layer.keys, layer.values]
        layer.update(*(x.new_empty(*x.shape[:2], tokens, *x.shape[3:]) for x in more))
    return cache
