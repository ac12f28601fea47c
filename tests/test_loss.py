"""PPO-max's losses: every switch on and off, against a loop over tokens; shares add up."""

import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from mossrlhf.loss import PPOMaxLoss
from mossrlhf.types import Rollout, TokenStats

SIZE, LENGTH = 7, 5


@pytest.fixture
def batch():
    """Seven responses with holes; wherever the mask is off stands NaN. float64."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([5, 1, 3, 4, 2, 5, 3])
    mask = torch.arange(LENGTH) < lengths[:, None]
    mask &= torch.rand(SIZE, LENGTH, generator=generator) < 0.8

    def noise(scale=1.0):
        x = scale * torch.randn(SIZE, LENGTH, generator=generator, dtype=torch.float64)
        return torch.where(mask, x, torch.nan)

    old = noise() - 2
    return Rollout(
        input_ids=torch.zeros(SIZE, LENGTH + 2, dtype=torch.long),
        prompt_lengths=torch.full((SIZE,), 2),
        response_lengths=lengths,
        truncated=torch.zeros(SIZE, dtype=torch.bool),
        mask=mask,
        logprobs=old,
        ref_logprobs=old + noise(0.5),
        entropies=noise().abs(),
        values=noise(),
        advantages=noise(),
        returns=noise(),
    )


@pytest.fixture
def weighted(batch):
    """The same with a weight for each token, some of them zero."""
    weights = torch.rand(SIZE, LENGTH, dtype=torch.float64).round(decimals=1)
    return replace(batch, weights=torch.where(torch.rand(SIZE, LENGTH) < 0.2, 0.0, weights))


@dataclass
class Model:
    """What the models say now of each token, ``[B, T]``: leaves to differentiate by."""

    logprob: torch.Tensor
    entropy: torch.Tensor
    value: torch.Tensor

    @classmethod
    def near(cls, batch):
        generator = torch.Generator().manual_seed(4)
        shift = torch.randn(3, SIZE, LENGTH, generator=generator, dtype=torch.float64)
        leaves = batch.logprobs + 0.4 * shift[0], shift[1].abs(), batch.values + 0.4 * shift[2]
        return cls(*(torch.nan_to_num(leaf).requires_grad_() for leaf in leaves))

    def stats(self, mask, rows=slice(None)):
        return TokenStats(self.logprob[rows][mask], self.entropy[rows][mask])

    def gradients(self):
        grads = [leaf.grad for leaf in (self.logprob, self.entropy, self.value)]
        for leaf in (self.logprob, self.entropy, self.value):
            leaf.grad = None
        return grads


def tokens(batch):
    return batch.mask.nonzero().tolist()


def by_loop(loss, batch, model, clip=(0.2, 0.2), entropy_sign=1.0):
    """The policy loss written as a loop over tokens; `clip` None for no clip."""
    total, weight = 0.0, 0.0
    for b, t in tokens(batch):
        w = batch.token_weights[b, t].item()
        new, a = model.logprob[b, t].item(), batch.advantages[b, t].item()
        ref = batch.ref_logprobs[b, t].item()
        ratio = math.exp(new - (ref if loss.reference_ratio else batch.logprobs[b, t].item()))
        gain = ratio * a
        if clip is not None:
            gain = min(gain, min(max(ratio, 1 - clip[0]), 1 + clip[1]) * a)
        if loss.dual_clip is not None and a < 0:
            gain = max(gain, loss.dual_clip * a)
        gain += (loss.entropy_coef or 0.0) * entropy_sign * model.entropy[b, t].item()
        gain -= (loss.kl_loss_coef or 0.0) * (new - ref) ** 2 / 2
        total, weight = total - w * gain, weight + w
    return total / weight


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize(
    ("options", "clip"),
    [
        ({}, (0.2, 0.2)),
        ({"policy_clip": None}, None),
        ({"policy_clip": 0.1}, (0.1, 0.1)),
        ({"policy_clip": (0.2, 0.28)}, (0.2, 0.28)),
        ({"dual_clip": 1.1}, (0.2, 0.2)),
        ({"reference_ratio": True}, (0.2, 0.2)),
        ({"entropy_coef": 0.01}, (0.2, 0.2)),
        ({"kl_loss_coef": 0.3}, (0.2, 0.2)),
    ],
)
def test_policy_switches(batch, weighted, options, clip, with_weights):
    batch = weighted if with_weights else batch
    model, loss = Model.near(batch), PPOMaxLoss(**options)
    got = loss.policy(model.stats(batch.mask), batch)
    expected = by_loop(loss, batch, model, clip)
    assert got.loss.item() == pytest.approx(expected, rel=1e-12)
    assert got.stats["policy/loss"].item() == pytest.approx(expected, rel=1e-12)
    off = PPOMaxLoss().policy(model.stats(batch.mask), batch).loss
    assert bool(options) == (abs(got.loss.item() - off.item()) > 1e-6)  # the switch does something


@pytest.mark.parametrize("cap", [1.0, 1.3])
def test_truncated_importance_weights(batch, cap):
    """Each token's loss by min(π_old/π_sampler, C); without the sampler's word, or a cap, by 1."""
    drift = 0.5 * torch.randn(SIZE, LENGTH, dtype=torch.float64)
    drawn = replace(batch, sampler_logprobs=batch.logprobs - drift)
    factor = torch.where(batch.mask, drift.exp().clamp(max=cap), 0.0)
    model = Model.near(batch)
    stats = model.stats(batch.mask)
    got = PPOMaxLoss(sampler_ratio_cap=cap).policy(stats, drawn).loss
    # The factor belongs to the loss alone: the mean is still over tokens.
    as_weights = PPOMaxLoss().policy(
        stats, replace(batch, weights=factor), batch.mask.sum().double()
    )
    torch.testing.assert_close(got, as_weights.loss)
    plain = PPOMaxLoss().policy(stats, batch).loss
    assert got != plain
    assert PPOMaxLoss().policy(stats, drawn).loss == plain
    assert PPOMaxLoss(sampler_ratio_cap=cap).policy(stats, batch).loss == plain


def test_policy_statistics(batch):
    model = Model.near(batch)
    stats = PPOMaxLoss(policy_clip=(0.2, 0.4)).policy(model.stats(batch.mask), batch).stats
    ratios, kls, clipped = [], [], []
    for b, t in tokens(batch):
        log_ratio = (model.logprob[b, t] - batch.logprobs[b, t]).item()
        ratio = math.exp(log_ratio)
        ratios.append(ratio)
        kls.append(ratio - 1 - log_ratio)  # k3 of KL(π_old‖π), sampled from π_old
        advantage = batch.advantages[b, t]
        clipped.append((advantage > 0 and ratio > 1.4) or (advantage < 0 and ratio < 0.8))
    count = len(ratios)
    assert stats["policy/ratio"].item() == pytest.approx(sum(ratios) / count)
    assert stats["policy/approx_kl_per_token"].item() == pytest.approx(sum(kls) / count)
    assert stats["policy/clip_fraction"].item() == pytest.approx(sum(clipped) / count)
    assert 0 < sum(clipped) < count
    assert "policy/clip_fraction" not in (
        PPOMaxLoss(policy_clip=None).policy(model.stats(batch.mask), batch).stats
    )
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize(
    ("direction", "advantage", "share"),
    [(1, 1.0, 1), (1, 0.0, 0), (1, -1.0, 0), (-1, 1.0, 0), (-1, 0.0, 0), (-1, -1.0, 1)],
)
@pytest.mark.parametrize("beyond", [True, False])
def test_a_clip_counts_where_it_stops_something(batch, direction, advantage, share, beyond):
    """Nothing is stopped of an advantage of zero, nor at the bound itself."""
    ratio = torch.tensor(0.1 * direction, dtype=torch.float64).exp()
    at = abs(ratio.item() - 1)  # exact, as both are within a factor of two
    loss = PPOMaxLoss(policy_clip=at / (1 + beyond), value_clip=at / (1 + beyond))
    flat = torch.full_like(batch.advantages, advantage)
    stats = TokenStats(batch.logprobs[batch.mask] * 0 + ratio.log())
    still = replace(batch, advantages=flat, logprobs=torch.zeros_like(batch.logprobs))
    assert stats.logprob.exp().eq(ratio).all()
    got = loss.policy(stats, still).stats["policy/clip_fraction"].item()
    assert got == pytest.approx(share if beyond else 0)
    moved = replace(batch, values=torch.zeros_like(batch.values))
    value = torch.full_like(stats.logprob, at * direction)
    critic = loss.critic(value, moved).stats["critic/clip_fraction"].item()
    assert critic == pytest.approx(1 if beyond else 0)


@pytest.mark.parametrize("wrong", [None, 0.0, torch.tensor(0.0), torch.zeros(1)])
@pytest.mark.parametrize("method", ["policy_loss", "value_loss"])
def test_losses_are_per_token(batch, method, wrong):
    """What would be broadcast over the tokens, or is no tensor, is refused."""
    loss = type("Wrong", (PPOMaxLoss,), {method: lambda self, *args: wrong})()
    model = Model.near(batch)
    policy = partial(loss.policy, model.stats(batch.mask), batch)
    critic = partial(loss.critic, model.value[batch.mask], batch)
    with pytest.raises(ValueError, match=rf"{method}: returned .*, expected one number per token"):
        (policy if method == "policy_loss" else critic)()


def test_statistics_keep_no_graph(batch):
    model = Model.near(batch)
    loss = PPOMaxLoss(ptx_coef=1.0)
    outputs = [
        loss.policy(model.stats(batch.mask), batch),
        loss.critic(model.value[batch.mask], batch),
        loss.ptx(model.value.sum(), torch.tensor(3)),
    ]
    assert all(output.loss.requires_grad for output in outputs)
    assert not any(value.requires_grad for output in outputs for value in output.stats.values())


def test_on_policy_the_ratio_is_one(batch):
    stats = TokenStats(batch.logprobs[batch.mask])
    got = PPOMaxLoss().policy(stats, batch)
    assert got.loss.item() == pytest.approx(-batch.advantages[batch.mask].mean().item())
    assert got.stats["policy/ratio"].item() == 1.0
    assert got.stats["policy/clip_fraction"].item() == 0.0


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("coef", [1.0, 0.1])
def test_value_loss(weighted, clip, coef):
    model = Model.near(weighted)
    loss = PPOMaxLoss(value_clip=clip, value_coef=coef)
    total = moved = weight = 0.0
    for b, t in tokens(weighted):
        w, v = weighted.token_weights[b, t].item(), model.value[b, t].item()
        old, target = weighted.values[b, t].item(), weighted.returns[b, t].item()
        squares = (v - target) ** 2
        if clip is not None:
            squares = max(squares, (min(max(v, old - clip), old + clip) - target) ** 2)
            moved += w * (abs(v - old) > clip)
        total, weight = total + w * squares / 2, weight + w
    got = loss.critic(model.value[weighted.mask], weighted)
    assert got.loss.item() == pytest.approx(coef * total / weight, rel=1e-12)
    assert got.stats["critic/loss"].item() == pytest.approx(total / weight, rel=1e-12)
    if clip is None:
        assert set(got.stats) == {"critic/loss"}
    else:
        assert got.stats["critic/clip_fraction"].item() == pytest.approx(moved / weight)
        assert 0 < moved < weight


def test_value_loss_over_states_after_the_end(batch):
    """With end states the critic has one state more a finished response, the policy none."""
    widened = batch.with_end_states(limit=LENGTH)
    values = torch.ones(SIZE, LENGTH + 1, dtype=torch.float64)
    values[widened.states & ~widened.mask] = 3.0
    blank = torch.zeros(SIZE, LENGTH + 1)
    annotated = replace(widened, returns=blank, values=blank)
    got = PPOMaxLoss(value_clip=None).critic(values[widened.states], annotated)
    # Five of the seven are shorter than can be: ½·3² at five states, ½·1² at every token.
    tokens = int(batch.mask.sum())
    assert got.loss.item() == pytest.approx((tokens * 0.5 + 5 * 4.5) / (tokens + 5))


class TestPrepare:
    """Advantage normalization and clipping within the minibatch, and the side of the entropy."""

    def test_off(self, batch):
        prepared = PPOMaxLoss().prepare(batch)
        assert prepared.advantages is batch.advantages
        assert not prepared.extra

    def test_normalization(self, batch):
        raw = batch.advantages[batch.mask].numpy()
        got = PPOMaxLoss(advantage_norm=True).prepare(batch)
        expected = torch.from_numpy((raw - raw.mean()) / raw.std())
        torch.testing.assert_close(got.advantages[batch.mask], expected)

    def test_normalization_over_all_processes(self, batch):
        """Beside a process of four advantages, all of them 7: their count, sum and squares."""
        both = torch.cat([batch.advantages[batch.mask], torch.full((4,), 7.0)])
        squares = 4 * (7 - both.mean()) ** 2
        others = iter([torch.tensor(4.0), torch.tensor(28.0), squares])
        got = PPOMaxLoss(advantage_norm=True).prepare(
            batch, reduce=lambda tensor: tensor + next(others)
        )
        expected = (batch.advantages - both.mean()) / both.std(correction=0)
        torch.testing.assert_close(got.advantages[batch.mask], expected[batch.mask])

    def test_clip_alone(self, batch):
        got = PPOMaxLoss(advantage_clip=0.5).prepare(batch).advantages[batch.mask]
        torch.testing.assert_close(got, batch.advantages[batch.mask].clamp(-0.5, 0.5))

    def test_clip_comes_after_normalization(self, batch):
        loss = PPOMaxLoss(advantage_norm=True, advantage_clip=0.5)
        normalized = PPOMaxLoss(advantage_norm=True).prepare(batch).advantages
        torch.testing.assert_close(loss.prepare(batch).advantages, normalized.clamp(-0.5, 0.5))

    def test_without_advantages_there_is_nothing_to_do(self, batch):
        """Critic pre-training without a policy step."""
        bare = replace(batch, advantages=None)
        assert PPOMaxLoss(advantage_norm=True, advantage_clip=1.0).prepare(bare).advantages is None

    @pytest.mark.parametrize(("above", "sign"), [(0.1, 1.0), (-0.1, -1.0)])
    def test_entropy_is_pulled_towards_its_target(self, weighted, above, sign):
        """The mean counts weights; its gradient is that of coef·|H̄ − δ_H|."""
        weights = weighted.token_weights[weighted.mask]
        mean = (weighted.entropies[weighted.mask] * weights).sum() / weights.sum()
        loss = PPOMaxLoss(entropy_coef=0.01, entropy_target=mean.item() + above)
        prepared = loss.prepare(weighted)
        model = Model.near(weighted)
        got = loss.policy(model.stats(weighted.mask), prepared)
        expected = by_loop(loss, weighted, model, entropy_sign=sign)
        assert got.loss.item() == pytest.approx(expected, rel=1e-12)
        got.loss.backward()
        pull = model.entropy.grad[weighted.mask]
        torch.testing.assert_close(pull, -0.01 * sign * weights / weights.sum())

    def test_entropy_on_its_target_is_left_alone(self, batch):
        even = replace(batch, entropies=torch.full_like(batch.entropies, 0.5))
        loss = PPOMaxLoss(entropy_coef=0.01, entropy_target=0.5)
        stats = Model.near(batch).stats(batch.mask)
        got = loss.policy(stats, loss.prepare(even)).loss
        torch.testing.assert_close(got, PPOMaxLoss().policy(stats, batch).loss, rtol=1e-12, atol=0)

    def test_mean_entropy_is_that_of_all_processes(self, batch):
        """Above the target here, below it together with a process of 100 tokens at 0.1 nats."""
        loss = PPOMaxLoss(entropy_coef=0.01, entropy_target=0.4)
        others = iter([torch.tensor(10.0), torch.tensor(100.0)])
        together = loss.prepare(batch, reduce=lambda tensor: tensor + next(others))
        assert next(others, None) is None
        assert loss.prepare(batch).extra["entropy_side"].tolist() == [-1.0] * SIZE
        assert together.extra["entropy_side"].tolist() == [1.0] * SIZE

    def test_what_is_missing_is_named(self, batch):
        loss = PPOMaxLoss(entropy_coef=0.01, entropy_target=1.0)
        with pytest.raises(ValueError, match=r"batch\.entropies: got None"):
            loss.prepare(replace(batch, entropies=None))
        with pytest.raises(ValueError, match=r"call prepare\(minibatch\) before splitting"):
            loss.policy(Model.near(batch).stats(batch.mask), batch)


def test_ptx_is_the_mean_over_tokens_times_its_factor():
    summed, counted = torch.tensor(12.0), torch.tensor(4)
    assert PPOMaxLoss().ptx(summed, counted).loss.item() == 0.0  # off
    got = PPOMaxLoss(ptx_coef=0.5).ptx(summed, counted)
    assert (got.loss.item(), got.stats["ptx/loss"].item()) == (1.5, 3.0)
    share = PPOMaxLoss(ptx_coef=0.5).ptx(summed, counted, torch.tensor(6.0))
    assert (share.loss.item(), share.stats["ptx/loss"].item()) == (1.0, 2.0)


FULL = PPOMaxLoss(
    policy_clip=(0.2, 0.3),
    dual_clip=2.0,
    value_coef=0.7,
    entropy_coef=0.01,
    entropy_target=1.0,
    kl_loss_coef=0.1,
    advantage_norm=True,
    advantage_clip=1.0,
)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("loss", [PPOMaxLoss(), FULL], ids=["default", "everything on"])
def test_shares_add_up(weighted, loss, size):
    """Loss, gradient and statistics of micro-batches under one denominator are the whole's."""
    model = Model.near(weighted)
    whole = loss.prepare(weighted)
    at_once = loss(model.stats(whole.mask), whole, model.value[whole.mask])
    at_once.loss.backward()
    expected = model.gradients()

    denominator = whole.token_weights.sum()
    total, stats = torch.zeros((), dtype=torch.float64), {}
    for rows in torch.arange(SIZE).split(size):
        part = whole.select(rows)
        mask = torch.nn.functional.pad(part.mask, (0, LENGTH - part.mask.shape[1]))
        for share in (
            loss.policy(model.stats(mask, rows), part, denominator),
            loss.critic(model.value[rows][mask], part, denominator),
        ):
            share.loss.backward()
            total += share.loss.detach()
            for name, value in share.stats.items():
                stats[name] = stats.get(name, 0.0) + value
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(total, at_once.loss.detach(), **exact)
    torch.testing.assert_close(model.gradients(), expected, **exact)
    assert stats.keys() == at_once.stats.keys()
    for name, value in stats.items():
        torch.testing.assert_close(value, at_once.stats[name], msg=name, **exact)


