"""The reference's pages, one for each public name: written from the source, which is not imported.

`tools/site_hooks.py` hands them to mkdocs, which fills them in from the docstrings.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "mossrlhf"
SOURCE = Path(__file__).resolve().parent.parent / "src"
INDEX = "api/index.md"

SECTIONS = {
    "Training": (
        "trainer", "config", "sft_trainer", "planning", "metrics", "checkpoint.folders",
    ),
    "Rewards": ("rewards", "reward_shaping"),
    "Advantages and loss": ("advantage", "loss"),
    "Reward modeling": (
        "reward_modeling.trainer",
        "reward_modeling.pairs",
        "reward_modeling.report",
        "reward_modeling.scoring",
        "reward_modeling.preference_strength",
    ),
    "Samplers": ("sampling",),
    "Models, containers": ("models", "types", "minibatches", "toyworld"),
}  # fmt: skip
"""The names of the package, by the modules they are at home in."""

MODULES = (
    "data", "nan_debug", "functional", "kernels", "models", "plotting", "presets", "rewards",
    "sampling", "toyworld", "weight_diff",
)  # fmt: skip
"""Modules with a page of their own, each name of theirs on it."""


@cache
def tree(module: str) -> ast.Module:
    """Parse a module's source, or a package's ``__init__``.

    Args:
        module: dotted name.
    """
    path = SOURCE.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def assigned(module: str, name: str) -> ast.expr | None:
    """Return the expression that a module assigns to a name at its top, if it does."""
    for node in tree(module).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.value
    return None


def public_names(module: str) -> list[str]:
    """Return a module's ``__all__``, or without one what it defines without an underscore.

    Args:
        module: dotted name.
    """
    listed = assigned(module, "__all__")
    if listed is not None:
        return sorted(ast.literal_eval(listed))
    kinds = (ast.FunctionDef, ast.ClassDef)
    defined = [node.name for node in tree(module).body if isinstance(node, kinds)]
    return sorted(name for name in defined if not name.startswith("_"))


def docstring(module: str, name: str) -> str:
    """Return the docstring of what a module defines or imports under a name.

    Args:
        module: dotted name.
        name: of a class, a function, a constant or a submodule.

    Raises:
        LookupError: where there is no such name in the source.
    """
    for node in _statements(module):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return ast.get_docstring(node) or ""
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _imported(node.module, alias.name)
    if assigned(module, name) is not None:
        return ""
    raise LookupError(f"{module} has no {name}")


def _statements(module: str) -> Iterator[ast.stmt]:
    """Yield what stands at the top of a module, and under its ``if TYPE_CHECKING:``."""
    for node in tree(module).body:
        yield from node.body if isinstance(node, ast.If) else [node]


def _imported(module: str, name: str) -> str:
    """Look where a name comes from; what another library defines, it documents."""
    if not module.startswith(PACKAGE):
        return ""
    inside = SOURCE.joinpath(*module.split("."), name)
    if inside.is_dir() or inside.with_suffix(".py").is_file():
        return ast.get_docstring(tree(f"{module}.{name}")) or ""
    return docstring(module, name)


def summary(module: str, name: str) -> str:
    """Return the first line of what is said about a name."""
    return docstring(module, name).partition("\n")[0]


def homes() -> dict[str, tuple[str, ...]]:
    """Return which module each name of the package is at home in: module → names."""
    table = assigned(PACKAGE, "_HOMES")
    assert table is not None
    return ast.literal_eval(table)


def listed(section: str) -> list[str]:
    """Return the names of the package that stand under a heading of the reference."""
    table = homes()
    return sorted((name for home in SECTIONS[section] for name in table[home]), key=str.lower)


def name_page(name: str) -> str:
    """Return the page of one name of the package."""
    return f"::: {PACKAGE}.{name}\n    options:\n      heading_level: 1\n"


def module_page(module: str) -> str:
    """Return the page of a module: what it is, and each of its names under a heading."""
    whole = f"{PACKAGE}.{module}"
    about = (ast.get_docstring(tree(whole)) or "").partition("\n")[0]
    parts = [f"# {whole}\n\n{about}\n"]
    for name in public_names(whole):
        if (called := identifier(whole, name)) is not None:
            parts.append(f"::: {called}\n    options:\n      heading_level: 2\n")
    return "\n".join(parts)


def origin(module: str, name: str) -> str | None:
    """Return where a module imports a name from, by ``from origin import name``; else None."""
    for node in _statements(module):
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return node.module
    return None


def identifier(module: str, name: str) -> str | None:
    """Return what mkdocstrings calls a name of a module; None for a submodule.

    A function of the same name as its file would be taken for the file: it is called by its home.
    """
    home = origin(module, name)
    if home == module:
        return None
    return f"{home}.{name}" if home == f"{module}.{name}" else f"{module}.{name}"


def _index() -> str:
    rows = ["# Reference\n", "Every public name, from its docstring. Shapes follow one legend:\n"]
    legend = (ast.get_docstring(tree(f"{PACKAGE}.types")) or "").strip()
    rows.append("".join(f"    {line}".rstrip() + "\n" for line in legend.splitlines()))
    for section in SECTIONS:
        rows.append(f"## {section}\n\n| name | what it is |\n| --- | --- |")
        rows.extend(
            f"| [`{name}`]({name}.md) | {summary(PACKAGE, name)} |" for name in listed(section)
        )
        rows.append("")
    rows.append("## Modules\n\n| module | what is in it |\n| --- | --- |")
    for module in MODULES:
        about = (ast.get_docstring(tree(f"{PACKAGE}.{module}")) or "").partition("\n")[0]
        rows.append(f"| [`{PACKAGE}.{module}`]({PACKAGE}.{module}.md) | {about} |")
    rows.append(f"\n`{PACKAGE}.__version__` is the version, a string.\n")
    return "\n".join(rows)


def pages() -> dict[str, str]:
    """Return the reference: path below docs/ → Markdown with mkdocstrings' directives."""
    named = [name for section in SECTIONS for name in listed(section)]
    return {
        INDEX: _index(),
        **{f"api/{name}.md": name_page(name) for name in named},
        **{f"api/{PACKAGE}.{module}.md": module_page(module) for module in MODULES},
    }


def navigation() -> list[str | dict[str, list[dict[str, str]]]]:
    """Return the reference's part of mkdocs' ``nav``."""
    return [INDEX, *_groups()]


def _groups() -> Iterator[dict[str, list[dict[str, str]]]]:
    for section in SECTIONS:
        yield {section: [{name: f"api/{name}.md"} for name in listed(section)]}
    yield {"Modules": [{f"{PACKAGE}.{module}": f"api/{PACKAGE}.{module}.md"} for module in MODULES]}
