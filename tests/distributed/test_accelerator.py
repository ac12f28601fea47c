"""Accelerators: precision per trainer, and what is required of the user's own."""

import pytest
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from mossrlhf import TrainerConfig
from mossrlhf.distributed.processes import make_accelerator


@pytest.fixture
def precision(monkeypatch):
    """A process without an accelerator so far; restored afterwards."""
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield monkeypatch
    AcceleratorState._reset_state()
    AcceleratorState._shared_state.update(before)


def computes_in(accelerator):
    x = torch.ones(2, 2)
    with accelerator.autocast():
        return (x @ x).dtype


def test_each_accelerator_keeps_its_own_precision(precision, tmp_path):
    half = make_accelerator(TrainerConfig(output_dir=str(tmp_path), bf16=True))
    assert (half.mixed_precision, computes_in(half)) == ("bf16", torch.bfloat16)
    full = make_accelerator(TrainerConfig(output_dir=str(tmp_path)))
    assert (full.mixed_precision, computes_in(full)) == ("no", torch.float32)
    with half.autocast():  # float16 on a GPU, if the state still said "no"
        assert half.mixed_precision == "bf16"
    again = make_accelerator(TrainerConfig(output_dir=str(tmp_path), bf16=True))
    assert [computes_in(a) for a in (again, full, half)] == [
        torch.bfloat16, torch.float32, torch.bfloat16,
    ]  # fmt: skip
    assert half.device == full.device == again.device


def test_earlier_accelerators_do_not_decide_the_precision(precision, tmp_path):
    Accelerator()
    assert computes_in(make_accelerator(TrainerConfig(output_dir=str(tmp_path), bf16=True))) == (
        torch.bfloat16
    )


def test_the_launchers_precision_is_the_default(precision, tmp_path):
    precision.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for _ in range(2):
        assert computes_in(make_accelerator(TrainerConfig(output_dir=str(tmp_path)))) == (
            torch.bfloat16
        )
    precision.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert make_accelerator(TrainerConfig(output_dir=str(tmp_path))).mixed_precision == "no"


def test_several_processes_refuse_to_change_their_precision(precision, tmp_path):
    Accelerator()
    precision.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_CPU)
    with pytest.raises(
        ValueError, match=r"TrainerConfig\(bf16=True\): these .*'no', expected 'bf16'"
    ):
        make_accelerator(TrainerConfig(output_dir=str(tmp_path), bf16=True))


@pytest.mark.parametrize("handlers", [[], [DistributedDataParallelKwargs(bucket_cap_mb=3)]])
def test_a_users_accelerator_is_told_that_roles_run_in_turn(precision, tmp_path, handlers):
    own = Accelerator(kwargs_handlers=handlers)
    assert make_accelerator(TrainerConfig(output_dir=str(tmp_path)), own) is own
    assert own.ddp_handler.find_unused_parameters
    assert own.ddp_handler.bucket_cap_mb == (3 if handlers else 25)  # the rest is the user's


def test_a_static_graph_is_refused(precision, tmp_path):
    own = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(static_graph=True)])
    with pytest.raises(ValueError, match=r"accelerator: .*static_graph=True\), expected False"):
        make_accelerator(TrainerConfig(output_dir=str(tmp_path)), own)


def test_privates_of_accelerate_are_where_they_were(precision, tmp_path):
    """Read in accelerate 1.15: the precision of the process can be changed nowhere else."""
    assert AcceleratorState._shared_state == {}
    Accelerator(project_dir=str(tmp_path))
    assert AcceleratorState().mixed_precision == "no"
    AcceleratorState._shared_state["_mixed_precision"] = "bf16"
    assert AcceleratorState().mixed_precision == "bf16"
