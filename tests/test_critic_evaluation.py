"""A critic's values compared with returns that plain loops over tokens compute exactly."""

import random
import re

import numpy as np
import pytest
import torch
from launching import launch
from transformers import GenerationConfig

from mossrlhf import AdvantageEstimator, HFSampler, RewardShaper, Rollout
from mossrlhf.critic_evaluation import agreement, rank_correlation
from mossrlhf.randomness import temporary_seed
from mossrlhf.sampling import assemble

LIMIT, GAMMA, ETA, PENALTY = 8, 0.8, 0.3, 0.75
FIRST, SECOND, END = 10, 11, 2
"""Tokens of a scripted policy, and the token that ends its responses."""


class Forked:
    """Continues a prompt in one of two ways, deterministic from there on.

    Every other row takes the second way, so that the mean over two rows is exactly the value.
    Tokens depend on the whole prefix, as a language model's do. It ignores a shorter limit.
    """

    temperature = 1.0
    max_new_tokens = LIMIT

    def __call__(self, model, prompts) -> Rollout:
        drawn = [continued(list(prompt), way % 2) for way, prompt in enumerate(prompts)]
        ended = [response[-1] == END for response in drawn]
        return assemble(prompts, drawn, ended, pad_token_id=0)


def continued(read: list[int], way: int) -> list[int]:
    response = [SECOND if way else FIRST]
    while len(response) < LIMIT and response[-1] != END:
        sum_of_all = sum(read) + sum(response) + 7 * len(response)
        response.append(END if sum_of_all % 5 == 0 else FIRST + sum_of_all % 3)
    return response


def distinct_tokens(completion_ids, **columns) -> list[float]:
    """The number of different tokens, the end included: not a sum over tokens."""
    return [float(len(set(ids))) for ids in completion_ids]


def log_probabilities(model, prompt, response) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].double()
    table = logits.log_softmax(-1).tolist()
    return [table[len(prompt) + i - 1][token] for i, token in enumerate(response)]


def returned(trainer, prompt, prefix, way, gamma) -> float:
    """Σ γ^i r_i from a state on, in one of the two ways, by the definition of the rewards."""
    rest = continued(prompt + prefix, way)[: LIMIT - len(prefix)]
    response = prefix + rest
    ours, theirs = (
        log_probabilities(model, prompt, response) for model in (trainer.policy, trainer.ref_model)
    )
    total = 0.0
    for i in range(len(rest)):
        place = len(prefix) + i
        reward = -ETA * (ours[place] - theirs[place])
        if i == len(rest) - 1:
            reward += len(set(response)) - (PENALTY if response[-1] != END else 0.0)
        total += gamma**i * reward
    return total


def exact(trainer, prompt, prefix, gamma=GAMMA) -> float:
    """V(s): the mean over both ways."""
    return sum(returned(trainer, prompt, prefix, way, gamma) for way in (0, 1)) / 2


@pytest.fixture
def forked(make, policy):
    """A trainer with the scripted policy; `install` gives it a critic."""
    return make(
        sampler=Forked(),
        reward=distinct_tokens,
        ref_model=policy(5),
        shaper=RewardShaper(kl_coef=ETA, missing_eos_penalty=PENALTY),
        advantage=AdvantageEstimator(gamma=GAMMA, lam=0.5),
    )


def install(trainer, monkeypatch, error=lambda prefix: 0.0, gamma=GAMMA):
    """Let the critic return the exact value of every state, plus an error."""
    longest = trainer.max_prompt_length
    known = {tuple(ids): ids for ids in trainer._encode(trainer.prompts.dataset).ids}

    def token_values(input_ids, attention_mask, right_padded=None):
        values = torch.full(input_ids.shape, 1e6)  # makes the use of a wrong state visible
        for row, ids in enumerate(input_ids.tolist()):
            size = int(attention_mask[row].sum())
            prompt = next(p for n in range(longest) if (p := known.get(tuple(ids[: n + 1]))))
            for end in range(len(prompt), size):
                prefix = ids[len(prompt) : end]
                values[row, end - 1] = exact(trainer, prompt, prefix, gamma) + error(prefix)
        return values

    monkeypatch.setattr(trainer.critic, "token_values", token_values)


