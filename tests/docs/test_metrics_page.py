"""docs/metrics.md explains every metric that is logged, and no other."""

import re

import pytest
from transformers import GenerationConfig

from mossrlhf import PPOMaxLoss
from mossrlhf.logging import COLUMNS

METRIC = re.compile(r"`(step|[a-z_]+(?:/[a-z0-9_<>]+)+)`")


def brevity(completion_ids, **columns):
    return [-float(len(ids)) for ids in completion_ids]


def logged(trainer):
    names = {name for entry in trainer.train() for name in entry}
    return {re.sub(r"^(reward|eval)/(reward_model|brevity)/", r"\1/<name>/", n) for n in names}


@pytest.fixture
def text(root):
    return (root / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_what_is_logged_is_documented_and_vice_versa(make, reward_model, world, text):
    everything = make(
        "everything",
        reward=[reward_model(), (brevity, 0.0)],
        eval_dataset=world.prompts(4, split="eval"),
        ptx_dataset=world.sft_examples(8),
        loss=PPOMaxLoss(ptx_coef=0.1, entropy_coef=0.01, kl_loss_coef=0.1),
        generation_config=GenerationConfig(max_new_tokens=6, do_sample=True, top_p=0.9),
        args=dict(total_steps=1, critic_pretrain_steps=1, eval_steps=1),
    )
    jointly = make("jointly", args=dict(total_steps=1, clip_grad_jointly=True))
    names = logged(everything) | logged(jointly)
    documented = set(METRIC.findall(text))
    assert names - documented == set(), "logged, but not in docs/metrics.md"
    assert documented - names == set(), "in docs/metrics.md, but never logged"


def test_every_metric_has_one_row(text):
    tables = text.split("## Counters")[1]
    rows = [line.split("|")[1] for line in tables.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in METRIC.findall(row)]
    assert len(names) == len(set(names))
    assert {name for _, name, _, _ in COLUMNS} <= set(names)


def test_columns_of_the_console_are_explained(text):
    for heading, name, _, _ in COLUMNS:
        assert f"| {heading} | `{name}` |" in text
