"""Mutation testing: changes a file in hundreds of small ways, and asks of each whether the tests notice.

    python tests/mutate.py answers.py tests/test_stopping.py          # a remote-code file, then pytest's arguments

Every mutant runs in a fork of a process that has collected the tests, so hundreds take minutes. (mutmut names modules
by their paths, but `locateanything` is a package that conftest.py makes; cosmic-ray starts torch anew for a mutant.)
What survives is printed, and means that a test is missing, or that the mutant is equivalent: it computes the same.
"""

from __future__ import annotations

import ast
import copy
import importlib
import os
import signal
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

COMPARISONS: dict[type, list[type]] = {
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In], ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.GtE], ast.Gt: [ast.GtE, ast.Lt],
    ast.GtE: [ast.Gt, ast.LtE],
}  # fmt: skip
OPERATORS: dict[type, list[type]] = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div, ast.Add], ast.Div: [ast.Mult],
    ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd],
}  # fmt: skip
OTHERS = {
    "any": "all", "all": "any", "min": "max", "max": "min", "amax": "amin", "amin": "amax", "argmax": "argmin",
    "minimum": "maximum", "maximum": "minimum", "cumprod": "cumsum", "cumsum": "cumprod", "sorted": "list",
    "zeros_like": "ones_like", "ones_like": "zeros_like", "bisect_left": "bisect_right", "bisect_right": "bisect_left",
}  # fmt: skip
LEFT_OUT = {"masked_fill", "cumprod", "clamp", "clone", "minimum", "softmax", "cumsum", "reverse", "append", "extend"}

# Where a node is: the fields that lead to it, each with a place if it holds a list
Route = tuple[tuple[str, int | None], ...]


def with_(node: Any, **fields: Any) -> Any:
    """A copy of a node with other fields."""
    node = copy.deepcopy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def without(node: Any, field: str, place: int) -> Any:
    values = list(getattr(node, field))
    del values[place]
    return with_(node, **{field: values})


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What stands in a node's place, one mutant each."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for other in COMPARISONS.get(type(operator), []):
                yield with_(node, ops=[*node.ops[:place], other(), *node.ops[place + 1 :]])
    elif isinstance(node, ast.BinOp):
        yield from (with_(node, op=other()) for other in OPERATORS.get(type(node.op), []))
        if isinstance(node.op, (ast.BitAnd, ast.BitOr, ast.Add, ast.Sub)):
            yield node.left
        if isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            yield node.right
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.BoolOp):
        yield with_(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for place in range(len(node.values)):
            fewer = without(node, "values", place)
            yield fewer if len(fewer.values) > 1 else fewer.values[0]
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif isinstance(node.value, (int, float)):
            step = 1 if isinstance(node.value, int) else 0.005
            yield from (ast.Constant(node.value + step), ast.Constant(node.value - step))
    elif isinstance(node, ast.Call):
        yield from variants_of_a_call(node)
    elif isinstance(node, ast.Slice):
        yield from (with_(node, **{end: None}) for end in ("lower", "upper") if getattr(node, end))
    elif isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == "roles":
            yield with_(node, attr="mask")
    elif isinstance(node, ast.If):
        tests = (ast.UnaryOp(ast.Not(), node.test), ast.Constant(True), ast.Constant(False))
        yield from (with_(node, test=test) for test in tests)
    elif isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    elif isinstance(node, (ast.Expr, ast.AugAssign, ast.Break)) or (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)
    ):
        yield ast.Pass()


def variants_of_a_call(node: ast.Call) -> Iterator[ast.AST]:
    function = node.func
    name = getattr(function, "attr", None) or getattr(function, "id", "")
    if name in OTHERS:
        field = "attr" if isinstance(function, ast.Attribute) else "id"
        yield with_(node, func=with_(function, **{field: OTHERS[name]}))
    if name in LEFT_OUT and isinstance(function, ast.Attribute):
        yield function.value
    if name == "where":
        condition, one, other = node.args
        yield from (one, other, with_(node, args=[condition, other, one]))
    if name == "_replace":
        yield from (without(node, "keywords", place) for place in range(len(node.keywords)))