def test_call_without_a_critic_is_the_policy_alone(batch):
    model = Model.near(batch)
    got = PPOMaxLoss()(model.stats(batch.mask), batch)
    assert got.loss == PPOMaxLoss().policy(model.stats(batch.mask), batch).loss
    assert not any(name.startswith("critic") for name in got.stats)


@pytest.mark.parametrize("spoiled", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("role", "fields"),
    [
        ("policy", ("advantages", "logprobs", "ref_logprobs", "sampler_logprobs")),
        ("critic", ("values", "returns")),
    ],
)
def test_what_stands_at_weight_zero_spoils_nothing(batch, role, fields, spoiled):
    """A token of weight 0 may be anything: in the loss, the statistics and the gradient."""
    b, t = tokens(batch)[0]
    weights = batch.mask.double()
    weights[b, t] = 0.0
    clean = replace(batch, weights=weights, sampler_logprobs=batch.logprobs - 0.1)
    broken = {name: getattr(clean, name).clone() for name in fields}
    for value in broken.values():
        value[b, t] = spoiled
    loss = PPOMaxLoss(kl_loss_coef=0.1, sampler_ratio_cap=2.0)

    def run(minibatch):
        model = Model.near(batch)
        said = model.stats(batch.mask) if role == "policy" else model.value[batch.mask]
        got = getattr(loss, role)(said, minibatch)
        got.loss.backward()
        leaf = model.logprob if role == "policy" else model.value
        return torch.stack([got.loss.detach(), *got.stats.values()]), leaf.grad

    for ours, theirs in zip(run(replace(clean, **broken)), run(clean), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_a_micro_batch_of_no_weight_adds_nothing(batch, role):
    """What a process adds when others have more micro-batches than it."""
    empty = replace(batch, weights=torch.zeros(SIZE, LENGTH))
    model = Model.near(batch)
    said = model.stats(batch.mask) if role == "policy" else model.value[batch.mask]
    got = getattr(PPOMaxLoss(), role)(said, empty, torch.tensor(10.0))
    got.loss.backward()
    leaf = model.logprob if role == "policy" else model.value
    assert got.loss.item() == 0.0
    assert not leaf.grad.any()


def test_another_algorithm_overrides_the_policy_loss_alone(batch):
    class Reinforce(PPOMaxLoss):
        def policy_loss(self, logprob, old_logprob, advantage, entropy=None):
            return -logprob * advantage

    model = Model.near(batch)
    got = Reinforce(kl_loss_coef=0.1).policy(model.stats(batch.mask), batch)
    plain = -(model.logprob * batch.advantages)[batch.mask].mean()
    penalty = 0.05 * (model.logprob - batch.ref_logprobs)[batch.mask].square().mean()
    torch.testing.assert_close(got.loss, plain + penalty)
    assert "policy/ratio" in got.stats


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_clip": 0.0}, r"\(policy_clip=\): got 0.0"),
        ({"policy_clip": 1.5}, r"\(policy_clip=\): got 1.5"),
        ({"policy_clip": (0.2, -0.1)}, r"\(policy_clip=\): got -0.1"),
        ({"dual_clip": 1.0}, r"\(dual_clip=\): got 1.0, expected a number in \(1, inf\]"),
        ({"value_clip": 0.0}, r"\(value_clip=\)"),
        ({"advantage_clip": -1.0}, r"\(advantage_clip=\)"),
        ({"sampler_ratio_cap": 0.5}, r"\(sampler_ratio_cap=\): got 0.5"),
        ({"value_coef": -1.0}, r"\(value_coef=\)"),
        ({"entropy_coef": -1.0}, r"\(entropy_coef=\)"),
        ({"kl_loss_coef": -1.0}, r"\(kl_loss_coef=\)"),
        ({"ptx_coef": -1.0}, r"\(ptx_coef=\)"),
        ({"entropy_target": 2.0}, "set entropy_coef"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        PPOMaxLoss(**options)


def test_names_of_other_libraries_are_recognized():
    with pytest.raises(TypeError, match=r"'cliprange'; here that is PPOMaxLoss\(policy_clip=\)"):
        PPOMaxLoss(cliprange=0.2)


@pytest.mark.parametrize("field", ["logprobs", "advantages"])
def test_what_the_policy_needs_is_named(batch, field):
    with pytest.raises(ValueError, match=rf"batch\.{field}: got None"):
        PPOMaxLoss().policy(Model.near(batch).stats(batch.mask), replace(batch, **{field: None}))


@pytest.mark.parametrize("options", [{"reference_ratio": True}, {"kl_loss_coef": 0.1}])
def test_what_needs_the_reference_says_so(batch, options):
    bare = replace(batch, ref_logprobs=None)
    with pytest.raises(ValueError, match=r"batch\.ref_logprobs: got None"):
        PPOMaxLoss(**options).policy(Model.near(batch).stats(batch.mask), bare)


def test_an_entropy_bonus_needs_the_entropy(batch):
    stats = TokenStats(Model.near(batch).logprob[batch.mask])
    with pytest.raises(ValueError, match=r"stats\.entropy: got None"):
        PPOMaxLoss(entropy_coef=0.01).policy(stats, batch)


@pytest.mark.parametrize("field", ["values", "returns"])
def test_what_the_critic_needs_is_named(batch, field):
    with pytest.raises(ValueError, match=rf"batch\.{field}: got None"):
        PPOMaxLoss().critic(batch.values[batch.mask], replace(batch, **{field: None}))


def test_defaults_clip_as_documented(weighted):
    """Surrogate and value clip are 0.2 without being asked for."""
    model = Model.near(weighted)
    default, named = PPOMaxLoss(), PPOMaxLoss(policy_clip=0.2, value_clip=0.2, value_coef=1.0)
    stats, value = model.stats(weighted.mask), model.value[weighted.mask]
    assert default.policy(stats, weighted).loss == named.policy(stats, weighted).loss
    assert default.critic(value, weighted).loss == named.critic(value, weighted).loss


@pytest.mark.parametrize(
    "option",
    [
        {"policy_clip": 0.0},
        {"policy_clip": (0.2, 0.0)},
        {"policy_clip": (0.0, 0.2)},
        {"dual_clip": 1.0},
        {"value_clip": 0.0},
        {"advantage_clip": 0.0},
    ],
    ids=str,
)
def test_bounds_themselves_are_refused(option):
    """A clip of zero would let nothing through; dual clipping at 1 would undo the surrogate."""
    with pytest.raises(ValueError, match="expected a number in"):
        PPOMaxLoss(**option)


@pytest.mark.parametrize(("name", "bound"), [("sampler_ratio_cap", 1.0), ("value_coef", 0.0)])
def test_bounds_that_are_allowed(name, bound):
    assert getattr(PPOMaxLoss(**{name: bound}), name) == bound
