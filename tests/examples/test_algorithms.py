"""`examples/algorithms/`: each is its paper's equation, is short, and learns in the toy world."""

import ast
import re
import sys
import tokenize
from importlib import import_module
from statistics import mean, pstdev, stdev

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from mossrlhf import Rollout, TokenStats, ToyWorld, Trainer

NAMES = (
    "adaptive_kl",
    "arithmetic",
    "dr_grpo",
    "grpo",
    "reference_ratio",
    "reinforce_plus_plus",
    "rloo",
    "vc_ppo",
)
B, T = 16, 6
OUTSIDE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


@pytest.fixture(scope="module")
def load(root):
    """Imports a file of the folder, which finds its neighbors as it does when run as a script."""
    names = ("toy", *NAMES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "examples" / "algorithms")
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield import_module
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def stages(load):
    """Makes each stage once."""
    made = {}

    def of(module):
        make = module.TOY.get("stage", load("toy").dialogues)
        if make not in made:
            made[make] = make(0)
        return made[make]

    return of


@pytest.fixture
def learn(load, stages, tmp_path):
    """Trains an algorithm as its own command line does."""

    def run(name, **options):
        module = load(name)
        chosen = {k: v for k, v in module.TOY.items() if k != "stage"}
        folder = {"output_dir": str(tmp_path / name)}
        return load("toy").train(stages(module), **{**chosen, **folder, **options})

    return run


