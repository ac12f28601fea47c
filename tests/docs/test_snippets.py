"""The pages' Python runs: the ``python`` blocks of each, in order, as the cells of one notebook."""

import importlib.util
import sys
from pathlib import Path

import pytest
import stand_in_vllm
import torch
from snippets import MODELS, cells, run, shrink
from transformers import AutoModelForCausalLM, TrainingArguments

from mossrlhf import AdvantageEstimator, ToyWorld, Trainer, VLLMSampler, presets
from mossrlhf.data import PairCollator
from mossrlhf.models.lora import is_quantized
from mossrlhf.nan_debug import NonFiniteError

PAGES = ("index", "concepts", "from_trl", "from_moss")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, root, monkeypatch):
    """As it stands but for the models, and for sizes: hours become seconds."""
    path: Path = root / "docs" / f"{page}.md"
    blocks = cells(path.read_text(encoding="utf-8"))
    assert blocks, f"{path} has no ```python block"
    shrink(monkeypatch, total_steps=1, rollout_size=8, minibatch_size=4, critic_pretrain_steps=1)
    run(blocks, path)


@pytest.fixture
def had(hub, monkeypatch):
    """What blocks of other pages take for granted that a reader has."""
    shrink(monkeypatch, total_steps=1, rollout_size=8, minibatch_size=8, critic_pretrain_steps=1)
    world = ToyWorld(lang="en")
    sft, tokenizer = AutoModelForCausalLM.from_pretrained(hub / MODELS[0]), world.tokenizer()
    for folder in ("path/to/sft", "org/model", "llama-7b", "my-model"):
        sft.save_pretrained(hub / folder)
        tokenizer.save_pretrained(hub / folder)
    return dict(
        sft=sft,
        tokenizer=tokenizer,
        reward=world.reward,
        prompts=world.prompts(16),
        pairs=[pair for pair in world.pairs(16) if pair["chosen"] != pair["rejected"]],
        collator=PairCollator(tokenizer, max_length=64),
        arguments=TrainingArguments(
            "reward", max_steps=1, save_strategy="no", report_to="none", use_cpu=True,
            dataloader_pin_memory=False, disable_tqdm=True,
        ),
    )  # fmt: skip


def blocks_of(root, page):
    return cells((root / "docs" / f"{page}.md").read_text(encoding="utf-8"))


def go_on(names, blocks):
    for block in blocks:
        exec(block, names)


# bitsandbytes looks for faster kernels on the CPU and says that it found none.
@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
def test_adapters(root, had):
    """The second block trains the adapter that the first one loads."""
    policy, reward, four_bits = blocks_of(root, "adapters")
    if importlib.util.find_spec("bitsandbytes"):
        go_on(had, [four_bits])
        assert any(map(is_quantized, had["model"].modules()))
    lora, _, rest = policy.partition("trainer =")
    go_on(had, [lora, reward, "trainer =" + rest])
    assert (Path("path/to/reward") / "adapter").is_dir()
    had["trainer"].train()


def test_faults(root, had):
    """The page's fault is that of another run; this one has its like, and trying it again fails."""

    def spoiled(rewards, values, mask):
        done = AdvantageEstimator()(rewards, values, mask)
        done.advantages[5, 0] = torch.inf
        return done

    preset = {**presets.ppo_max(output_dir="outputs"), "advantage": spoiled}
    trainer = Trainer(
        "org/model", reward=had["reward"], train_dataset=had["prompts"], critic=False, **preset
    )
    with pytest.raises(NonFiniteError):
        trainer.train()
    (block,) = blocks_of(root, "faults")
    assert "outputs/faults/step-12" in block
    names = {**had, "trainer": trainer}
    with pytest.raises(NonFiniteError):
        exec(block.replace("step-12", "step-1"), names)
    (suspect,) = names["fault"].suspects
    assert suspect.term == "advantages"
    assert "fault.rollout" in block.splitlines()[-1]  # the last line is what failed


def test_algorithms(root, had, monkeypatch):
    monkeypatch.syspath_prepend(root / "examples" / "algorithms")
    for name in ("grpo", "toy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (block,) = blocks_of(root, "algorithms")
    go_on(had, [block])
    for name in ("grpo", "toy"):
        sys.modules.pop(name)
    assert had["trainer"].history


def test_checkpoints(root, had):
    (block,) = blocks_of(root, "checkpoints")
    options = dict(reward=had["reward"], train_dataset=had["prompts"], **presets.ppo_max())
    had["trainer"] = Trainer("path/to/sft", **options)
    go_on(had, [block])
    step = had["trainer"].history[-1]["step"]
    had["trainer"] = Trainer("path/to/sft", **options)
    go_on(had, [block])
    assert had["trainer"].history[-1]["step"] == step == 1


def test_weights(root, had):
    (block,) = blocks_of(root, "weights")
    go_on(had, [block])
    one, other = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in ("my-model", "my-model-again")
    )
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_samplers(root, had, monkeypatch):
    """The second block is run by tests/trainer/test_samplers.py; the third asks a stand-in."""
    first, second, third = blocks_of(root, "samplers")
    names = {**had, "model": had["sft"]}
    go_on(names, [first])
    assert "OneAtATime" in second
    asked = {}
    monkeypatch.setitem(sys.modules, "vllm", stand_in_vllm)
    monkeypatch.setattr(stand_in_vllm, "LLM", lambda **given: asked.update(given))
    go_on(names, [third])
    assert isinstance(names["sampler"], VLLMSampler)
    assert (asked["model"], asked["max_model_len"]) == ("path/to/sft", 2048)
