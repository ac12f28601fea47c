"""Options from dataclasses: what was given is told from what was not, and explained."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from support.options import help_texts, option_parser, read_options


@dataclass(frozen=True)
class Things:
    """Some things.

    Args:
        size: of a thing, in meters; a long
            story about it, 100 % of it.
        limit: at most this many; None for no limit.
        name: its name.
        lang: its language.
        dry: whether it is dry.
        parts: of it.

    Raises:
        ValueError: never.
    """

    size: float = 2.5
    limit: int | None = 7
    name: str | None = None
    lang: Literal["en", "zh"] | None = None
    dry: bool = True
    parts: list[str] = field(default_factory=list)


@pytest.fixture
def parser():
    return option_parser("About things.", [Things()])


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("", {}),
        ("--size 2.5", {"size": 2.5}),  # given, though it is the default
        ("--size=3 --limit=4", {"size": 3.0, "limit": 4}),
        ("--limit none", {"limit": None}),
        ("--dry", {"dry": True}),
        ("--dry false", {"dry": False}),
        ("--no_dry", {"dry": False}),
        ("--no-dry", {"dry": False}),
        ("--name none --lang zh", {"name": None, "lang": "zh"}),
        ("--parts a b --size 1", {"parts": ["a", "b"], "size": 1.0}),
    ],
)
def test_what_is_given_is_read(parser, words, given):
    assert read_options(parser, words.split()) == given


@pytest.mark.parametrize("spelling", ["--config FILE", "--config=FILE"])
@pytest.mark.parametrize("before", [True, False])
def test_the_command_line_beats_the_file(parser, tmp_path, spelling, before):
    path = tmp_path / "things.yaml"
    path.write_text("size: 5e-1\nlimit: null\ndry: false\nparts: [a, b]\nlang: zh\n")
    config = spelling.replace("FILE", str(path)).split()
    words = ["--lang", "en"]
    given = read_options(parser, config + words if before else words + config)
    assert given == {"size": 0.5, "limit": None, "dry": False, "parts": ["a", "b"], "lang": "en"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sise: 1", "there is no option --sise=1; did you mean --size?"),
        ("size: large", "argument --size: invalid float value: 'large'"),
        ("lang: fr", "argument --lang: invalid choice: 'fr'"),
        ("- size", "things.yaml holds a list, expected lines of option: value"),
        ("size: [", "things.yaml cannot be read as YAML"),
        ("config: a.yaml", "things.yaml names another config"),
    ],
)
def test_a_file_is_checked_like_the_command_line(parser, tmp_path, capsys, text, message):
    path = tmp_path / "things.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        read_options(parser, ["--config", str(path)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--limits 3", "there is no option --limits; did you mean --limit?"),
        ("--zzz", "there is no option --zzz; --help lists them"),
        ("--siz 3", "there is no option --siz; did you mean --size?"),  # no abbreviations
        ("--limit many", "argument --limit: invalid int value: 'many'"),
        ("--config none.yaml", "none.yaml cannot be read as YAML: [Errno 2] No such file"),
    ],
)
def test_what_cannot_be_is_refused(parser, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        read_options(parser, words.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_is_the_docstring_with_the_defaults(parser, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert set(help_texts(Things)) == {"size", "limit", "name", "lang", "dry", "parts"}
    text = " ".join(parser.format_help().split())
    for expected in (
        "About things.",
        "--size X of a thing, in meters; a long story about it, 100 % of it [2.5]",
        "--limit N at most this many; None for no limit [7]",
        "--name TEXT its name",
        "--lang {en,zh} its language",
        "--dry [BOOL] whether it is dry [true]",
        "--no_dry disables dry",
        "--parts NAME [NAME ...] of it",
    ):
        assert expected in text
