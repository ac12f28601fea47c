"""What a checkpoint says of itself is what is asked of it when it is read."""

import json

import pytest

from mossrlhf.checkpoint.folders import STATE, checkpoints
from mossrlhf.checkpoint.state import FORMAT, KINDS, read_state
from mossrlhf.serialization import with_checksum


def test_what_is_asked_for_is_written(make):
    """Or every checkpoint would be called damaged."""
    trainer = make(args=dict(total_steps=1))
    trainer.train()
    path = trainer.output_dir / "checkpoint-1"
    written = json.loads((path / STATE).read_text())
    assert set(KINDS) <= set(written)
    assert read_state(path) == written


@pytest.fixture
def state(tmp_path):
    """Write a state in order but for some changes, and return its folder."""
    good = dict(
        format=FORMAT, version="0.1.0", weights={}, global_step=3, pretrained=0, best_metric=None,
        best_global_step=None, best_model_checkpoint=None, settings={}, shaper={}, prompts={},
        ptx=None, schedulers={}, optimizers={}, random=[], scaler=None, watches={}, callbacks={},
        history=[], adapters={}, files={},
    )  # fmt: skip

    def write(**changes):
        folder = tmp_path / "checkpoint-3"
        folder.mkdir(exist_ok=True)
        (folder / STATE).write_text(json.dumps(with_checksum({**good, **changes})))
        return folder

    return write


def test_a_state_of_this_format_is_read_whatever_the_version(state):
    assert read_state(state(version="99.0"))["global_step"] == 3
    with pytest.raises(ValueError, match=rf"written by mossrlhf 99\.0 in format {FORMAT + 1}"):
        read_state(state(version="99.0", format=FORMAT + 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_step": True}, "its global_step is True"),
        ({"global_step": 3.0}, "its global_step is 3.0"),
        ({"global_step": -1}, "its global_step is -1"),
        ({"pretrained": "../x"}, "its pretrained is '../x'"),
        ({"history": {}}, "its history is {}"),
        ({"shaper": None}, "its shaper is None"),
    ],
)
def test_what_is_of_another_kind_is_damaged(state, changes, message):
    with pytest.raises(ValueError, match=f"{STATE} is damaged .{message}"):
        read_state(state(**changes))


def test_folders_of_other_names_are_no_checkpoints(state, tmp_path):
    """Nor are those whose number only looks like one."""
    path = state()
    for name in ("checkpoint-old", "checkpoint-", "checkpoint-3.old", "checkpoint-²"):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE).write_text("{}")
    assert checkpoints(tmp_path) == [path]
