"""Names of the first edition: importable for one release, with a warning."""

from importlib import import_module

import pytest
from launching import run

import mossrlhf
from mossrlhf._moved import MOVED, RENAMED

DOCUMENTED = {
    "buffer": ["RolloutBuffer", "micro_batches"],
    "charts": ["plot_critic", "plot_reward_histograms"],
    "faults": ["Fault", "NonFiniteError", "Suspect", "read_fault"],
    "functional.advantages": ["gae"],
    "functional.reduce": ["Reduce", "masked_mean", "whiten"],
    "judging": ["score_responses"],
    "kernels.dispatch": ["backend", "use_backend"],
    "loss.ppo_max": ["PPOMaxLoss"],
    "monitor": ["CollapseWatch", "StillWatch"],
    "preference": ["AdaptiveMargin", "PreferenceStrength"],
    "reward_trainer": ["RankingLoss", "RewardReport", "RewardTrainer"],
    "retention": ["last_checkpoint"],
    "roles": ["load_critic", "load_policy", "load_tokenizer", "vocabulary_size"],
    "shaping": ["RewardShaper", "RunningMoments", "add_at_last"],
}
"""Names that the first edition's pages, tutorials and error messages gave, by module."""


@pytest.mark.parametrize("old", DOCUMENTED)
def test_a_documented_name_keeps_its_old_import(old):
    for new in MOVED[old]:
        import_module(f"mossrlhf.{new}")  # some libraries change the filters when first imported
    module = import_module(f"mossrlhf.{old}")
    for name in DOCUMENTED[old]:
        with pytest.warns(DeprecationWarning, match=rf"mossrlhf\.{old}\.{name} is now mossrlhf\."):
            found = getattr(module, name)
        assert found is getattr(import_module(f"mossrlhf.{MOVED[old][0]}"), name, found)
        assert found.__name__ == name or name == "Reduce"


@pytest.mark.parametrize("old", MOVED)
def test_every_old_module_leads_to_existing_ones(old):
    with pytest.raises(ModuleNotFoundError):
        import_module(f"mossrlhf.{old}.nothing")
    for new in MOVED[old]:
        assert import_module(f"mossrlhf.{new}").__name__ == f"mossrlhf.{new}"
    with pytest.raises(AttributeError, match=old):
        import_module(f"mossrlhf.{old}").no_such_name  # noqa: B018


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_function_keeps_its_old_import(old):
    module, _, name = old.rpartition(".")
    new, _, found = RENAMED[old].rpartition(".")
    expected = getattr(import_module(f"mossrlhf.{new}"), found)
    with pytest.warns(DeprecationWarning, match=rf"{name} is now mossrlhf\.{new}\.{found};"):
        assert getattr(import_module(f"mossrlhf.{module}"), name) is expected


def test_an_unknown_name_of_models_is_no_attribute():
    with pytest.raises(AttributeError, match=r"'mossrlhf\.models' has no attribute 'besides'"):
        getattr(mossrlhf.models, "besides")  # noqa: B009


def test_an_old_module_is_found_from_the_package():
    import_module("mossrlhf.reward_shaping")
    with pytest.warns(DeprecationWarning, match="now mossrlhf.reward_shaping.RewardShaper"):
        assert getattr(mossrlhf, "shaping").RewardShaper is mossrlhf.RewardShaper  # noqa: B009


def test_no_module_of_ours_uses_an_old_name(tmp_path):
    script = tmp_path / "imports.py"
    script.write_text(
        "import warnings\n"
        "warnings.filterwarnings('error', 'mossrlhf', DeprecationWarning)\n"
        "import mossrlhf\n"
        "for name in mossrlhf.__all__: getattr(mossrlhf, name)\n"
    )
    run(script, output=tmp_path / "output")
