"""Hold the public names to their documentation: `python tools/check_docs.py`, in `make lint`.

Looked at are the names in `mossrlhf.__all__` and `mossrlhf.functional.__all__`. Each needs
a docstring that mentions every parameter, says `Raises:` where it raises, and has a
`Source:` line (methods share their class's). A tensor's shape is in its annotation, or in
brackets in the docstring.
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
import mossrlhf.functional

PACKAGE = mossrlhf.__name__


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
        if name in ("self", "cls"):
            continue
        if not re.search(rf"\b{name}\b", doc):
            yield f"parameter {name} is not mentioned"
        if is_shapeless(parameter.annotation) and "[" not in doc:
            yield f"parameter {name} is a tensor of unknown shape"
    if raises(function) and "Raises:" not in doc:
        yield "it raises, but there is no Raises: section"


def check_class(cls: type, doc: str) -> Iterator[str]:
    """Yield what a class's docstrings do not say about its constructor and public methods."""
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else member
        function = inspect.unwrap(getattr(function, "__func__", function))
        if not inspect.isfunction(function) or (name.startswith("_") and name != "__init__"):
            continue
        if name == "__init__":  # of a dataclass it is made up, without source
            made_up = "__dataclass_fields__" in vars(cls)
            names = inspect.signature(function).parameters if made_up else ()
            missing = [n for n in names if n != "self" and not re.search(rf"\b{n}\b", doc)]
            yield from (f"field {n} is not mentioned" for n in missing)
            if not made_up:
                yield from check_callable(function, f"{doc}\n{function.__doc__ or ''}")
        elif not function.__doc__:
            yield f"method {name} has no docstring"
        else:
            yield from (f"{name}: {it}" for it in check_callable(function, function.__doc__))


def check(thing: Any) -> Iterator[str]:
    """Yield what is missing from the documentation of one public object."""
    if isinstance(thing, ModuleType):
        for name in getattr(thing, "__all__", [n for n in vars(thing) if not n.startswith("_")]):
            member = getattr(thing, name)
            if getattr(member, "__module__", "").startswith(thing.__name__):
                yield from (f"{name}: {it}" for it in check(member))
        return
    doc = inspect.getdoc(thing) if callable(thing) else "Source:"
    if not doc:
        yield "no docstring"
        return
    if "Source:" not in doc:
        yield "no Source: line"
    if inspect.isclass(thing):
        yield from check_class(thing, doc)
    elif inspect.isfunction(thing):
        yield from check_callable(inspect.unwrap(thing), doc)


def main() -> int:
    """Print what is missing, name by name; 1 if anything is."""
    modules = (mossrlhf, mossrlhf.functional)
    names = [(module, name) for module in modules for name in module.__all__]
    problems = [
        f"{module.__name__}.{name}: {problem}"
        for module, name in names
        for problem in check(getattr(module, name))
    ]
    for problem in problems:
        print(f"UNDOCUMENTED  {problem}")
    print(f"{len(names)} public names, {len(problems)} gaps in their documentation")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
