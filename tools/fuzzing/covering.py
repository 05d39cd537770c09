"""Counts which blocks of a module ran: its source is compiled anew with a counter in each branch.

No tracing: a counter costs some tens of nanoseconds, so that what is covered runs at about half of its speed.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

__all__ = ["Blocks", "copied", "install"]

_HITS, _MARK = "__hits__", "__mark__"


class Blocks(ast.NodeTransformer):
    """Puts `__hits__[n] += 1` at the start of each block, and `__mark__(n)` between the operands of `and` and `or`.

    Args:
        numbers: gives the next block's number.
        counted: count up to 255 and over to 0 again; without, it is only said that a block ran.
    """

    def __init__(self, numbers: Iterator[int], *, counted: bool) -> None:
        self._numbers = numbers
        hit = f"{_HITS}[{{0}}] = {_HITS}[{{0}}] + 1 & 255" if counted else f"{_HITS}[{{0}}] = 1"
        self._hit = hit

    def compiled(self, source: str | bytes, path: str) -> CodeType:
        tree = self.visit(ast.parse(source, path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if not isinstance(node, ast.Module | ast.ClassDef | ast.Lambda):
            for field in ("body", "orelse", "finalbody"):
                block = getattr(node, field, None)
                if isinstance(block, list) and block:
                    self._begin(block)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        """`a or b` becomes `a or mark(n) or b`, where mark gives None; `a and b` becomes `a and not mark(n) and b`."""
        super().generic_visit(node)
        operands: list[ast.expr] = [node.values[0]]
        for operand in node.values[1:]:
            call = f"{_MARK}({next(self._numbers)})"
            operands.append(ast.parse(call if isinstance(node.op, ast.Or) else f"not {call}", mode="eval").body)
            operands.append(operand)
        node.values = operands
        return node

    def _begin(self, block: list[Any]) -> None:
        first = block[0]
        documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        block[documented:documented] = ast.parse(self._hit.format(next(self._numbers))).body


def _marker(hits: MutableSequence[int]) -> Callable[[int], None]:
    def mark(number: int) -> None:
        hits[number] = 1

    return mark


def copied(name: str, hits: MutableSequence[int]) -> tuple[ModuleType, int]:
    """A second copy of a module, which counts into `hits`; the one that others import stays as it is.

    Returns: the copy, and how many blocks it has.
    """
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert isinstance(spec.loader, SourceFileLoader)
    module = importlib.util.module_from_spec(spec)
    vars(module).update({_HITS: hits, _MARK: _marker(hits)})
    numbers = iter(range(len(hits)))
    code = Blocks(numbers, counted=True).compiled(spec.loader.get_data(spec.loader.path), spec.loader.path)
    exec(code, vars(module))
    return module, next(numbers)


class _Loader(SourceFileLoader):
    """Never takes bytecode that was compiled before."""

    def __init__(self, loader: SourceFileLoader, finder: _Finder) -> None:
        super().__init__(loader.name, loader.path)
        self._finder = finder

    def get_code(self, fullname: str) -> CodeType:
        return Blocks(self._finder.numbers, counted=False).compiled(self.get_data(self.path), self.path)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update({_HITS: self._finder.hits, _MARK: self._finder.mark})
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, prefixes: tuple[str, ...], hits: MutableSequence[int]) -> None:
        self.numbers = iter(range(len(hits)))
        self.hits = hits
        self.mark = _marker(hits)
        self._prefixes = prefixes

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(self._prefixes):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader, self)
        return spec


def install(prefixes: tuple[str, ...], hits: MutableSequence[int]) -> None:
    """From now on, modules of these names are imported with their blocks marked in `hits`."""
    sys.meta_path.insert(0, _Finder(prefixes, hits))