SMALL = dict(prompts=5, positions=3, continuations=2)


def test_exact_critic_has_no_error(forked, monkeypatch):
    install(forked, monkeypatch)
    found = forked.evaluate_critic(**SMALL)
    assert found.overall.mean_absolute_error == pytest.approx(0, abs=1e-5)
    assert found.overall.rank_correlation == pytest.approx(1)
    assert found.overall.explained_variance == pytest.approx(1)
    assert len(found.values) == found.overall.states > 8
    assert found.returns.std() > 0.2
    assert found.overall.noise > 0
    assert (found.gamma, found.continuations) == (GAMMA, 2)
    assert set(found.positions.tolist()) > {0, 1, 2, 3}
    for number, part in enumerate(found.by_position):
        at = found.positions * 3 // found.lengths == number
        assert part.states == int(at.sum()) > 0
        assert (part.start, part.end) == (number / 3, (number + 1) / 3)


def test_error_of_a_shifted_critic_is_the_shift(forked, monkeypatch):
    install(forked, monkeypatch, lambda prefix: -0.5)
    overall = forked.evaluate_critic(**SMALL).overall
    assert overall.mean_absolute_error == pytest.approx(0.5, abs=1e-5)
    assert overall.mean_error == pytest.approx(-0.5, abs=1e-5)
    assert overall.rank_correlation == pytest.approx(1)
    assert overall.explained_variance == pytest.approx(1)


def test_errors_are_reported_by_position(forked, monkeypatch):
    """An error that grows with the position is reported where it is."""
    install(forked, monkeypatch, lambda prefix: float(len(prefix)))
    found = forked.evaluate_critic(**SMALL)
    for number, part in enumerate(found.by_position):
        at = found.positions * 3 // found.lengths == number
        assert part.mean_error == pytest.approx(float(found.positions[at].double().mean()))


def test_gamma_replaces_the_estimator_s(forked, monkeypatch):
    install(forked, monkeypatch, gamma=1.0)
    assert forked.evaluate_critic(**SMALL).overall.mean_absolute_error > 0.05
    found = forked.evaluate_critic(**SMALL, gamma=1.0)
    assert found.overall.mean_absolute_error == pytest.approx(0, abs=1e-5)
    forked.advantage = lambda rewards, values, mask: None
    with pytest.raises(
        ValueError, match=r"gamma: got None, and function .*evaluate_critic\(gamma=\)"
    ):
        forked.evaluate_critic(**SMALL)


def test_score_after_end_is_discounted_by_one_more_step(forked, monkeypatch):
    forked.shaper.score_after_end = True
    install(forked, monkeypatch)
    found = forked.evaluate_critic(**SMALL)
    expected = forked.evaluate_critic(**SMALL, gamma=1.0).returns  # where a step costs nothing
    forked.shaper.score_after_end = False
    assert torch.allclose(forked.evaluate_critic(**SMALL, gamma=1.0).returns, expected)
    at_once = forked.evaluate_critic(**SMALL)
    assert not torch.allclose(at_once.returns, found.returns)


def test_truncated_continuation_ends_in_the_bootstrapped_value(make, policy):
    """With `bootstrap_truncated` the target includes γ^n V(s_n) beyond the limit."""
    trainer = make(
        reward=lambda completion_ids, **columns: [0.0] * len(completion_ids),
        shaper=RewardShaper(kl_coef=None),
        advantage=AdvantageEstimator(gamma=GAMMA),
        args=dict(bootstrap_truncated=True),
        generation_config=GenerationConfig(max_new_tokens=4, do_sample=False),
    )
    torch.nn.init.constant_(trainer.critic.score.weight, 0.5)
    found = trainer.evaluate_critic(prompts=6, positions=4, continuations=2)
    rollout = trainer.annotate(trainer.respond([trainer.prompts.dataset[i] for i in range(40)]))
    after = {record: float(rollout.bootstrap[record]) for record in found.prompts.tolist()}
    assert any(after.values())
    expected = [
        GAMMA ** (n - t) * after[record]
        for record, t, n in zip(
            found.prompts.tolist(), found.positions.tolist(), found.lengths.tolist(), strict=True
        )
    ]
    assert found.returns.tolist() == pytest.approx(expected, abs=1e-5)


