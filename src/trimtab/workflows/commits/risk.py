"""How risky a commit is for numbers, from the syntax trees of what it changed.

LOW: documentation, tests, formatting, annotations, logging, messages, imports, names, interface. MEDIUM: other
code. HIGH: code about scaling, gradients or precision, told by the identifiers and operators in and around the
changed parts. What has no syntax tree here is rated by its kind of file; when in doubt, higher.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from trimtab.results.commits import Risk, RiskReason
from trimtab.workflows.commits import _syntax
from trimtab.workflows.commits._git import Change

_ORDER: dict[Risk, int] = {"LOW": 0, "MEDIUM": 1, "HIGH": 2}
MAX_REASONS = 12

_WORDS = {
    "precision": re.compile(
        r"(b?float|bf|fp|tf|int|uint)\d+\w*|half|double|dtypes?|astype|autocast|amp|quant\w*|dequant\w*|casts?|upcast|"
        r"downcast|precision|e4m3\w*|e5m2\w*|matmul_precision|deterministic"
    ),
    "gradients": re.compile(
        r"backward|grads?|gradients?|detach|requires_grad_?|inference_mode|optimi[sz]er|optim|accum\w*|all_reduce|"
        r"allreduce|reduce_scatter|zero_grad|autograd|checkpoint|ctx|adamw?|sgd|loss"
    ),
    "scaling": re.compile(
        r"scal(e|es|ed|er|ing)|temperature|eps|epsilon|r?sqrt|softmax|log_?softmax|norm|norms|normali[sz]e\w*|\w*norm|lr|"
        r"decay|momentum|betas?|gain|std|clamp|clip|theta|warmup|softcap|divide|div|mul|mean|variance|var"
    ),
}
_DOCS = {".md", ".rst", ".txt", ".adoc", ".png", ".jpg", ".jpeg", ".svg", ".gif", ".ipynb", ".cff"}
_DOC_NAMES = {"LICENSE", "NOTICE", "AUTHORS", "CHANGELOG", "CODEOWNERS", ".gitignore", ".gitattributes", ".mailmap"}
_KERNELS = {".cu", ".cuh", ".cpp", ".cc", ".c", ".h", ".hpp", ".hip", ".metal", ".ptx", ".pyx", ".so"}
_ASSIGNED = {"__all__", "__version__", "__author__", "logger", "_logger", "log"}


def rate(changes: Sequence[Change]) -> tuple[Risk, tuple[RiskReason, ...]]:
    """Rate what a commit changed.

    Returns:
        The highest rating, and the reasons for it, the highest first.
    """
    trees = {change.path: _trees(change) for change in changes if _is_code(change)}
    renames = _renames(trees)
    found: list[RiskReason] = []
    for change in changes:
        pair = trees.get(change.path)
        if pair is None:
            found.append(_by_kind(change))
        elif change.path in renames:
            found.append(_reason("LOW", change, 0, _rename_text(renames[change.path])))
        else:
            found += _by_tree(change, *pair)
    found.sort(key=lambda one: -_ORDER[one.risk])
    unique = list(dict.fromkeys(found))
    return (unique[0].risk if unique else "LOW"), tuple(unique[:MAX_REASONS])


def _is_code(change: Change) -> bool:
    return change.path.endswith(".py") and not _is_test(change.path) and (change.old, change.new) != (None, None)


def _is_test(path: str) -> bool:
    parts = PurePosixPath(path)
    return any(one in ("tests", "test", "testing") for one in parts.parts[:-1]) or bool(
        re.fullmatch(r"(test_.*|.*_test|conftest)\.py", parts.name)
    )


def _trees(change: Change) -> tuple[ast.Module | None, ast.Module | None] | None:
    """Both sides, cleaned; None when one of them cannot be parsed."""
    try:
        old, new = (_syntax.clean(text) if text is not None else None for text in (change.old, change.new))
    except (SyntaxError, ValueError, RecursionError):
        return None
    return old, new


def _by_kind(change: Change) -> RiskReason:
    path = PurePosixPath(change.path)
    if _is_test(change.path):
        return _reason("LOW", change, 0, "test")
    if path.suffix == ".py":
        return _reason("HIGH", change, 0, "not Python that can be parsed here; rated high to be safe")
    if path.suffix in _DOCS or path.stem in _DOC_NAMES or path.name in _DOC_NAMES:
        return _reason("LOW", change, 0, "documentation")
    if path.suffix in _KERNELS:
        return _reason("HIGH", change, 0, "compiled kernel: it may change any rounding")
    return _reason("MEDIUM", change, 0, "configuration, data or another language")


def _by_tree(change: Change, old: ast.Module | None, new: ast.Module | None) -> Iterator[RiskReason]:
    found = _syntax.differences(old, new)
    if not found:
        what = "moved" if change.old_path != change.path else "comments, formatting, annotations, logging or messages"
        yield _reason("LOW", change, 0, what)
    rebound = _rebound(old, new)
    for one in found:
        risk, what = _difference(one, rebound)
        where = f" in {one.scope}" if one.scope else ""
        yield _reason(risk, change, one.line, what + where)


def _difference(one: _syntax.Difference, rebound: set[str]) -> tuple[Risk, str]:
    low = _harmless(one, rebound)
    if low:
        return "LOW", low
    parts = [part for part in (one.old, one.new) if part is not None]
    words = {word for part in parts for node in ast.walk(part) for word in _identifiers(node)}
    words |= {word for node in one.around for word in _own_identifiers(node)}
    for kind, pattern in _WORDS.items():
        hits = sorted(word for word in words if _matches(pattern, word))
        if hits:
            return "HIGH", f"{kind}: {', '.join(hits[:3])}"
    if any(isinstance(node, ast.BinOp) and _is_factor(node.op) for node in (*one.around[-2:], *parts)):
        return "HIGH", "scaling: a product, a quotient or a power"
    return "MEDIUM", _kind(one)


def _harmless(one: _syntax.Difference, rebound: set[str]) -> str:
    """In words, what a change is when no number can depend on it; empty when one may."""
    whole = one.whole
    if isinstance(whole, (ast.Import, ast.ImportFrom)):
        return "" if {alias.asname or alias.name for alias in whole.names} & rebound else "imports"
    if isinstance(whole, ast.Assign) and {node.id for node in whole.targets if isinstance(node, ast.Name)} & _ASSIGNED:
        return "interface"
    if isinstance(whole, (ast.Pass, ast.Global, ast.Nonlocal)):
        return "formatting"
    call = whole.value if isinstance(whole, ast.Expr) and (one.old is None or one.new is None) else None
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
        return "command line"
    return ""


def _rebound(old: ast.Module | None, new: ast.Module | None) -> set[str]:
    """Names that both versions import, from different places."""
    before, after = ({} if tree is None else _imported(tree) for tree in (old, new))
    return {name for name in before.keys() & after.keys() if before[name] != after[name]}


def _imported(tree: ast.Module) -> dict[str, str]:
    return {
        alias.asname or alias.name: f"{getattr(node, 'module', '')}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }


def _matches(pattern: re.Pattern[str], word: str) -> bool:
    """Whether an identifier, or a word of it, is about the matter."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", word).lower().split("_")
    return any(pattern.fullmatch(one) for one in (word.lower(), *parts))


