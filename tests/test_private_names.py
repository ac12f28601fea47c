"""Private names of other libraries: listed, and where they were when they were read."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from transformers import AutoModelForCausalLM
from transformers.generation.continuous_batching import continuous_api

import mossrlhf
from mossrlhf.models.lora import adapter_layers

PRIVATES = {
    "accelerate 1.15": ("_hf_hook", "_mixed_precision", "_shared_state"),
    "deepspeed 0.19": (
        "_hp_mapping", "_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state",
        "_register_deepspeed_module", "_z3_optimizer",
    ),
    "peft 0.21": ("_active_adapter", "_disable_adapters"),
    "torch 2.13": (
        "_checkpoint", "_subclasses",  # packages
        "_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks",
        "_global_backward_hooks", "_global_forward_hooks", "_global_forward_pre_hooks",
        "_parameters", "_version",
        "_last_lr", "_opt_called",
        "_fsdp_param_groups", "_get_fsdp_state", "_lazy_init",
    ),
    "transformers 5.23": (
        "_attn_implementation", "_cached_continuous_batching_manager", "_hf_peft_config_loaded",
        "_load_best_model", "_load_from_checkpoint", "_no_split_modules",
    ),
}  # fmt: skip
"""What the package uses of other libraries' privates, by the version it was read in."""

LISTED = {name for names in PRIVATES.values() for name in names}
SOURCE = Path(mossrlhf.__file__).parent


def private(tree):
    """The private names of a file: of attributes of other objects, of imports, of getattr."""
    for part in ast.walk(tree):
        if isinstance(part, ast.Attribute):
            own = isinstance(part.value, ast.Name) and part.value.id in ("self", "cls")
            names = [] if own else [part.attr]
        elif isinstance(part, ast.ImportFrom) and not (part.module or "").startswith("mossrlhf"):
            names = [*(part.module or "").split("."), *(alias.name for alias in part.names)]
        elif isinstance(part, ast.Call) and getattr(part.func, "id", "") in ("getattr", "hasattr"):
            names = [arg.value for arg in part.args if isinstance(arg, ast.Constant)]
        else:
            names = []
        yield from (n for n in names if re.match("_[a-z]", str(n)))


def defined(tree):
    """The private names that a file defines: functions, and attributes of ``self``."""
    for part in ast.walk(tree):
        if isinstance(part, ast.FunctionDef | ast.ClassDef):
            yield part.name
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            if isinstance(part.value, ast.Name) and part.value.id == "self":
                yield part.attr
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            yield part.target.id


def test_private_names_of_other_libraries_are_listed():
    trees = [ast.parse(path.read_text("utf-8")) for path in SOURCE.rglob("*.py")]
    ours = {"_asdict", "_replace", *(name for tree in trees for name in defined(tree))}
    overridden = {"_load_best_model", "_load_from_checkpoint"}  # by `RewardTrainer`
    assert {name for tree in trees for name in private(tree)} - ours == LISTED - ours
    assert overridden <= LISTED & ours


def test_hooks_parameters_and_versions_of_torch():
    module, names = torch.nn.Linear(1, 1), PRIVATES["torch 2.13"]
    on_modules = [name for name in names if "_hooks" in name and "global" not in name]
    assert all(hasattr(module, name) for name in (*on_modules, "_parameters"))
    everywhere = [name for name in names if "_global" in name]
    assert all(hasattr(torch.nn.modules.module, name) for name in everywhere)
    before = module.weight._version
    with torch.no_grad():
        module.weight.add_(1)
    assert module.weight._version == before + 1


def test_schedulers_of_torch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=3.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert scheduler._last_lr == scheduler.get_last_lr() == [1.5]
    with pytest.warns(UserWarning, match="optimizer.step"):
        scheduler.step()
    optimizer._opt_called = True
    scheduler.step()


def test_fsdp_of_torch():
    assert hasattr(FSDPModule, "_get_fsdp_state")
    assert hasattr(FSDPState(), "_fsdp_param_groups")
    assert hasattr(FSDPState, "_lazy_init")


def test_deepspeed_registers_and_links_under_these_names():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero import parameter_offload, stage3, stage_1_and_2
    from deepspeed.utils import mixed_precision_linkage

    assert hasattr(parameter_offload.DeepSpeedZeRoOffload, "_register_deepspeed_module")
    zero = stage_1_and_2.DeepSpeedZeroOptimizer
    assert hasattr(zero, "_lazy_init_hp_params_optimizer_state")
    assert "self._hp_optimizer_states_linked" in inspect.getsource(zero)
    assert "lp_param._hp_mapping" in inspect.getsource(mixed_precision_linkage)
    assert "._z3_optimizer = self" in inspect.getsource(stage3)


def test_accelerate_keeps_its_state_and_hooks_in_these_places():
    Accelerator(cpu=True)
    state = AcceleratorState()
    assert AcceleratorState._shared_state["_mixed_precision"] == state._mixed_precision
    module = add_hook_to_module(torch.nn.Linear(1, 1), ModelHook())
    assert isinstance(module._hf_hook, ModelHook)


def test_transformers_keeps_the_manager_of_continuous_batching_on_the_model():
    source = inspect.getsource(continuous_api)
    assert "self.model._cached_continuous_batching_manager =" in source


def test_the_trainer_of_transformers_loads_by_these_methods():
    for name in ("_load_best_model", "_load_from_checkpoint"):
        assert callable(getattr(transformers.Trainer, name))


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