def test_greedy_policy_has_no_noise(make, policy):
    """Every continuation is the response itself; its returns are those of `estimate`."""
    trainer = make(
        reward=distinct_tokens,
        ref_model=policy(5),
        generation_config=GenerationConfig(max_new_tokens=LIMIT, do_sample=False),
        advantage=AdvantageEstimator(gamma=GAMMA, lam=1.0),
    )
    found = trainer.evaluate_critic(prompts=40, positions=LIMIT, continuations=2)
    assert found.overall.noise == 0
    rollout = trainer.respond([trainer.prompts.dataset[i] for i in range(40)])
    rollout = trainer.estimate(trainer.annotate(trainer.score(rollout)))
    at = found.prompts, found.positions
    assert torch.allclose(found.values, rollout.values[at].double(), atol=1e-5)
    assert torch.allclose(found.returns, rollout.returns[at].double(), atol=1e-5)
    assert len(found.values) == int(rollout.mask.sum())


def test_evaluation_changes_nothing_of_the_run(make, parameters):
    def draws(completion_ids, **columns):
        return [np.random.rand() + float(torch.rand(())) for _ in completion_ids]

    trainer = make(reward=draws, shaper=RewardShaper(normalize=True))
    trainer.train()

    def state():
        moments = trainer.shaper.state_dict()
        order, torchs = trainer.generator.get_state().tolist(), torch.get_rng_state().tolist()
        return [
            moments, order, torchs, np.random.get_state()[1].tolist(),
            trainer.prompts.state_dict(), list(trainer.history), parameters(trainer.model).tolist(),
            trainer.sampler.max_new_tokens, sorted(p.name for p in trainer.output_dir.iterdir()),
        ]  # fmt: skip

    before = state()
    first = trainer.evaluate_critic(prompts=3, continuations=2)
    assert state() == before
    again = trainer.evaluate_critic(prompts=3, continuations=2)
    assert torch.equal(first.returns, again.returns)
    other = trainer.evaluate_critic(prompts=3, continuations=2, seed=1)
    assert first.returns.tolist() != other.returns.tolist()
    assert state() == before


def test_own_randomness_restores_python_s_generator():
    """Not part of the test above: the checker of annotations uses this generator too."""
    before = random.getstate()
    drawn = []
    for _ in range(2):
        with temporary_seed(3):
            drawn.append(random.random())
        assert random.getstate() == before
    assert drawn[0] == drawn[1]


def test_evaluation_does_not_update_the_moments(make):
    """Scores are normalized by the moments of the last iteration, whatever is evaluated."""
    trainer = make(reward=distinct_tokens, shaper=RewardShaper(kl_coef=None, normalize=True))
    trainer.shaper.moments.update(torch.tensor([2.0, 4.0, 9.0]))
    mean, std = trainer.shaper.moments.mean, trainer.shaper.moments.std
    normalized = trainer.evaluate_critic(prompts=4, continuations=3)
    trainer.shaper = RewardShaper(kl_coef=None)
    plain = trainer.evaluate_critic(prompts=4, continuations=3)
    assert torch.allclose(normalized.returns, (plain.returns - mean) / std, atol=1e-5)