def _identifiers(node: ast.AST) -> Iterator[str]:
    for name in ("id", "attr", "arg", "name"):
        value = getattr(node, name, None)
        if isinstance(value, str):
            yield value
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        name = node.value.lstrip("-").replace("-", "_")  # of an option, too
        if name.isidentifier():
            yield name


def _own_identifiers(node: ast.AST) -> Iterator[str]:
    """What a node around a change says about it: its keyword, the function called, the variable or option."""
    yield from _identifiers(node)
    said: list[ast.AST] = []
    if isinstance(node, ast.Call):
        named = getattr(node.func, "attr", "") == "add_argument"
        said = [node.func, *(one for one in node.args if named)]
    elif isinstance(node, (ast.Assign, ast.AugAssign)):
        said = list(node.targets) if isinstance(node, ast.Assign) else [node.target]
    for one in said:
        for inner in ast.walk(one):
            yield from _identifiers(inner)


def _is_factor(op: ast.operator) -> bool:
    return isinstance(op, (ast.Mult, ast.Div, ast.Pow, ast.MatMult))


def _kind(one: _syntax.Difference) -> str:
    name = type(one.whole).__name__
    words = {"FunctionDef": "function", "ClassDef": "class", "Assign": "assignment", "Expr": "call", "If": "condition"}
    what = words.get(name, name.lower())
    return f"{what} {'removed' if one.new is None else 'added' if one.old is None else 'changed'}"


def _renames(trees: dict[str, tuple[ast.Module | None, ast.Module | None] | None]) -> dict[str, dict[str, str]]:
    """Files that differ in names only, when every one of them was renamed alike."""
    pairs = {path: (pair[0], pair[1]) for path, pair in trees.items() if pair and pair[0] and pair[1]}
    before = {name for old, _ in pairs.values() if old for name in _syntax.defined(old)}
    after = {name for _, new in pairs.values() if new for name in _syntax.defined(new)}
    found = {}
    for path, (old, new) in pairs.items():
        assert old is not None and new is not None
        mapping = _syntax.renamed(old, new, before - after, after - before)
        if mapping:
            found[path] = mapping
    return found if _syntax.consistent(list(found.values())) else {}


def _rename_text(mapping: dict[str, str]) -> str:
    shown = ", ".join(f"{old} -> {new}" for old, new in list(mapping.items())[:3])
    return f"names: {shown}{', ...' * (len(mapping) > 3)}"


def _reason(risk: Risk, change: Change, line: int, what: str) -> RiskReason:
    return RiskReason(risk=risk, file=change.path, line=line, what=what)
