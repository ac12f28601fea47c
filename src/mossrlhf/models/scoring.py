"""What causal language models say of tokens: statistics, and losses made of them."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from mossrlhf import functional, kernels
from mossrlhf.functional import lm_loss
from mossrlhf.models.token_path import TokenPath, hidden_states, is_whole, output_head, token_path
from mossrlhf.options import accepts
from mossrlhf.types import LossOutput, Rollout, TokenStats

IGNORED_LABEL = -100
"""The label of tokens that a language-model loss skips."""


def policy_stats(
    policy: nn.Module, batch: Rollout, temperature: float = 1.0, entropy: bool = False
) -> TokenStats:
    """Log-probability (and entropy) of every response token that counts.

    The output head is applied to the hidden states before those tokens alone, a chunk at a time,
    where the model lets it be (`token_path`).

    Args:
        policy: a causal language model: trained policy or reference.
        batch: B sequences with N tokens in their mask.
        temperature: τ the tokens were drawn at.
        entropy: whether to compute the entropy too.

    Returns:
        `TokenStats` of ``[N]``, in the order of ``batch.mask``.

    Source: ours; hidden states of one position earlier.
    """
    path = token_path(policy)
    if not path.by_hidden:
        return _stats_by_logits(policy, batch, temperature, entropy)
    given = _before_tokens(policy, batch)
    options = _options(path, temperature=temperature, entropy=entropy)
    return kernels.head_token_stats(output_head(policy), *given, **options)


def policy_loss(
    policy: nn.Module,
    batch: Rollout,
    loss_fn: Callable[..., LossOutput],
    temperature: float = 1.0,
    entropy: bool = False,
) -> LossOutput:
    """A loss that is a sum over response tokens, its gradient made along with it.

    Three matrix units at the output head, where ``loss_fn(policy_stats(...))`` takes four.

    Args:
        policy: a causal language model.
        batch: B sequences with N tokens in their mask.
        loss_fn: takes `TokenStats` of some of the N tokens and the slice they are.
        temperature: τ the tokens were drawn at.
        entropy: whether the loss wants entropies.

    Returns:
        the sum of what `loss_fn` returns.

    Source: ours.
    """
    path = token_path(policy)
    if not path.by_hidden:
        stats = _stats_by_logits(policy, batch, temperature, entropy)
        return loss_fn(stats, slice(0, len(stats.logprob)))
    given = _before_tokens(policy, batch)
    options = _options(path, temperature=temperature, entropy=entropy)
    return kernels.head_token_loss(output_head(policy), *given, loss_fn, **options)


def language_model_loss(
    policy: nn.Module, batch: Mapping[str, Tensor], fused: bool = False
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Return the summed next-token loss of labeled tokens, nats, and their number.

    Args:
        policy: a causal language model.
        batch: input_ids, attention_mask and labels, ``[B, L]`` each.
        fused: whether the gradient is made along with the loss, as in `policy_loss`.

    Source: P1 eq. 17.
    """
    path = token_path(policy)
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    if not path.by_hidden:
        output = policy(input_ids=ids, attention_mask=mask, use_cache=False)
        return lm_loss(output.logits, labels, IGNORED_LABEL)
    counted = labels[:, 1:] != IGNORED_LABEL
    given = hidden_states(policy, ids, mask)[:, :-1][counted], labels[:, 1:][counted]
    head, options = output_head(policy), _options(path, entropy=False)
    if fused:
        return kernels.head_token_loss(head, *given, _nll, **options).loss, counted.sum()
    return _nll(kernels.head_token_stats(head, *given, **options)).loss, counted.sum()


def _nll(stats: TokenStats, rows: slice = slice(None)) -> LossOutput:
    return LossOutput(-stats.logprob.sum())


def _options(path: TokenPath, **options: Any) -> dict[str, Any]:
    return dict(scale=path.scale, softcap=path.softcap, **options)


def _before_tokens(policy: nn.Module, batch: Rollout) -> tuple[Tensor, Tensor]:
    """Hidden states ``[N, D]`` one position before each token that counts, and the tokens."""
    hidden = hidden_states(policy, batch.input_ids, batch.attention_mask.long())
    rows, columns = batch.mask.nonzero(as_tuple=True)
    return hidden[rows, batch.state_index[rows, columns]], batch.response_ids[rows, columns]


def _stats_by_logits(
    policy: nn.Module, batch: Rollout, temperature: float, entropy: bool
) -> TokenStats:
    extra: dict[str, Any] = {}
    if accepts(policy, "logits_to_keep"):
        extra["logits_to_keep"] = batch.input_ids.shape[1] - int(batch.prompt_lengths.min()) + 1
    logits = policy(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        use_cache=False,
        **extra,
    ).logits
    skipped = batch.input_ids.shape[1] - logits.shape[1]
    rows, columns = batch.mask.nonzero(as_tuple=True)
    picked = logits[rows, batch.state_index[rows, columns] - skipped]
    score = functional.token_stats if is_whole() else kernels.token_stats
    return score(picked, batch.response_ids[rows, columns], temperature, entropy)
