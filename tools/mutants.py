"""Mutation check: a fault is put into the numerical code, and the nearest tests must see it.

    python tools/mutants.py                       # everything, on two cores: tens of minutes
    python tools/mutants.py functional/reduce.py  # one file, or several
    python tools/mutants.py --list loss.py        # what would be tried
    python tools/mutants.py loss.py:123           # one line

Signs, comparisons, clips, indices, masks, means and sums, detaches: one change at a time (`faults`
has the rules), never on disk. A mutant that no test sees is printed; one that changes no number is
argued for in ``tools/equivalent_mutants.json``. The figures go to benchmarks/results/mutants.json.
"""

import argparse
import ast
import copy
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "mossrlhf"
ARGUED = ROOT / "tools" / "equivalent_mutants.json"
FIGURES = ROOT / "benchmarks" / "results" / "mutants.json"

TRAINER = (
    "trainer/test_trl_oracle.py",
    "trainer/test_invariance.py",
    "trainer/test_switches.py",
    "trainer/test_training.py",
)
NEAREST: dict[str, tuple[str, ...]] = {
    "functional/advantages.py": ("functional/test_advantages.py", "test_advantage.py"),
    "functional/logprobs.py": ("functional/test_logprobs.py", "test_models.py"),
    "functional/losses.py": ("functional/test_losses.py", "test_loss.py"),
    "functional/reduce.py": ("functional/test_reduce.py", "functional/test_advantages.py"),
    "advantage.py": ("test_advantage.py",),
    "buffer.py": ("test_buffer.py", *TRAINER),
    "engine.py": ("trainer/test_engine.py", *TRAINER, "trainer/test_distributed.py"),
    "loss.py": ("test_loss.py",),
    "models/actor_critic.py": ("test_models.py", *TRAINER),
    "rewards/model.py": ("test_rewards.py",),
    "rewards/together.py": ("test_rewards.py",),
    "shaping.py": ("test_shaping.py",),
    "stages.py": ("trainer/test_stages.py", *TRAINER),
    "types.py": ("test_types.py", "test_buffer.py", *TRAINER),
}
"""Files to mutate, below src/mossrlhf, and the tests that must see it, below tests, in turn."""


@dataclass(frozen=True)
class Mutant:
    """One fault: the how-manieth of a file below src/mossrlhf, where, and what stands there."""

    file: str
    place: int
    line: int
    function: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.before}  ->  {self.after}"


# ---- faults -------------------------------------------------------------------------------------

BINARY: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Pow: (ast.Mult,),
}
COMPARED: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
RENAMED = {
    "sum": "mean",
    "mean": "sum",
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "zeros_like": "ones_like",
    "new_zeros": "new_ones",
    "zeros": "ones",
    "masked_sum": "masked_mean",
    "masked_mean": "masked_sum",
    "any": "all",
    "all": "any",
}
DROPPED = {"abs", "clamp", "detach", "exp", "flip", "log", "nan_to_num", "neg", "square", "sqrt"}
"""Methods and functions of one tensor that a mutant leaves out."""


