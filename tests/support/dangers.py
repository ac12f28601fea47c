"""What may run code that came with data, found in source text."""

import ast
from collections.abc import Iterator

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
"""Whose files run code when they are read."""

NAMES = {"eval", "exec", "__import__"}

CALLS = {
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell",
    "torch.hub.load": "code of a repository",
    "torch.jit.load": "code in a file",
    "yaml.load": "objects of Python in YAML; use yaml.safe_load",
    "yaml.load_all": "objects of Python in YAML; use yaml.safe_load_all",
    "yaml.full_load": "objects of Python in YAML; use yaml.safe_load",
    "yaml.unsafe_load": "objects of Python in YAML; use yaml.safe_load",
    "pandas.read_pickle": "a pickle",
    "torch.serialization.add_safe_globals": "more than tensors in a pickle",
}

METHODS = {
    "load_state": "accelerate runs what a planted pickle says",
    "register_for_checkpointing": "accelerate pickles it",
    "read_pickle": "a pickle",
    "to_pickle": "a pickle",
}

FORBIDDEN = {
    "allow_pickle": True,
    "shell": True,
    "trust_remote_code": True,
    "weights_only": False,
}
"""Keywords and the value that none may have, as an argument, a default or an entry."""


def dangers(source: str) -> list[str]:
    """Return what is dangerous in source text, with its line.

    Args:
        source: of a module.
    """
    tree = ast.parse(source)
    known = dict(_imported(tree))
    found = [f"{node.lineno}: {what}" for node in ast.walk(tree) for what in _of(node, known)]
    return sorted(found, key=lambda said: int(said.partition(":")[0]))


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield what names stand for: of ``import numpy as np``, "np" for "numpy"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                yield name, alias.name if alias.asname else name
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _of(node: ast.AST, known: dict[str, str]) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (
                f"import {alias.name}" for alias in names if alias.name.split(".")[0] in MODULES
            )
        case ast.ImportFrom(module=str(module)) if module.split(".")[0] in MODULES:
            yield f"import of {module}"
        case ast.Call():
            yield from _call(node, known)
        case ast.keyword(arg=str(name), value=value):
            yield from _setting(name, value)
        case ast.Dict(keys=keys, values=values):
            for key, value in zip(keys, values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield from _setting(key.value, value)
        case ast.FunctionDef(args=args) | ast.AsyncFunctionDef(args=args) | ast.Lambda(args=args):
            plain = [*args.posonlyargs, *args.args]
            named = zip(plain[len(plain) - len(args.defaults) :], args.defaults, strict=True)
            for argument, default in (*named, *zip(args.kwonlyargs, args.kw_defaults, strict=True)):
                if default is not None:
                    yield from _setting(argument.arg, default)
        case ast.Assign(targets=[ast.Name(id=name) | ast.Attribute(attr=name)], value=value):
            if name != "shell":  # which is a good name for a thing as well
                yield from _setting(name, value)
        case ast.AnnAssign(target=ast.Name(id=name) | ast.Attribute(attr=name), value=value):
            if value is not None:
                yield from _setting(name, value)
        case ast.Subscript(slice=ast.Constant(value=str(name)), ctx=ast.Store()):
            if name in FORBIDDEN:
                yield f"{name} set"


def _call(node: ast.Call, known: dict[str, str]) -> Iterator[str]:
    name = _dotted(node.func, known)
    if name in NAMES or name.removeprefix("builtins.") in NAMES:
        yield f"{name}(…)"
    if name in CALLS:
        yield f"{name}(…): {CALLS[name]}"
    method = name.rpartition(".")[2]
    if isinstance(node.func, ast.Attribute) and method in METHODS and name not in CALLS:
        yield f"….{method}(…): {METHODS[method]}"
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if name == "torch.load":
        value = given.get("weights_only")
        if not (isinstance(value, ast.Constant) and value.value is True):
            yield "torch.load(…) without weights_only=True"
    if name == "numpy.load" and len(node.args) > 2:
        yield "numpy.load(…) with allow_pickle by position"


def _setting(name: str, value: ast.expr) -> Iterator[str]:
    """Anything but the harmless constant: what is worked out may come out wrong."""
    if name not in FORBIDDEN:
        return
    harmless = not FORBIDDEN[name]
    if not (isinstance(value, ast.Constant) and value.value is harmless):
        yield f"{name}={ast.unparse(value)}"


def _dotted(node: ast.expr, known: dict[str, str]) -> str:
    """The name of what is called, by the module it is from; "…" for what has no name."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, known)}.{node.attr}"
    return "…"
