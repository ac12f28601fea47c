"""What a checkpoint says of itself is what is asked of it when it is read."""

import json

import pytest

from mossrlhf.checkpoint import STATE, checkpoints
from mossrlhf.saved_state import KINDS, read_state
from mossrlhf.version import __version__


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
        version=__version__, global_step=3, pretrained=0, best_metric=None, best_global_step=None,
        best_model_checkpoint=None, settings={}, shaper={}, prompts={}, ptx=None, schedulers={},
        optimizers={}, random=[], watches={}, history=[],
    )  # fmt: skip

    def write(**changes):
        folder = tmp_path / "checkpoint-3"
        folder.mkdir(exist_ok=True)
        (folder / STATE).write_text(json.dumps({**good, **changes}))
        return folder

    return write


@pytest.mark.parametrize("version", ["0.0.1", "0.1", __version__, f"{__version__}rc1"])
def test_states_of_this_version_and_earlier_ones_are_read(state, version):
    assert read_state(state(version=version))["global_step"] == 3


@pytest.mark.parametrize("version", [f"{__version__}.1", "0.2.0", "0.10.0", "1.0", "99"])
def test_states_of_later_versions_are_not(state, version):
    with pytest.raises(ValueError, match=f"was written by mossrlhf {version}, and this is"):
        read_state(state(version=version))


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
    with pytest.raises(ValueError, match=f"trainer_state.json' is damaged .{message}"):
        read_state(state(**changes))


def test_folders_of_other_names_are_no_checkpoints(state, tmp_path):
    """Nor are those whose number only looks like one."""
    path = state()
    for name in ("checkpoint-old", "checkpoint-", "checkpoint-3.old", "checkpoint-²"):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE).write_text("{}")
    assert checkpoints(tmp_path) == [path]
