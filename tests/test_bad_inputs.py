"""docs/bad_inputs.md: every row of it is given, as users would, and gets what the page says.

The rows are in `tests/support/bad_inputs`. They run in a process of their own: here the types of
all arguments are checked, which nobody's are who has the package installed.
"""

import json

import pytest
from bad_inputs import ROOMS
from bad_inputs.page import PAGE, text
from bad_inputs.room import Room
from bad_inputs.shop import Shop
from launching import run

ROWS = {f"{room.title}: {row.given}": row for room in ROOMS for row in room.rows}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of every row."""
    folder = tmp_path_factory.mktemp("outcomes")
    path, script = folder / "outcomes.json", folder / "script.py"
    script.write_text("import runpy\nrunpy.run_module('bad_inputs', run_name='__main__')\n")
    run(script, "--run", str(path), output=folder / "output")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ROWS)
def test_what_is_given_gets_what_the_page_says(outcomes, name):
    assert ROWS[name].holds(outcomes[name]), outcomes[name]


def test_the_page_is_the_table():
    assert PAGE.read_text(encoding="utf-8") == text(), "write it anew: python -m bad_inputs"


def test_there_are_enough_rows_and_none_twice():
    assert len(ROWS) == sum(len(room.rows) for room in ROOMS) >= 60
    promised = [row.gets.partition(": ")[2].strip("… ") for row in ROWS.values()]
    assert min(map(len, promised)) > 10  # a row that promises nothing is none


def test_a_row_that_gets_something_else_is_seen(tmp_path):
    """Another error, another message, a message that breaks off, or no error at all."""
    room = Room("Numbers")

    @room.row("a text", "ValueError: invalid … base 10: 'a'")
    def number(shop):
        return int("a")

    (row,) = room.rows
    assert row.holds(row.run(Shop(tmp_path)))
    for other in (
        "TypeError: invalid literal for int() with base 10: 'a'",
        "ValueError: invalid literal",
        "ValueError: not invalid, base 10: 'a'",
        "taken",
    ):
        assert not row.holds(other)
