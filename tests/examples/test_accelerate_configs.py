"""Each of examples/accelerate_configs, read by accelerate, and what processes are told of it."""

import os
from argparse import Namespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

KINDS = {
    "single": ("NO", 1, 1),
    "ddp": ("MULTI_GPU", 8, 1),
    "fsdp2": ("FSDP", 8, 1),
    "zero2": ("DEEPSPEED", 8, 1),
    "zero3": ("DEEPSPEED", 8, 1),
    "multi_node": ("FSDP", 16, 2),
}


@pytest.fixture
def arguments(root):
    """What `accelerate launch --config_file` makes of a configuration."""

    def parsed(name: str) -> Namespace:
        path = str(root / f"examples/accelerate_configs/{name}.yaml")
        command = ["--config_file", path, "examples/ppo_llama.py"]
        return _validate_launch_command(launch_command_parser().parse_args(command))[0]

    return parsed


def test_every_configuration_is_one_of_these(root):
    found = {path.stem for path in (root / "examples/accelerate_configs").iterdir()}
    assert found == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(root, name):
    path = root / f"examples/accelerate_configs/{name}.yaml"
    config = load_config_from_file(str(path))  # which refuses keys it does not know
    kind, processes, machines = KINDS[name]
    assert config.distributed_type == kind
    assert (config.num_processes, config.num_machines) == (processes, machines)
    known = {key.lower() for key in FullyShardedDataParallelPlugin.__dataclass_fields__}
    given = yaml.safe_load(path.read_text(encoding="utf-8")).get("fsdp_config", {})
    names = {key.removeprefix("fsdp_") for key in given} - {"version", "offload_params"}
    assert names <= known


@pytest.mark.parametrize("name", ["fsdp2", "multi_node"])
def test_processes_are_told_of_fsdp2(arguments, monkeypatch, name):
    told = prepare_multi_gpu_env(arguments(name))
    monkeypatch.setattr(os, "environ", told)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False  # critic and reference are copies
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert told["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_processes_are_told_of_zero(arguments, monkeypatch, name, stage):
    pytest.importorskip("deepspeed")
    given = arguments(name)
    given.deepspeed_fields_from_accelerate_config = ""  # as its launcher notes right before
    told = prepare_deepspeed_cmd_env(given)[1]
    monkeypatch.setattr(os, "environ", told)
    plugin = DeepSpeedPlugin()
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == stage
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == 1
    assert not plugin.zero3_init_flag