def code_lines(path):
    """Lines that hold code: no comments, no docstrings, nothing empty."""
    text = path.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented) and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    with path.open("rb") as file:
        tokens = [t for t in tokenize.tokenize(file.readline) if t.string and t.start[0]]
    lines = {
        line
        for token in tokens
        if token.type not in OUTSIDE
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(lines - docs)


def test_lines_of_code_are_counted(tmp_path):
    path = tmp_path / "some.py"
    head = '"""A\n\nb."""\n\nx = 1  # c\n# d\n\n\n'
    path.write_text(head + 'def f():\n    """E."""\n    return (\n1)\n')
    assert code_lines(path) == 4


def test_each_algorithm_is_at_most_40_lines_and_in_the_table(root):
    page = (root / "docs" / "algorithms.md").read_text(encoding="utf-8")
    files = {path.stem: path for path in (root / "examples" / "algorithms").glob("*.py")}
    assert set(files) == {"toy", *NAMES}
    for name in NAMES:
        assert code_lines(files[name]) <= 40, name
        assert f"examples/algorithms/{name}.py" in page
        doc = ast.get_docstring(ast.parse(files[name].read_text(encoding="utf-8")))
        assert f"python examples/algorithms/{name}.py" in doc
        assert re.search(r"^Source: .*(arXiv \d{4}\.\d{5}|P1)", doc, re.MULTILINE | re.DOTALL), name


GAINS = {
    "grpo": 0.7,
    "dr_grpo": 0.6,
    "rloo": 0.6,
    "reinforce_plus_plus": 0.6,
    "adaptive_kl": 0.6,
    "reference_ratio": 0.2,
    "vc_ppo": 0.6,
    "arithmetic": 0.15,
}


# The equations of all are tested below; these four differ in what they change of the trainer.
IN_EVERY_RUN = ("adaptive_kl", "arithmetic", "grpo", "vc_ppo")


@pytest.mark.parametrize(
    "name",
    [n if n in IN_EVERY_RUN else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)
def test_it_learns(load, learn, name):
    """By about half of what the worst of three seeds has gained (docs/algorithms.md)."""
    before, after = load("toy").gain(learn(name))
    assert after - before > GAINS[name]


@pytest.fixture(scope="module")
def rollout():
    """Responses of one to six tokens that a policy has drawn which is no longer the reference."""
    generator = torch.Generator().manual_seed(3)

    def noise(scale, *shape):
        return scale * torch.randn(*shape, generator=generator)

    world = ToyWorld(lang="en")
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[0] = T
    mask = torch.arange(T) < lengths[:, None]
    logprobs = -noise(1.0, B, T).abs() - 0.1
    return Rollout(
        input_ids=torch.randint(6, len(world.tokenizer()), (B, 2 + T), generator=generator),
        prompt_lengths=torch.full((B,), 2),
        response_lengths=lengths,
        truncated=torch.zeros(B, dtype=torch.bool),
        mask=mask,
        scores=noise(2.0, B),
        logprobs=torch.where(mask, logprobs, 0.0),
        ref_logprobs=torch.where(mask, logprobs + noise(0.3, B, T), 0.0),
        values=torch.where(mask, noise(1.0, B, T), 0.0),
        extra={"new": torch.where(mask, logprobs + noise(0.3, B, T), 0.0)},
    )


@pytest.fixture
def estimate(load, tmp_path):
    """Lets a trainer of an algorithm estimate a rollout; returns both."""

    def run(name, rollout):
        module, world = load(name), ToyWorld(lang="en")
        options = dict(rollout_size=16, minibatch_size=16, output_dir=str(tmp_path))
        trainer = module.TOY.get("kind", Trainer)(
            LlamaForCausalLM(world.model_config(hidden_size=16, num_layers=1)),
            reward=world.reward,
            train_dataset=world.prompts(16),
            processing_class=world.tokenizer(),
            generation_config=GenerationConfig(max_new_tokens=T),
            **module.parts(**options),
        )
        return trainer, trainer.estimate(rollout)

    return run


def ours(trainer, rollout):
    """The policy's loss, and its gradient by the new log-probabilities ``[B, T]``."""
    new = rollout.extra["new"].clone().requires_grad_()
    batch = trainer.loss.prepare(rollout)
    loss = trainer.loss.policy(TokenStats(new[rollout.mask]), batch).loss
    return loss, *torch.autograd.grad(loss, new)


def written_out(rollout, objective):
    """Minus an objective that is written out over rows of scalars, and its gradient."""
    new = rollout.extra["new"].double().requires_grad_()
    old, ref = rollout.logprobs.double().tolist(), rollout.ref_logprobs.double().tolist()
    rows = [
        (new[i], old[i], ref[i], range(n)) for i, n in enumerate(rollout.response_lengths.tolist())
    ]
    loss = -objective(rows, rollout.scores.double().tolist())
    return loss, *torch.autograd.grad(loss, new)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)


def clipped(ratio, advantage):
    """PPO's surrogate of one token, ε = 0.2, by cases."""
    if advantage > 0:
        return ratio * advantage if ratio < 1.2 else torch.tensor(1.2 * advantage)
    return ratio * advantage if ratio > 0.8 else torch.tensor(0.8 * advantage)


def in_groups(numbers, size):
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def test_grpo_is_its_equation(estimate, rollout):
    def objective(rows, scores):
        groups = in_groups(scores, 8)
        advantages = [(r - mean(g)) / (stdev(g) + 1e-4) for g in groups for r in g]
        total = 0.0
        for (new, old, ref, steps), advantage in zip(rows, advantages, strict=True):
            per_token = [
                clipped((new[t] - old[t]).exp(), advantage) - 0.04 * (new[t] - ref[t]) ** 2 / 2
                for t in steps
            ]
            total = total + sum(per_token) / len(per_token)
        return total / B

    assert_same(ours(*estimate("grpo", rollout)), written_out(rollout, objective))


def test_dr_grpo_is_its_equation(estimate, rollout):
    def objective(rows, scores):
        advantages = [r - mean(group) for group in in_groups(scores, 8) for r in group]
        total = 0.0
        for (new, old, _, steps), advantage in zip(rows, advantages, strict=True):
            total = total + sum(clipped((new[t] - old[t]).exp(), advantage) for t in steps) / 32
        return total / B

    assert_same(ours(*estimate("dr_grpo", rollout)), written_out(rollout, objective))


def test_dr_grpo_has_one_denominator_over_processes(estimate, rollout):
    """Two processes with unlike numbers of tokens have the loss of one, in parts."""
    trainer, whole = estimate("dr_grpo", rollout)
    parts = [whole.select(torch.arange(5)), whole.select(torch.arange(5, B))]
    sizes = [torch.tensor([part.token_weights.sum(), len(part)]) for part in parts]
    total = 0.0
    for part, other in zip(parts, sizes[::-1], strict=True):
        batch = trainer.loss.prepare(part, lambda tensor, other=other: tensor + other)
        stats = TokenStats(part.extra["new"][part.mask])
        total = total + trainer.loss.policy(stats, batch, whole.token_weights.sum()).loss
    torch.testing.assert_close(total, ours(trainer, whole)[0])


def test_rloo_is_its_equation(estimate, rollout):
    def objective(rows, scores):
        returns = [
            score - 0.03 * (sum(old[t] for t in steps) - sum(ref[t] for t in steps))
            for score, (_, old, ref, steps) in zip(scores, rows, strict=True)
        ]
        total = 0.0
        for i, (new, _, _, steps) in enumerate(rows):
            others = [returns[j] for j in range(i - i % 4, i - i % 4 + 4) if j != i]
            total = total + (returns[i] - sum(others) / 3) * sum(new[t] for t in steps)
        return total / B

    trainer, estimated = estimate("rloo", rollout)
    assert_same(ours(trainer, estimated), written_out(rollout, objective))
    assert trainer.args.minibatch_size == trainer.args.rollout_size


def test_reinforce_plus_plus_is_its_equation(estimate, rollout):
    def objective(rows, scores):
        center, spread = mean(scores), stdev(scores)
        to_go = [
            [
                max(-5, min(5, (score - center) / spread))
                - 0.01 * sum(old[i] - ref[i] for i in steps[t:])
                for t in steps
            ]
            for score, (_, old, ref, steps) in zip(scores, rows, strict=True)
        ]
        every = [x for row in to_go for x in row]
        terms = [
            clipped((new[t] - old[t]).exp(), (row[t] - mean(every)) / pstdev(every))
            for row, (new, old, _, steps) in zip(to_go, rows, strict=True)
            for t in steps
        ]
        return sum(terms) / len(terms)

    assert_same(ours(*estimate("reinforce_plus_plus", rollout)), written_out(rollout, objective))


def test_the_reference_ratio_is_its_equation(estimate, rollout):
    trainer, estimated = estimate("reference_ratio", rollout)
    advantages = estimated.advantages.tolist()

    def objective(rows, _):
        terms = [
            clipped((new[t] - ref[t]).exp(), advantage[t])
            for (new, _, ref, steps), advantage in zip(rows, advantages, strict=True)
            for t in steps
        ]
        return sum(terms) / len(terms)

    assert_same(ours(trainer, estimated), written_out(rollout, objective))


def test_vc_ppo_is_its_equation(estimate, rollout):
    """A = Σ_l (γλ)^l δ_{t+l} with λ = 0.95; R = the rewards to go, whatever the critic says."""
    trainer, found = estimate("vc_ppo", rollout)
    for row, n in enumerate(rollout.response_lengths.tolist()):
        rewards, values = found.rewards[row].tolist(), [*rollout.values[row, :n].tolist(), 0.0]
        errors = [rewards[t] + values[t + 1] - values[t] for t in range(n)]
        advantages = [sum(0.95 ** (i - t) * errors[i] for i in range(t, n)) for t in range(n)]
        returns = [sum(rewards[t:n]) for t in range(n)]
        assert found.advantages[row, :n].tolist() == pytest.approx(advantages, abs=1e-5)
        assert found.returns[row, :n].tolist() == pytest.approx(returns, abs=1e-5)
    assert trainer.args.critic_pretrain_steps == 10


def test_the_adaptive_kl_controller_is_its_equation(learn):
    trainer = learn("adaptive_kl", total_steps=8)
    expected = 0.05
    for entry in trainer.history[-8:]:
        assert entry["kl/coef"] == pytest.approx(expected)
        error = entry["kl/ref_per_sequence"] / 6.0 - 1
        expected *= 1 + 0.5 * (error if -0.2 < error < 0.2 else 0.2 if error > 0 else -0.2)
    assert trainer.shaper.kl_coef == pytest.approx(expected)


def test_sums_are_verified_against_the_column(load):
    given = dict(completions=["7", " 7 ", "7 7", "6", ""], answer=["7", "7", "7", "7", "7"])
    assert load("arithmetic").correct(**given) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_each_is_run_from_the_command_line(load, stages, monkeypatch, tmp_path, capsys):
    toy, module = load("toy"), load("arithmetic")
    made = stages(module)
    words = ["arithmetic.py", "--total_steps=1", "--seed=3", f"--output_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", words)
    toy.main(**{**module.TOY, "stage": lambda seed: made if seed == 3 else None})
    printed = capsys.readouterr().out
    assert re.search(r"correct on held-out prompts: 0\.\d\d before, 0\.\d\d after\n$", printed)
