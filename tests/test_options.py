"""Refused options say what was probably meant."""

from dataclasses import dataclass, field

import pytest

from mossrlhf.options import ELSEWHERE, check_range, strict, suggest


@strict
@dataclass(frozen=True, kw_only=True)
class Options:
    """Two options, and something that is none."""

    gamma: float = 1.0
    epochs: int = 1
    derived: str = field(init=False, default="")


def test_known_options_pass():
    assert Options(gamma=0.5).gamma == 0.5
    assert Options() == Options(gamma=1.0, epochs=1)


def test_a_slip_is_recognized():
    with pytest.raises(TypeError, match=r"^Options has no option 'gama'; did you mean 'gamma'\?$"):
        Options(gama=0.5)


def test_an_option_of_another_library_is_recognized():
    with pytest.raises(TypeError, match=r"'ppo_epochs'; here that is TrainerConfig\(num_ppo"):
        Options(ppo_epochs=4)


def test_something_else_gets_the_list():
    with pytest.raises(TypeError, match=r"no option 'zzz'; its options: gamma, epochs$"):
        Options(zzz=1)


def test_a_derived_field_is_no_option():
    with pytest.raises(TypeError, match="no option 'derived'"):
        Options(derived="x")


def test_a_subclass_may_add_options():
    @strict
    @dataclass(frozen=True, kw_only=True)
    class More(Options):
        lam: float = 0.9

    assert (More(lam=0.5).lam, More().gamma) == (0.5, 1.0)
    with pytest.raises(TypeError, match=r"More has no option 'lamb'; did you mean 'lam'\?"):
        More(lamb=1)


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_every_hint_names_a_place(name):
    assert suggest(name, []) == f"; here that is {ELSEWHERE[name]}"
    assert "(" in ELSEWHERE[name]


@pytest.mark.parametrize(
    ("value", "above", "passes"),
    [
        (None, False, True),
        (0.0, False, True),
        (0.0, True, False),
        (1.0, True, True),
        (1.1, False, False),
        (-0.1, False, False),
        (float("nan"), False, False),
    ],
)
def test_check_range(value, above, passes):
    if passes:
        check_range("Options", "gamma", value, 0, 1, above=above)
        return
    with pytest.raises(ValueError, match=r"Options\(gamma=\): got .*, expected a number in [(\[]0"):
        check_range("Options", "gamma", value, 0, 1, above=above)