def sites(node: ast.AST, path: Route = ()) -> Iterator[tuple[Route, ast.AST]]:
    """All nodes that compute, with where they are; not annotations, docstrings, imports and errors."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "ctx", "names", "format_spec"):
            continue
        for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            told = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            skipped = isinstance(child, (ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr))
            if not isinstance(child, ast.AST) or told or skipped:
                continue
            yield (*path, (field, place)), child
            yield from sites(child, (*path, (field, place)))


def put(tree: ast.Module, path: Route, new: ast.AST) -> ast.Module:
    """A copy of the file with another node at a place."""
    tree = copy.deepcopy(tree)
    at: Any = tree
    for field, place in path[:-1]:
        at = getattr(at, field) if place is None else getattr(at, field)[place]
    field, place = path[-1]
    if place is None:
        setattr(at, field, copy.deepcopy(new))
    else:
        getattr(at, field)[place] = copy.deepcopy(new)
    return ast.fix_missing_locations(tree)


class Mutation:
    """A pytest plugin that runs the collected tests once for the file as it is and once for each mutant."""

    def __init__(self, file: Path):
        self.file, self.name = file, f"locateanything.{file.stem}"
        self.tree = ast.parse(file.read_text(encoding="utf-8"))
        self.tried = self.survived = 0
        self.seconds = 0  # that a mutant may take; 0 for any number

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        started = time.monotonic()
        if not self.passes(session, self.tree):
            pytest.exit("the tests fail without any change", returncode=2)
        self.seconds = 10 + 3 * int(time.monotonic() - started)  # more is an endless loop
        before = ast.unparse(self.tree).splitlines()
        for path, node in sites(self.tree):
            for new in variants(node):
                mutant = put(self.tree, path, new)
                self.tried += 1
                if self.passes(session, mutant):
                    self.survived += 1
                    after = ast.unparse(mutant).splitlines()
                    changed = " / ".join(b.strip() for a, b in zip(before, after, strict=False) if a != b)
                    print(f"{self.file.name}:{getattr(node, 'lineno', '?')} survived: {changed[:150]}", flush=True)
        print(f"{self.file.name}: {self.tried} mutants, {self.tried - self.survived} killed, {self.survived} survived")
        return True

    def passes(self, session: pytest.Session, tree: ast.Module) -> bool:
        """Whether the tests pass in a fork with this in the file's place."""
        child = os.fork()
        if not child:
            try:
                signal.alarm(self.seconds)
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                os.dup2(quiet, 2)
                self.take_the_place(tree)
                for item in session.items:
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                    if session.testsfailed:
                        os._exit(1)
                os._exit(0)
            finally:  # a mutant that cannot even be imported
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def take_the_place(self, tree: ast.Module) -> None:
        """Runs the mutant as a module, and gives its functions and classes to all who have imported the file's."""
        old, new = importlib.import_module(self.name), types.ModuleType(self.name)
        new.__package__, new.__file__ = old.__package__, old.__file__
        sys.modules[self.name] = new
        exec(compile(tree, str(self.file), "exec"), new.__dict__)
        for module in list(sys.modules.values()):
            if not getattr(module, "__name__", "").startswith(("locateanything.", "tests.")) or module in (old, new):
                continue
            for key, value in list(vars(module).items()):
                if getattr(value, "__module__", None) == self.name and getattr(old, key, None) is value:
                    setattr(module, key, getattr(new, key))
                bases = tuple(getattr(new, base.__name__, base) for base in getattr(value, "__bases__", ()))
                if isinstance(value, type) and any(base.__module__ == self.name for base in value.__bases__):
                    value.__bases__ = bases


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    hypothesis.settings.register_profile(
        "mutants", derandomize=True, database=None, deadline=None, max_examples=100,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )  # fmt: skip
    hypothesis.settings.load_profile("mutants")
    sys.path.insert(0, os.getcwd())
    mutation = Mutation(Path(sys.argv[1]))
    options = ["-x", "-q", "-s", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
    code = pytest.main([*options, *sys.argv[2:]], plugins=[mutation])
    sys.exit(code or mutation.survived > 0)
