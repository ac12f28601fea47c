"""A loss and a reward of one's own are in a run within ten lines: the README's, and the site's."""

from pathlib import Path

import pytest
import torch
from snippets import MODELS, cells, run, shrink
from transformers import AutoModelForCausalLM


def ten_lines(path: Path) -> str:
    """The one block of a page that has a loss and a reward, after as many empty lines as there."""
    (block,) = [
        block for block in cells(path.read_text(encoding="utf-8")) if "(PPOMaxLoss):" in block
    ]
    return block


@pytest.fixture
def readme(root):
    return root / "README.md"


@pytest.fixture
def learn(hub, monkeypatch, readme):
    """Runs the lines, one of them changed if so asked; returns the trainer, the names, the way."""
    shrink(monkeypatch, total_steps=2, rollout_size=8, minibatch_size=4, critic_pretrain_steps=1)
    begun = AutoModelForCausalLM.from_pretrained(hub / MODELS[0]).state_dict()

    def after(old="", new=""):
        lines = ten_lines(readme)
        assert old in lines
        names = run([lines.replace(old, new)], readme)
        ended = names["trainer"].policy.state_dict()
        way = torch.cat([(ended[name] - weights).flatten() for name, weights in begun.items()])
        assert way.any()
        return names["trainer"], names, way

    return after


def likeness(one, other):
    return float(torch.cosine_similarity(one, other, dim=0))


def test_they_are_ten_and_the_same_on_the_site(root, readme):
    lines = [line for line in ten_lines(readme).splitlines() if line.strip()]
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 100
    assert ten_lines(root / "docs" / "index.md").lstrip() == ten_lines(readme).lstrip()


def test_the_loss_is_in_force(learn):
    """With its sign turned the policy goes the opposite way."""
    trainer, names, way = learn()
    assert type(trainer.loss) is names["Reinforce"]
    _, _, turned = learn("return -advantage", "return advantage")
    assert likeness(way, turned) < -0.99


def test_the_reward_is_in_force(learn):
    """Its figures are those of the completions, and what it wants is what is learned."""
    trainer, _, way = learn()
    rollout = trainer.score(trainer.collect())
    begins, ends = rollout.prompt_lengths, rollout.prompt_lengths + rollout.response_lengths
    ids = [row[a:b] for row, a, b in zip(rollout.input_ids, begins, ends, strict=True)]
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    assert rollout.scores.tolist() == pytest.approx([-len(text) / 100 for text in texts])
    assert trainer.history[-1]["reward/brief/mean"] < 0
    other, _, turned = learn("-len(text)", "len(text)")
    assert other.history[-1]["reward/brief/mean"] > 0
    assert likeness(way, turned) < -0.99