def test_noise_is_the_standard_error_of_the_mean(forked):
    """Of two numbers a and b: half their distance."""
    found = forked.evaluate_critic(**SMALL)
    prompts = forked._encode(forked.prompts.dataset).ids
    first = [continued(prompts[i], 0) for i in found.prompts.tolist()]
    expected = []
    for place, record in enumerate(found.prompts.tolist()):
        prefix = first[place][: found.positions[place]]
        a, b = (returned(forked, prompts[record], prefix, way, GAMMA) for way in (0, 1))
        expected.append(abs(a - b) / 2)
    assert found.standard_errors.tolist() == pytest.approx(expected, abs=1e-5)
    assert found.overall.noise == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_critics_that_cannot_be_evaluated_are_refused(make):
    with pytest.raises(ValueError, match=r"critic: this trainer has none \(critic=False\)"):
        make("none", critic=False).evaluate_critic()
    counting = GenerationConfig(max_new_tokens=8, min_new_tokens=2)
    with pytest.raises(ValueError, match=r"sampler: .*'min_new_tokens': 2"):
        make("counting", generation_config=counting).evaluate_critic()
    trainer = make("plain")
    for name, value in (("prompts", 0), ("positions", 0), ("continuations", 1), ("gamma", 1.5)):
        with pytest.raises(ValueError, match=rf"evaluate_critic\({name}=\)"):
            trainer.evaluate_critic(**{name: value})

    class Tool(HFSampler):
        def __call__(self, model, prompts):
            rollout = super().__call__(model, prompts)
            rollout.mask[:, 0] = False
            return rollout

    config = GenerationConfig(max_new_tokens=8)
    holed = make("holes", sampler=Tool.for_tokenizer(trainer.processing_class, config))
    with pytest.raises(ValueError, match="sampler: Tool returned responses with holes"):
        holed.evaluate_critic(prompts=2, continuations=2)


def test_two_processes_equal_one(tmp_path):
    one, two = (launch(tmp_path, n, "critic_evaluation.py") for n in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-9), name


def test_rank_correlation_by_hand():
    x = torch.tensor([1.0, 5.0, 2.0, 2.0])
    ranks = {1.0: 1.0, 5.0: 4.0, 2.0: 2.5}
    y = torch.tensor([10.0, -1.0, 0.0, 3.0])
    expected = np.corrcoef([ranks[v] for v in x.tolist()], [4.0, 1.0, 2.0, 3.0])[0, 1]
    assert rank_correlation(x, y) == pytest.approx(expected)
    assert rank_correlation(x, x.exp()) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    assert np.isnan(rank_correlation(x, torch.ones(4)))


def test_agreement_by_hand_and_of_no_states():
    v, g = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([2.0, 2.0, 5.0]).double()
    found = agreement(v, g, torch.tensor([0.1, 0.2, 0.3]).double(), 0.25, 0.5)
    off = np.array([1.0, 0.0, 1.0])
    expected = 1 - off.var() / np.array([2.0, 2.0, 5.0]).var()
    assert found.mean_absolute_error == pytest.approx(2 / 3)
    assert found.mean_error == pytest.approx(-2 / 3)
    assert found.explained_variance == pytest.approx(expected)
    assert found.noise == pytest.approx(0.2)
    nothing = agreement(*[torch.zeros(0).double()] * 3, 0.0, 1.0)
    assert nothing.states == 0
    assert np.isnan(nothing.mean_absolute_error)
    assert np.isnan(agreement(v, torch.full((3,), 0.1).double(), v, 0.0, 1.0).explained_variance)


def test_example_of_the_docs_runs(make, root, capsys):
    names = {}
    (block,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "critic.md").read_text(), re.S)
    small = re.sub("continuations=16", "continuations=2", re.sub("prompts=64", "prompts=8", block))
    assert small != block
    exec(small, names)
    metrics = names["check"](make(reward=distinct_tokens))
    assert "critic_eval/mean_absolute_error" in metrics
    assert "critic_eval/mean_absolute_error/1" in metrics
    assert "rank corr." in capsys.readouterr().out


def test_evaluation_prints_a_table_and_returns_metrics(make):
    found = make(reward=distinct_tokens).evaluate_critic(prompts=4, continuations=2)
    metrics = found.metrics()
    assert metrics["critic_eval/mean_absolute_error"] == found.overall.mean_absolute_error
    assert metrics["critic_eval/states/1"] == found.by_position[0].states
    assert all(np.isfinite(value) for value in metrics.values())
    lines = str(found).splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) <= 80
    assert f"{found.overall.mean_absolute_error:.3f}" in lines[1]
