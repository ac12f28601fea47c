"""Hold functions and files to their size: `python tools/check_size.py`, part of `make lint`.

A function's body is counted from its first statement to the end of its last one, docstring
excluded, comments and blank lines in between included.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src", "examples", "benchmarks", "tools")
MAX_BODY = 60
MAX_FILE = 700
MAX_BODY_OF = {"Trainer.train": 39}  # where the limit is tighter
SHOWN = 5


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield (qualified name, definition) of every function below `node`."""
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{prefix}{child.name}."
            if not isinstance(child, ast.ClassDef):
                yield name[:-1], child
        yield from functions(child, name)


def body_length(function: ast.FunctionDef) -> int:
    """Count the lines of a function's body, docstring excluded."""
    body = function.body[ast.get_docstring(function, clean=False) is not None :]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def main() -> int:
    """Print the largest functions and files, and what is over its limit; 1 if anything is."""
    files = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    bodies, lengths, problems = [], [], []
    for path in files:
        text = path.read_text(encoding="utf-8")
        where = path.relative_to(ROOT).as_posix()
        lines = len(text.splitlines())
        lengths.append((lines, where))
        if lines > MAX_FILE:
            problems.append(f"{where}: {lines} lines, at most {MAX_FILE}")
        for name, function in functions(ast.parse(text)):
            size = body_length(function)
            limit = MAX_BODY_OF.get(name, MAX_BODY)
            bodies.append((size, f"{where}:{function.lineno} {name}"))
            if size > limit:
                problems.append(f"{where}:{function.lineno}: {name} {size} lines, at most {limit}")
    middle = median(size for size, _ in bodies)
    print(f"{len(bodies)} functions, median body {middle:g} lines; the longest:")
    for size, where in sorted(bodies, reverse=True)[:SHOWN]:
        print(f"  {size:4d}  {where}")
    print(f"{len(files)} files; the longest:")
    for size, where in sorted(lengths, reverse=True)[:SHOWN]:
        print(f"  {size:4d}  {where}")
    for problem in problems:
        print(f"TOO LONG  {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
