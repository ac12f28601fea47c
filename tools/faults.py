"""Faults: what may stand in the place of a piece of numerical code, one change at a time."""

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "mossrlhf"


@dataclass(frozen=True)
class Mutant:
    """One fault: the how-manieth of a file below src/mossrlhf, where, and what stands there.

    Lines move, so it is known by its function, what stands there before and after, and `nth`: the
    how-manieth of that kind in the function.
    """

    file: str
    place: int
    line: int
    function: str
    before: str
    after: str
    nth: int

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What an argument for equivalence goes by."""
        return self.file, self.function, self.before, self.after, self.nth

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.before}  ->  {self.after}"


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
        case ast.AugAssign(target=target, op=op, value=value):
            for other in BINARY.get(type(op), ()):
                yield ast.AugAssign(target, other(), value)
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
            if isinstance(child, ast.keyword) and child.arg in ("strict", "stacklevel"):
                continue  # of `zip`: an error where there would be another; of warnings: a line
            union = isinstance(child, ast.BinOp) and isinstance(child.op, ast.BitOr)
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if typing or (union and not function):
                continue
            yield function, child
            yield from live(child, function)


def mutants(file: str) -> list[Mutant]:
    """Return all mutants of a file."""
    tree = ast.parse((SOURCE / file).read_text())
    found: list[Mutant] = []
    seen: Counter[tuple[str, str, str]] = Counter()
    for function, node in live(tree):
        for after in faults(node):
            kind = function, _short(node), _short(after)
            seen[kind] += 1
            line = getattr(node, "lineno", 0)
            found.append(Mutant(file, len(found), line, *kind, seen[kind]))
    return found


def _short(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef):
        return ", ".join(f"@{ast.unparse(d)}" for d in node.decorator_list) or "no decorator"
    return " ".join(ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split())


def mutated(mutant: Mutant) -> str:
    """Return the source of a file with a fault in it."""
    tree = ast.parse((SOURCE / mutant.file).read_text())
    place = 0
    for _, node in live(tree):
        for after in faults(node):
            if place == mutant.place:
                return ast.unparse(ast.fix_missing_locations(_Swap(node, after).visit(tree)))
            place += 1
    raise LookupError(str(mutant))


class _Swap(ast.NodeTransformer):
    def __init__(self, node: ast.AST, after: ast.AST) -> None:
        self.node, self.after = node, after

    def visit(self, node: ast.AST) -> ast.AST:
        return self.after if node is self.node else super().visit(node)
