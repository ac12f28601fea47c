"""Command-line options from dataclasses, with help from their docstrings, or from a YAML file."""

import argparse
import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from transformers import HfArgumentParser

METAVARS = {int: "N", float: "X", str: "TEXT"}
ABSENT: Any = object()


def option_parser(description: str, defaults: Sequence[Any]) -> HfArgumentParser:
    """Return a parser with an option for every field of some dataclasses, and ``--config``.

    Args:
        description: printed above the options.
        defaults: an instance of each dataclass. Its values are the defaults, its class's
            ``_argument_group_name`` is the heading.
    """
    parser = HfArgumentParser(
        [type(part) for part in defaults],
        usage="%(prog)s [--config FILE.yaml] [--option value ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for part in defaults:
        hints, texts = get_type_hints(type(part)), help_texts(type(part))
        names = {spec.name for spec in fields(part)}
        for action in parser._actions:
            if (name := action.dest) in names:
                _explain(action, hints[name], texts[name], getattr(part, name))
    parser.add_argument(
        "--config", metavar="FILE", help="YAML lines of option: value; the command line overrides"
    )
    return parser


def read_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Return the given options by name; those of the command line replace those of ``--config``.

    Raises:
        SystemExit: for an unknown option or an impossible value; the reason is printed.
    """
    given = _parse(parser, argv)
    path = given.pop("config", None)
    if path is None:
        return given
    try:
        of_file = _parse(parser, [*_arguments(read_yaml(path))])
    except ValueError as error:
        parser.error(f"--config: {error}")
    return {**of_file, **given}


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        ValueError: for a file that cannot be read, or does not hold options.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, expected lines of option: value")
    if "config" in data:
        raise ValueError(f"{path} names another config; give one file that holds all options")
    return data


def help_texts(kind: type) -> dict[str, str]:
    """Return the texts under ``Args:`` in a class's docstring, by argument."""
    _, _, after = (inspect.getdoc(kind) or "").partition("Args:\n")
    section = re.split(r"^\S", after, maxsplit=1, flags=re.MULTILINE)[0]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _explain(action: argparse.Action, hint: Any, text: str, default: Any) -> None:
    """Set the help of an option, and read ``none`` if None is a possible value."""
    action.option_strings = action.option_strings[:1]  # hyphens work, but are not printed
    if action.nargs == 0:
        action.help = f"disables {action.dest}"
        return
    optional = NoneType in get_args(hint)
    kind = next(a for a in get_args(hint) if a is not NoneType) if optional else hint
    shown = str(default).lower() if kind is bool else default
    ending = "" if shown in (None, [], "") else f" [{shown}]"
    action.help = (text.rstrip(".") + ending).replace("%", "%%")
    if kind is bool:
        action.metavar = "BOOL"
    elif action.nargs is not None:
        action.metavar = "NAME"
    elif action.choices is None:
        action.metavar = METAVARS[kind]
    if optional and action.choices is None:
        action.type = _or_none(kind)


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = getattr(kind, "__name__", "value")  # argparse prints "invalid float value"
    return read


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    # argparse sets no default if the namespace has a value already.
    blank = argparse.Namespace(**{action.dest: ABSENT for action in parser._actions})
    found, unknown = parser.parse_known_args(argv, blank)
    if unknown:
        names = re.findall(r"--\w+", parser.format_help())
        close = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists them"
        parser.error(f"there is no option {unknown[0]}; {hint}")
    return {name: value for name, value in vars(found).items() if value is not ABSENT}


def _arguments(options: dict[str, Any]) -> Iterator[str]:
    """Yield a file's options as arguments, so that they are checked like the command line's."""
    for name, value in options.items():
        if isinstance(value, list):
            yield from (f"--{name}", *map(str, value))
        else:
            yield f"--{name}={'none' if value is None else value}"
