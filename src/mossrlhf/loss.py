"""`PPOMaxLoss`: the policy, value and pre-training losses of PPO-max."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mossrlhf.functional import (
    Reduce,
    clipped_policy_loss,
    clipped_value_loss,
    kl_k2,
    kl_k3,
    whiten,
)
from mossrlhf.options import call_with, check_pair, check_range, strict
from mossrlhf.types import LossOutput, Rollout, TokenStats


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """What the policy's loss knows of N tokens besides their log-probs, in ``batch.mask`` order.

    Entries are 0 where a token's weight is 0, and None where no term of the loss uses them:
    `drift` is log π_old − log π_sampler, `entropy_side` 1 to raise the entropy and −1 to lower it.
    """

    weights: Float[Tensor, " N"]
    old_logprob: Float[Tensor, " N"]
    advantage: Float[Tensor, " N"]
    ref_logprob: Float[Tensor, " N"] | None = None
    drift: Float[Tensor, " N"] | None = None
    entropy_side: Float[Tensor, " N"] | None = None

    def __getitem__(self, rows: slice) -> "TokenRows":
        return self._map(lambda x: x[rows])

    def to(self, like: Tensor) -> "TokenRows":
        """Convert to the dtype and device of another tensor."""
        return self._map(lambda x: x.to(like))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "TokenRows":
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        changed: dict[str, Any] = {
            name: None if value is None else change(value) for name, value in values.items()
        }
        return TokenRows(**changed)


def weighted(x: Float[Tensor, "..."], weights: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Return Σ w·x; a NaN of weight zero adds nothing."""
    return torch.where(weights > 0, x * weights, torch.zeros_like(x)).sum()


