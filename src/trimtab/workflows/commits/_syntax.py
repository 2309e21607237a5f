"""The difference of two Python files as pairs of syntax trees, without what has no bearing on numbers."""

from __future__ import annotations

import ast
import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

_LOGGERS = {"logger", "logging", "log", "_logger", "_log", "LOGGER", "LOG", "warnings"}
_LOG_CALLS = {"debug", "info", "warning", "warn", "error", "exception", "critical", "log"}
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One statement, or the head of a compound one, with where it stands."""

    node: ast.AST
    line: int
    scope: str
    """Qualified name of the function or class around it."""
    key: str
    """Equal for statements that do the same in the same place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The smallest parts in which two statements differ, and what is around them."""

    old: ast.AST | None
    new: ast.AST | None
    line: int
    scope: str
    around: tuple[ast.AST, ...] = field(default=())
    """Nodes of the new statement (the old one, when it is gone) from the statement down to the part."""
    whole: ast.AST
    """The statement."""


def clean(text: str) -> ast.Module:
    """Parse a file without docstrings, annotations, logging, printing and the texts of errors and options.

    Raises:
        SyntaxError: it is not Python of this interpreter's version.
        ValueError: it holds a null byte.
    """
    tree = _Cleaner().visit(ast.parse(text))
    assert isinstance(tree, ast.Module)
    return tree


def units(tree: ast.Module) -> list[Unit]:
    """Return the statements of a cleaned file in their order."""
    return list(_walk(tree.body, "", ()))


def differences(old: ast.Module | None, new: ast.Module | None) -> list[Difference]:
    """Return where two cleaned files differ; None is a file that does not exist."""
    before, after = (units(one) if one is not None else [] for one in (old, new))
    matcher = difflib.SequenceMatcher(None, [one.key for one in before], [one.key for one in after], autojunk=False)
    found: list[Difference] = []
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag == "equal":
            continue
        left, right = list(before[i:j]), list(after[k:m])
        for mine in list(left):
            twin = next((one for one in right if type(one.node) is type(mine.node) and one.scope == mine.scope), None)
            if twin is not None:
                left.remove(mine)
                right.remove(twin)
                parts = list(_parts(mine.node, twin.node, ()))
                moved = parts or [(mine.node, twin.node, ())]
                found += [
                    Difference(old=a, new=b, line=twin.line, scope=twin.scope, around=path, whole=twin.node)
                    for a, b, path in moved
                ]
        found += [Difference(old=one.node, new=None, line=one.line, scope=one.scope, whole=one.node) for one in left]
        found += [Difference(old=None, new=one.node, line=one.line, scope=one.scope, whole=one.node) for one in right]
    return found


def defined(tree: ast.Module) -> set[str]:
    """Return the names that a file defines: functions, classes, arguments, variables, attributes of self."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def renamed(old: ast.Module, new: ast.Module, gone: set[str], come: set[str]) -> dict[str, str] | None:
    """Return how names changed when two files differ in nothing else; None when they differ in more.

    Args:
        old: the file before.
        new: the file after.
        gone: names that were defined before and no longer are.
        come: names that are defined only now.
    """
    before, after = _places(old, gone), _places(new, come)
    mapping = dict(zip(before.seen, after.seen, strict=False))
    return mapping if len(before.seen) == len(after.seen) and before.text == after.text else None


class _Cleaner(ast.NodeTransformer):
    def _body(self, node: ast.AST) -> None:
        for block in _BLOCKS:
            body = getattr(node, block, None)
            if isinstance(body, list):
                kept = [one for one in body if not _is_silent(one)]
                setattr(node, block, kept or ([ast.Pass(lineno=0, col_offset=0)] if body and block == "body" else []))

    def generic_visit(self, node: ast.AST) -> ast.AST:
        self._body(node)
        return super().generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return node
        made = ast.Assign(targets=[node.target], value=node.value)
        return self.generic_visit(ast.copy_location(made, node))

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            node.keywords = [one for one in node.keywords if one.arg not in ("help", "metavar")]
        return self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return self.generic_visit(node)