def faults(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in the place of a node, each a fault of its own."""
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            if isinstance(op, ast.BitAnd | ast.BitOr):
                yield from (left, right)
            for other in BINARY.get(type(op), ()):
                yield ast.BinOp(left, other(), right)
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert(), operand=operand):
            yield operand
        case ast.Compare(left=left, ops=[op], comparators=comparators):
            for other in COMPARED.get(type(op), ()):
                yield ast.Compare(left, [other()], comparators)
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() as value):
            yield ast.Constant(value + 1)
            if value > 1:
                yield ast.Constant(value - 1)
        case ast.Constant(value=float() as value):
            yield ast.Constant(1.5 * value if value else 1.0)
        case ast.IfExp(body=body, orelse=orelse):
            yield from (body, orelse)
        case ast.AugAssign(target=target, op=ast.Add(), value=value):
            yield ast.AugAssign(target, ast.Sub(), value)
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            if any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(value)):
                yield ast.Pass()
        case ast.FunctionDef(decorator_list=decorators):
            kept = [d for d in decorators if "no_grad" not in ast.unparse(d)]
            if len(kept) < len(decorators):
                bare = copy.copy(node)
                bare.decorator_list = kept
                yield bare
        case ast.Call():
            yield from _calls(node)


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    function, arguments = node.func, node.args
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    of_torch = isinstance(function, ast.Attribute) and ast.unparse(function.value) == "torch"
    if name in RENAMED:
        other = copy.deepcopy(function)
        setattr(other, "attr" if isinstance(other, ast.Attribute) else "id", RENAMED[name])
        yield ast.Call(other, arguments, node.keywords)
    if name in DROPPED and isinstance(function, ast.Attribute):
        yield arguments[0] if of_torch else function.value
    if name == "where" and of_torch and len(arguments) == 3:
        yield from arguments[1:]
        yield ast.Call(function, [arguments[0], arguments[2], arguments[1]], [])
    if name == "reduce" and len(arguments) == 1:
        yield arguments[0]  # this process alone
    for i, keyword in enumerate(node.keywords):
        if name == "clamp" and keyword.arg in ("min", "max"):
            swapped = list(node.keywords)
            swapped[i] = ast.keyword({"min": "max", "max": "min"}[keyword.arg], keyword.value)
            if len(node.keywords) == 1:
                yield ast.Call(function, arguments, swapped)


def live(tree: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield the nodes whose change may change a number, with the function around each."""
    if isinstance(tree, ast.FunctionDef | ast.ClassDef):
        function = f"{function}.{tree.name}".lstrip(".")
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            silent = ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom
            if not isinstance(child, ast.AST) or isinstance(child, silent):
                continue
            if isinstance(child, ast.keyword) and child.arg == "strict":
                continue  # of `zip`: an error where there would be another
            if isinstance(child, ast.BinOp) and isinstance(child.op, ast.BitOr) and not function:
                continue  # a union of types
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield function, child
            yield from live(child, function)


def mutants(file: str) -> list[Mutant]:
    """Return all mutants of a file."""
    tree = ast.parse((SOURCE / file).read_text())
    found = []
    for function, node in live(tree):
        for after in faults(node):
            line, texts = getattr(node, "lineno", 0), [_short(node), _short(after)]
            found.append(Mutant(file, len(found), line, function, *texts))
    return found


def _short(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef):
        return ", ".join(f"@{ast.unparse(d)}" for d in node.decorator_list) or "no decorator"
    return " ".join(ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split())


def mutated(mutant: Mutant) -> bytes:
    """Return the source of a file with a fault in it."""
    tree = ast.parse((SOURCE / mutant.file).read_text())
    place = 0
    for _, node in live(tree):
        for after in faults(node):
            if place == mutant.place:
                return ast.unparse(
                    ast.fix_missing_locations(_Swap(node, after).visit(tree))
                ).encode()
            place += 1
    raise LookupError(str(mutant))


class _Swap(ast.NodeTransformer):
    def __init__(self, node: ast.AST, after: ast.AST) -> None:
        self.node, self.after = node, after

    def visit(self, node: ast.AST) -> ast.AST:
        return self.after if node is self.node else super().visit(node)


# ---- running ------------------------------------------------------------------------------------


def start(mutant: Mutant | None, tests: Sequence[str], seconds: float) -> int:
    """Run tests in a child process, on a mutant or on the sources as they are; return its id."""
    child = os.fork()
    if child:
        return child
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.setpgid(0, 0)  # tests start processes of their own
    signal.alarm(int(seconds) + 1)
    if mutant is not None:
        _serve(str(SOURCE / mutant.file), mutated(mutant))
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    # Imported before the fork, for all children at once.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = 2
    try:
        status = int(pytest.main([*options, *(str(ROOT / "tests" / test) for test in tests)]))
    finally:
        os._exit(status)


def _serve(path: str, source: bytes) -> None:
    """Let the import system find this source at that path, and no bytecode for it."""
    read, stat = SourceFileLoader.get_data, SourceFileLoader.path_stats

    def get_data(self: SourceFileLoader, asked: str) -> bytes:
        return source if str(asked) == path else read(self, asked)

    def path_stats(self: SourceFileLoader, asked: str) -> object:
        if str(asked) == path:
            raise OSError("neither read nor written to the cache")
        return stat(self, asked)

    SourceFileLoader.get_data = get_data  # type: ignore[method-assign, assignment]
    SourceFileLoader.path_stats = path_stats  # type: ignore[method-assign, assignment]


def existing(file: str) -> list[str]:
    """Return the tests of a file that there are."""
    return [test for test in NEAREST[file] if (ROOT / "tests" / test).exists()]


def baseline(file: str) -> float:
    """Return how long the tests of a file take on the sources as they are; they must pass."""
    begun = time.monotonic()
    _, status = os.waitpid(start(None, existing(file), 3600), 0)
    if status:
        sys.exit(f"{file}: its tests fail as it stands: {' '.join(existing(file))}")
    return time.monotonic() - begun


def survivors(found: Sequence[Mutant], jobs: int) -> Iterator[Mutant]:
    """Yield the mutants that no test sees, as they are found."""
    limits = {file: 20 + 4 * baseline(file) for file in dict.fromkeys(m.file for m in found)}
    waiting, running, done = list(reversed(found)), {}, 0
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[start(mutant, existing(mutant.file), limits[mutant.file])] = mutant
        child, status = os.wait()
        mutant, done = running.pop(child), done + 1
        if sys.stderr.isatty():
            print(f"\r{done} of {len(found)}", end="", file=sys.stderr, flush=True)
        if status == 0:
            yield mutant


def load_argued() -> dict[tuple[str, str, str, str], str]:
    """Return why some mutants are equivalent."""
    if not ARGUED.exists():
        return {}
    entries = json.loads(ARGUED.read_text(encoding="utf-8"))
    return {(e["file"], e["function"], e["before"], e["after"]): e["why"] for e in entries}


def main(argv: list[str] | None = None) -> int:
    """Try the mutants of some files or of all, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", help="below src/mossrlhf, with :LINE if wanted")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="say what would be tried")
    args = parser.parse_args(argv)
    wanted = [name.partition(":") for name in args.files] or [(file, "", "") for file in NEAREST]
    found = [
        mutant
        for file, _, line in wanted
        for mutant in mutants(file)
        if not line or mutant.line == int(line)
    ]
    if args.list:
        print("\n".join(map(str, found)), f"\n{len(found)} mutants")
        return 0
    # Imported once, for every child: what the sources stand on, never the sources.
    for module in ("accelerate", "peft", "torch", "transformers"):
        importlib.import_module(module)
    argued, alive, equal = load_argued(), [], []
    for mutant in survivors(found, args.jobs):
        key = (mutant.file, mutant.function, mutant.before, mutant.after)
        (equal if key in argued else alive).append(mutant)
        if key not in argued:
            print(f"\rSURVIVED  {mutant}", flush=True)
    counted = len(found) - len(equal)
    print(
        f"{len(found)} mutants, {len(equal)} of them argued equivalent; "
        f"{counted - len(alive)} of {counted} killed, {(counted - len(alive)) / counted:.1%}"
    )
    if not args.files:
        survived = list(map(str, alive))
        figures = {"mutants": len(found), "equivalent": len(equal), "survived": survived}
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