def counted(x: Tensor, mask: Tensor, weights: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return ``x[mask]`` with 0 at weight zero, where a NaN would reach the gradient."""
    return torch.where(weights > 0, x[mask], torch.zeros_like(x[mask]))


def filled(batch: Rollout, name: str) -> Float[Tensor, "B T"]:
    """Return a field of a batch; raise ValueError where it is None."""
    value: Tensor | None = getattr(batch, name)
    if value is None:
        raise ValueError(
            f"batch.{name}: got None, expected [B, T]; fill it in before the loss "
            "(Trainer.annotate and Trainer.estimate do, given the models it needs)"
        )
    return value


def require_per_token(name: str, returned: object, weights: Tensor) -> None:
    """Raise ValueError where a method returned anything but one number per token."""
    shape = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
    if shape != tuple(weights.shape):
        raise ValueError(
            f"{name}: returned {shape}, expected one number per token, {tuple(weights.shape)}"
        )


def surrogate_statistics(
    logprob: Float[Tensor, " N"], rows: TokenRows, clip_range: tuple[float, float] | None
) -> dict[str, Tensor]:
    """Return weighted sums of ratio, approximate KL and clipped tokens, by metric (P1 §5.2)."""
    old_logprob, advantage, weights = rows.old_logprob, rows.advantage, rows.weights
    ratio = torch.exp(logprob - old_logprob)
    stats = {
        "policy/ratio": weighted(ratio, weights),
        "policy/approx_kl_per_token": weighted(kl_k3(old_logprob, logprob), weights),
    }
    if clip_range is not None:
        low, high = clip_range
        up, down = (advantage > 0) & (ratio > 1 + high), (advantage < 0) & (ratio < 1 - low)
        stats["policy/clip_fraction"] = weighted((up | down).to(weights), weights)
    return stats


@strict
@dataclass(frozen=True, kw_only=True)
class PPOMaxLoss:
    """The losses of PPO-max, each term a switch.

    For another algorithm override `policy_loss` (per token); the rest stays. A loss in which tokens
    depend on each other sets ``couples_tokens = True``; most are detected (see `coupling`).

    Args:
        policy_clip: ε of the clipped surrogate, or (ε_low, ε_high); None for no clip.
        dual_clip: c > 1, bound on the loss of tokens of negative advantage; None for none.
        value_clip: ε_v of the clipped value loss, in units of reward; None for no clip.
        value_coef: factor on the value loss. Under Adam it matters only where gradients are
            clipped jointly or policy and critic share parameters.
        entropy_coef: factor on the entropy bonus; None for none.
        entropy_target: δ_H, nats per token: the loss gets coef·|H̄ − δ_H| of the mean entropy H̄
            in place of the bonus. Above ln V it never binds. None for the bonus.
        kl_loss_coef: factor on a KL term towards the reference *in the loss*, by its k2 estimate;
            None for none. (The KL penalty in the reward is `RewardShaper.kl_coef`.)
        ptx_coef: λ_ptx, factor on the language-model loss of pre-training data; None for none.
        advantage_norm: whether to whiten advantages over each minibatch.
        advantage_clip: bound on |advantage| within each minibatch, after whitening; None for none.
        reference_ratio: whether the ratio is taken to the reference instead of the policy that
            sampled the tokens: P1's "importance sampling", an infinite experience buffer.
        sampler_ratio_cap: C ≥ 1: where tokens were sampled from another distribution than the
            scored one (top-p, an inference engine), each token's policy loss is weighted by
            min(π_old/π_sampler, C); None ignores the mismatch (it is logged either way).

    Raises:
        ValueError: where a clip or coefficient is negative, or `entropy_target` stands alone.

    Source: P1 eqs. 15-17, §5.3 and §5.4; ε = ε_v = 0.2 (MOSS-RLHF's code). Truncated
        importance sampling: Ionides (2008).
    """

    policy_clip: float | tuple[float, float] | None = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    value_coef: float = 1.0
    entropy_coef: float | None = None
    entropy_target: float | None = None
    kl_loss_coef: float | None = None
    ptx_coef: float | None = None
    advantage_norm: bool = False
    advantage_clip: float | None = None
    reference_ratio: bool = False
    sampler_ratio_cap: float | None = None

    couples_tokens: ClassVar[bool] = False  # whether one token's loss depends on other tokens

    def __post_init__(self) -> None:
        check_pair("PPOMaxLoss", "policy_clip", self.policy_clip)
        check_range("PPOMaxLoss", "dual_clip", self.dual_clip, 1, above=True)
        check_range("PPOMaxLoss", "sampler_ratio_cap", self.sampler_ratio_cap, 1)
        check_range("PPOMaxLoss", "value_clip", self.value_clip, 0, above=True)
        check_range("PPOMaxLoss", "advantage_clip", self.advantage_clip, 0, above=True)
        for name in ("value_coef", "entropy_coef", "kl_loss_coef", "ptx_coef"):
            check_range("PPOMaxLoss", name, getattr(self, name), 0)
        if self.entropy_target is not None and self.entropy_coef is None:
            raise ValueError(
                f"PPOMaxLoss(entropy_target={self.entropy_target}): entropy_coef is None, so the "
                "target has no weight; set entropy_coef (P1: 0.01) or leave the target out"
            )

    @property
    def clip_range(self) -> tuple[float, float] | None:
        """(ε_low, ε_high) of the surrogate, or None."""
        if self.policy_clip is None or isinstance(self.policy_clip, tuple):
            return self.policy_clip
        return self.policy_clip, self.policy_clip

    def policy_loss(
        self,
        logprob: Float[Tensor, " N"],
        old_logprob: Float[Tensor, " N"],
        advantage: Float[Tensor, " N"],
        entropy: Float[Tensor, " N"] | None = None,
    ) -> Float[Tensor, " N"]:
        """Compute the policy's loss per token, ``[N]``; override it for another algorithm.

        Args:
            logprob: ``[N]`` under the policy being trained, nats.
            old_logprob: ``[N]`` in the ratio's denominator, nats.
            advantage: ``[N]``.
            entropy: ``[N]`` nats, times −1 where it is above its target; None without an entropy
                term.
        Source: P1 eq. 15.
        """
        loss = clipped_policy_loss(logprob, old_logprob, advantage, self.clip_range, self.dual_clip)
        if entropy is not None and self.entropy_coef is not None:
            loss = loss - self.entropy_coef * entropy
        return loss

    def value_loss(
        self,
        value: Float[Tensor, " N"],
        old_value: Float[Tensor, " N"],
        returns: Float[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        """Compute the critic's loss per token, ``[N]``, before `value_coef`.

        Args:
            value: ``[N]`` of the critic being trained, in units of reward.
            old_value: ``[N]`` of the critic when the rollout was annotated.
            returns: ``[N]`` targets.
        Source: P1 eq. 16.
        """
        return clipped_value_loss(value, old_value, returns, self.value_clip)

    def without_value_clip(self) -> "PPOMaxLoss":
        """Return a copy that does not clip the value loss, for the critic's warm-up."""
        copied = copy.copy(self)  # not `replace`: a subclass may have another __init__
        object.__setattr__(copied, "value_clip", None)
        return copied

    def prepare(self, minibatch: Rollout, reduce: Reduce = lambda tensor: tensor) -> Rollout:
        """Compute what needs the whole minibatch, before it is split into micro-batches.

        Whitens and clips advantages, and compares H̄, the mean entropy at annotation, with its
        target: |H̄ − δ_H| is no sum over tokens, but its gradient is that of sign(H̄ − δ_H)·H̄,
        which is one.

        Args:
            minibatch: the sequences of one optimizer step of this process.
            reduce: sums a tensor over all processes.

        Returns:
            the minibatch, ready to be split.

        Raises:
            ValueError: where there is an entropy target, and no entropies.

        Source: P1 §5.3.1 (advantage normalization and clipping).
        """
        advantages = minibatch.advantages
        if advantages is not None and self.advantage_norm:
            advantages = whiten(advantages, minibatch.mask, reduce=reduce)
        if advantages is not None and self.advantage_clip is not None:
            advantages = advantages.clamp(-self.advantage_clip, self.advantage_clip)
        minibatch = replace(minibatch, advantages=advantages)
        if self.entropy_target is None:
            return minibatch
        entropies, weights = filled(minibatch, "entropies"), minibatch.token_weights
        mean = reduce(weighted(entropies, weights)) / reduce(weights.sum())
        side = torch.sign(self.entropy_target - mean).expand(len(minibatch))
        return replace(minibatch, extra={**minibatch.extra, "entropy_side": side})

    def policy(
        self, stats: TokenStats, batch: Rollout, denominator: Float[Tensor, ""] | None = None
    ) -> LossOutput:
        """Return the policy's share of the loss, and its statistics.

        Args:
            stats: `TokenStats` of the N tokens of ``batch.mask``, under the policy being trained.
            batch: an annotated micro-batch.
            denominator: sum of the token weights of the whole optimizer step; None for the
                batch's own.

        Raises:
            ValueError: where the batch has not been annotated as the switches need it.

        Source: P1 eq. 15; statistics: P1 §5.2.
        """
        rows = self.rows(batch)
        return self.tokens(stats, rows, rows.weights.sum() if denominator is None else denominator)

    def rows(self, batch: Rollout) -> TokenRows:
        """Flatten an annotated micro-batch to the `TokenRows` ``[N]`` of ``batch.mask``.

        Raises:
            ValueError: where a field that a term uses is None.
        """
        weights = batch.token_weights[batch.mask]

        def flat(x: Tensor) -> Tensor:
            return counted(x, batch.mask, weights)

        ratio_to = "ref_logprobs" if self.reference_ratio else "logprobs"
        ref_logprob = drift = None
        if self.kl_loss_coef is not None:
            ref_logprob = flat(filled(batch, "ref_logprobs"))
        if self.sampler_ratio_cap is not None and batch.sampler_logprobs is not None:
            drift = flat(filled(batch, "logprobs") - batch.sampler_logprobs)
        return TokenRows(
            weights=weights,
            old_logprob=flat(filled(batch, ratio_to)),
            advantage=flat(filled(batch, "advantages")),
            ref_logprob=ref_logprob,
            drift=drift,
            entropy_side=self._entropy_side(batch),
        )

    def tokens(
        self, stats: TokenStats, rows: TokenRows, denominator: Float[Tensor, ""]
    ) -> LossOutput:
        """Return the share of some tokens in the policy's loss, and its statistics.

        Args:
            stats: `TokenStats` of N tokens, under the policy being trained.
            rows: of the same tokens.
            denominator: sum of the token weights of the whole optimizer step.

        Raises:
            ValueError: where the entropy is needed and None, or `policy_loss` does not return
                one number per token.

        Source: P1 eq. 15; statistics: P1 §5.2.
        """
        rows, logprob = rows.to(stats.logprob), stats.logprob
        weights, old_logprob, advantage = rows.weights, rows.old_logprob, rows.advantage
        entropy = self._entropy(stats, rows)
        per_token = call_with(self.policy_loss, logprob, old_logprob, advantage, entropy=entropy)
        require_per_token("policy_loss", per_token, weights)
        if rows.drift is not None:
            per_token = per_token * rows.drift.exp().clamp(max=self.sampler_ratio_cap)
        loss = weighted(per_token, weights)
        if rows.ref_logprob is not None and self.kl_loss_coef is not None:
            penalty = kl_k2(logprob, rows.ref_logprob)
            loss = loss + self.kl_loss_coef * weighted(penalty, weights)
        loss = loss / denominator
        logged = surrogate_statistics(logprob.detach(), rows, self.clip_range)
        shares = {name: value / denominator for name, value in logged.items()}
        return LossOutput(loss, {"policy/loss": loss.detach(), **shares})

    def critic(
        self,
        value: Float[Tensor, " N"],
        batch: Rollout,
        denominator: Float[Tensor, ""] | None = None,
    ) -> LossOutput:
        """Return the critic's share of the loss, and its statistics.

        Args:
            value: ``[N]`` for the states of ``batch.states``, by the critic being trained.
            batch: an annotated micro-batch.
            denominator: sum of the state weights of the whole optimizer step; None for the
                batch's own.

        Raises:
            ValueError: where the batch has no values or returns.

        Source: P1 eq. 16.
        """
        weights = batch.state_weights[batch.states].to(value)
        if denominator is None:
            denominator = weights.sum()
        old_value = counted(filled(batch, "values"), batch.states, weights)
        returns = counted(filled(batch, "returns"), batch.states, weights)
        per_state = self.value_loss(value, old_value, returns)
        require_per_token("value_loss", per_state, weights)
        loss = weighted(per_state, weights) / denominator
        stats = {"critic/loss": loss.detach()}
        if self.value_clip is not None:
            moved = (value.detach() - old_value).abs() > self.value_clip
            stats["critic/clip_fraction"] = weighted(moved.to(weights), weights) / denominator
        return LossOutput(self.value_coef * loss, stats)

    def ptx(
        self,
        loss: Float[Tensor, ""],
        tokens: Int[Tensor, ""],
        denominator: Float[Tensor, ""] | None = None,
    ) -> LossOutput:
        """Return the share of the language-model loss on pre-training data.

        Args:
            loss: summed over the tokens of the micro-batch, nats.
            tokens: how many they are.
            denominator: tokens of the whole optimizer step; None for `tokens`.

        Source: P1 eq. 17.
        """
        mean = loss / (tokens if denominator is None else denominator)
        return LossOutput((self.ptx_coef or 0.0) * mean, {"ptx/loss": mean.detach()})

    def __call__(
        self,
        stats: TokenStats,
        batch: Rollout,
        value: Float[Tensor, " M"] | None = None,
    ) -> LossOutput:
        """Return policy and critic loss of a whole minibatch in one: L_policy + c_v·L_value.

        For loops without a `Trainer`, which takes the two in turn: the gradient of the sum, at
        half the peak memory.

        `stats` are of the N tokens of ``batch.mask``, `value` ``[M]`` of the states of
        ``batch.states``, or None without a critic; call `prepare` first where a switch needs it.

        Source: P1 §3.2.
        """
        policy = self.policy(stats, batch)
        if value is None:
            return policy
        critic = self.critic(value, batch)
        return LossOutput(policy.loss + critic.loss, {**policy.stats, **critic.stats})

    def _entropy(self, stats: TokenStats, rows: TokenRows) -> Tensor | None:
        if stats.entropy is None:
            if self.entropy_coef is None:
                return None
            raise ValueError(
                f"stats.entropy: got None, but PPOMaxLoss(entropy_coef={self.entropy_coef}) needs "
                "it; compute it with policy_stats(..., entropy=True)"
            )
        return stats.entropy if rows.entropy_side is None else stats.entropy * rows.entropy_side

    def _entropy_side(self, batch: Rollout) -> Tensor | None:
        if self.entropy_target is None:
            return None
        if "entropy_side" not in batch.extra:
            raise ValueError(
                f"batch: PPOMaxLoss(entropy_target={self.entropy_target}) needs to know the mean "
                "entropy of the whole minibatch; call prepare(minibatch) before splitting it"
            )
        return batch.extra["entropy_side"][:, None].expand_as(batch.mask)[batch.mask]


SCALES = (0.1, 1.0, 4.0, 30.0)
"""Sizes of log-ratios and advantages that `coupling` tries: within a clip, beyond, far beyond."""


def coupling(loss: PPOMaxLoss) -> str | None:
    """Return why a policy's loss may not be a sum over tokens, as a clause; None where it is one.

    A sum over tokens is differentiated in the forward pass, a chunk of logits at a time; any other
    loss gets the log-probs of its micro-batch, and the backward pass computes each chunk again.
    `policy_loss` is called on six invented tokens at once and one by one, and losses and gradients
    compared, at several scales. What this cannot find a subclass declares: ``couples_tokens``.
    """
    if loss.couples_tokens:
        return f"{type(loss).__name__}.couples_tokens is set"
    for name in ("policy", "tokens"):
        if getattr(type(loss), name) is not getattr(PPOMaxLoss, name):
            return f"{type(loss).__name__} overrides {name}"
    if type(loss).policy_loss is PPOMaxLoss.policy_loss:
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            return next((why for scale in SCALES if (why := _coupling_at(loss, scale))), None)
    except Exception as error:  # the user's code may raise anything on invented tokens
        return f"policy_loss raises {type(error).__name__} on a few invented tokens"


def _coupling_at(loss: PPOMaxLoss, scale: float) -> str | None:
    numbers = torch.linspace(-1.0, 1.0, 6)
    old_logprob = -torch.linspace(3.0, 0.5, 6) - scale
    logprob = (old_logprob + scale * numbers.roll(1)).clamp(max=-0.01)
    entropy = numbers.roll(2) + 1.5
    tokens = torch.stack([logprob, old_logprob, scale * numbers.roll(4), entropy])
    together = _loss_and_gradient(loss, tokens)
    alone = [_loss_and_gradient(loss, token) for token in tokens.split(1, dim=1)]
    joined = [torch.cat(parts, -1) for parts in zip(*alone, strict=True)]
    pairs = zip(together, joined, strict=True)
    if all(torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True) for a, b in pairs):
        return None
    return "policy_loss gives a token another loss beside other tokens"


def _loss_and_gradient(loss: PPOMaxLoss, tokens: Tensor) -> tuple[Tensor, Tensor]:
    probe = copy.deepcopy(loss)  # its memory, if it has one, must not see invented tokens
    leaf = tokens.clone().requires_grad_()
    logprob, old_logprob, advantage, entropy = leaf
    more = {} if loss.entropy_coef is None else {"entropy": entropy}
    losses: Tensor = call_with(
        probe.policy_loss, logprob, old_logprob.detach(), advantage.detach(), **more
    )
    gradient = torch.zeros_like(tokens)
    if losses.requires_grad:
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient
