"""Hold the public names to their documentation: `python tools/check_docs.py`, in `make lint`.

Looked at are the functions and classes in the `__all__` of MODULES. Each needs a docstring that
mentions every parameter (or says "Args: those of" another) and says `Raises:` where it raises;
methods share their class's. A tensor's shape is in its annotation, or in brackets in the docstring.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType, UnionType
from typing import Any, Union, get_args, get_origin

from torch import Tensor

import mossrlhf
import mossrlhf.data
import mossrlhf.functional
import mossrlhf.presets

PACKAGE = mossrlhf.__name__
MODULES = (mossrlhf, mossrlhf.data, mossrlhf.functional, mossrlhf.presets)
REFERENCE = re.compile(r"^\s*Args.*: those of `\w+`", re.MULTILINE)


def raises(function: Callable) -> bool:
    """Whether a function raises by itself (`NotImplementedError` and re-raising aside)."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    errors = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc]
    return any("NotImplementedError" not in ast.dump(error) for error in errors)


def is_shapeless(annotation: Any) -> bool:
    """Whether an annotation is a plain `Tensor`, or admits one."""
    if get_origin(annotation) in (Union, UnionType):
        return Tensor in get_args(annotation)
    return annotation is Tensor


def check_callable(function: Callable, doc: str) -> Iterator[str]:
    """Yield what `doc` does not say about a function's parameters and errors."""
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("self", "cls") or name.startswith("_"):
            continue
        if not (re.search(rf"\b{name}\b", doc) or REFERENCE.search(doc)):
            yield f"parameter {name} is not mentioned"
        if is_shapeless(parameter.annotation) and "[" not in doc:
            yield f"parameter {name} is a tensor of unknown shape"
    if raises(function) and "Raises:" not in doc and not REFERENCE.search(doc):
        yield "it raises, but there is no Raises: section"


def own_functions(cls: type) -> Iterator[tuple[str, Callable]]:
    """Yield the constructor, public methods and properties that a class defines itself."""
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else member
        function = inspect.unwrap(getattr(function, "__func__", function))
        is_public = name == "__init__" or not name.startswith("_")
        if is_public and inspect.isfunction(function) and function.__module__ == cls.__module__:
            yield name, function


def check_class(cls: type) -> Iterator[str]:
    """Yield what a class's docstrings do not say about its fields and public methods."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith(PACKAGE)]
    doc = "\n".join(base.__doc__ or "" for base in bases)
    for field in getattr(cls, "__dataclass_fields__", {}).values():
        if field.init and not re.search(rf"\b{field.name}\b", doc):
            yield f"field {field.name} is not mentioned"
    for name, function in own_functions(cls):
        if name == "__init__":
            if "__dataclass_fields__" not in vars(cls):
                yield from check_callable(function, f"{doc}\n{function.__doc__ or ''}")
        elif not function.__doc__:
            yield f"method {name} has no docstring"
        else:
            yield from (f"{name}: {it}" for it in check_callable(function, function.__doc__))


def check(thing: Any) -> Iterator[str]:
    """Yield what is missing from the documentation of one public object."""
    doc = inspect.getdoc(thing)
    if not doc:
        yield "no docstring"
    if doc and inspect.isclass(thing):
        yield from check_class(thing)
    elif doc and inspect.isfunction(thing):
        yield from check_callable(inspect.unwrap(thing), doc)


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield the functions and classes of the package that a module exports."""
    for name in getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")]):
        thing = getattr(module, name)
        if callable(thing) and getattr(thing, "__module__", "").startswith(PACKAGE):
            yield f"{module.__name__}.{name}", thing


def main() -> int:
    """Print what is missing, name by name; 1 if anything is."""
    found = [pair for module in reversed(MODULES) for pair in public(module)]
    things = {id(thing): (name, thing) for name, thing in found}  # each once, by its first name
    problems = [f"{name}: {gap}" for name, thing in things.values() for gap in check(thing)]
    for problem in sorted(problems):
        print(f"UNDOCUMENTED  {problem}")
    print(f"{len(things)} public names, {len(problems)} gaps in their documentation")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
