"""Private names of other libraries: listed, and where they were when they were read."""

import ast
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM

import mossrlhf.models
from mossrlhf.models.lora import adapter_layers

LISTED = {name for names in mossrlhf.models.PRIVATES.values() for name in names}


def private(node):
    """Yield the private names that a module takes from objects other than its own, and imports."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute):
            own = isinstance(part.value, ast.Name) and part.value.id in ("self", "cls")
            names = [] if own else [part.attr]
        elif isinstance(part, ast.ImportFrom) and not (part.module or "").startswith("mossrlhf"):
            names = [*(part.module or "").split("."), *(alias.name for alias in part.names)]
        elif isinstance(part, ast.Constant) and str(part.value).isidentifier():
            names = [part.value]  # of getattr and hasattr
        else:
            names = []
        yield from (n for n in names if re.match("_[a-z]", str(n)))


@pytest.mark.parametrize("room", ["models", "loading"])
def test_private_names_are_listed(root, room):
    files = (root / "src" / "mossrlhf" / room).glob("*.py")
    found = {
        name
        for path in files
        if path.name != "__init__.py"
        for name in private(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found <= LISTED
    assert room != "models" or found >= LISTED - {"_hf_peft_config_loaded"}


@pytest.fixture
def adapted(policy):
    """A PEFT model with an adapter in a layer and one of a whole module."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    return get_peft_model(policy(), config)


def test_active_adapters_of_peft(adapted):
    layers = adapter_layers(adapted)
    assert any(isinstance(layer, ModulesToSaveWrapper) for layer in layers)
    for layer in layers:
        assert layer._active_adapter == layer.active_adapter
        assert layer.active_adapters == ["default"]
        assert layer._disable_adapters is layer.disable_adapters is False
        layer._active_adapter, layer._disable_adapters = ["other"], True
        assert layer.active_adapters == ["other"]
        assert layer.disable_adapters


def test_attention_and_blocks_of_transformers(policy):
    model = policy()
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert "LlamaDecoderLayer" in model._no_split_modules


def test_transformers_marks_models_with_adapters(policy, tmp_path):
    policy().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not getattr(base, "_hf_peft_config_loaded", False)
    get_peft_model(base, LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")._hf_peft_config_loaded


def test_forward_pre_hooks_of_torch():
    module = torch.nn.Linear(1, 1)
    module.register_forward_pre_hook(print)
    assert print in module._forward_pre_hooks.values()