def _is_silent(node: ast.AST) -> bool:
    """Whether a statement computes nothing that a number depends on: a docstring, a log line, a print, a pass."""
    if not isinstance(node, ast.Expr):
        return isinstance(node, ast.Pass)
    if isinstance(node.value, ast.Constant):
        return True
    call = node.value
    if not isinstance(call, ast.Call):
        return False
    if isinstance(call.func, ast.Name):
        return call.func.id == "print"
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
    return isinstance(call.func, ast.Attribute) and name in _LOGGERS and call.func.attr in _LOG_CALLS


def _walk(body: Sequence[ast.AST], scope: str, nest: tuple[str, ...]) -> Iterator[Unit]:
    for node in body:
        inner = [(name, block) for name in _BLOCKS if isinstance(block := getattr(node, name, None), list)]
        head = _head(node) if inner else node
        where = f"{scope}|{'/'.join(nest)}|"
        yield Unit(node=head, line=getattr(node, "lineno", 0), scope=scope, key=where + ast.dump(head))
        is_scope = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        name = f"{scope}.{node.name}".lstrip(".") if is_scope else scope  # type: ignore[attr-defined]
        for block_name, block in inner:
            step = () if is_scope else (*nest, f"{type(node).__name__}.{block_name}")
            yield from _walk(block, name, step)


def _head(node: ast.AST) -> ast.AST:
    """The node without its blocks."""
    made = type(node)(**{name: [] if name in _BLOCKS else value for name, value in ast.iter_fields(node)})
    return ast.copy_location(made, node) if isinstance(node, ast.stmt) else made


def _parts(
    old: ast.AST, new: ast.AST, path: tuple[ast.AST, ...]
) -> Iterator[tuple[ast.AST, ast.AST, tuple[ast.AST, ...]]]:
    """Yield the smallest pairs of nodes in which two trees differ."""
    if type(old) is not type(new):
        yield old, new, path
        return
    below = (*path, new)
    for name, mine in ast.iter_fields(old):
        theirs = getattr(new, name, None)
        if isinstance(mine, ast.AST) and isinstance(theirs, ast.AST):
            yield from _parts(mine, theirs, below)
        elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
            for a, b in zip(mine, theirs, strict=True):
                if isinstance(a, ast.AST) and isinstance(b, ast.AST):
                    yield from _parts(a, b, below)
                elif a != b:
                    yield old, new, path
        elif mine != theirs or type(mine) is not type(theirs):
            yield old, new, path


@dataclass(frozen=True, slots=True)
class _Places:
    text: str
    seen: list[str]


def _places(tree: ast.Module, names: set[str]) -> _Places:
    """The tree with each of some names as the number of its first appearance, and those names in that order."""
    seen: dict[str, int] = {}

    def show(value: object) -> str:
        if isinstance(value, ast.AST):
            inner = ",".join(f"{name}={show(one)}" for name, one in ast.iter_fields(value))
            return f"{type(value).__name__}({inner})"
        if isinstance(value, list):
            return f"[{','.join(map(show, value))}]"
        if isinstance(value, str) and value in names:
            return f"#{seen.setdefault(value, len(seen))}"
        return repr(value)

    text = show(_without_strings(tree, names))
    return _Places(text, list(seen))


def _without_strings(tree: ast.Module, names: set[str]) -> ast.Module:
    """A text that happens to be a name is no name: it is marked, so that a changed text is seen."""
    marked = copy.deepcopy(tree)
    for node in ast.walk(marked):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names:
            node.value = f"text:{node.value}"
    return marked


def consistent(mappings: Sequence[Mapping[str, str]]) -> bool:
    """Whether several files were renamed alike."""
    whole: dict[str, str] = {}
    return all(whole.setdefault(key, value) == value for one in mappings for key, value in one.items())
