"""A module imports only from lower floors or from its own package; heavy libraries stay behind their fences."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "trimtab"

FLOORS = [
    {"_version", "errors", "sites", "_base"},
    {"numerics", "stats", "results"},
    {"trace", "architectures", "steering", "hooks", "testbed"},
    {"backends", "dump", "directions"},
    {"compare", "vectors", "sae", "weights", "evaluate"},
    {"workflows"},
    {"report"},
    {"cli", "testing"},
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
# Inside the lowest floor the order is _version, errors, _base, sites; the floors above must not know each other.
BOTTOM = ("_version", "errors", "_base", "sites")

FENCES = {
    "transformers": ("backends/hf", "architectures", "vectors/train", "workflows/testbed", "testing"),
    "vllm": ("backends/vllm", "architectures"),
    "ray": ("workflows",),
    "plotly": ("report",),
    "matplotlib": ("report",),
}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imported(path: Path) -> list[str]:
    """Return every imported module, function-level imports included, relative ones made absolute."""
    tree = ast.parse(path.read_text())
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write absolute imports"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            names += [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return names


def test_every_package_has_a_floor() -> None:
    found = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in modules()} - {"__init__", "__main__"}
    assert found <= FLOOR_OF.keys(), f"no floor for {sorted(found - FLOOR_OF.keys())}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "trimtab" or len(parts) == 1 or parts[1] not in FLOOR_OF or parts[1] == own:
            continue
        target = parts[1]
        allowed = FLOOR_OF[target] < FLOOR_OF[own] or (
            own in BOTTOM and target in BOTTOM and BOTTOM.index(target) < BOTTOM.index(own)
        )
        assert allowed, f"{path.relative_to(SOURCE)} (floor {FLOOR_OF[own]}) imports {name} (floor {FLOOR_OF[target]})"


def test_the_report_stands_on_results_alone() -> None:
    for path in (SOURCE / "report").rglob("*.py"):
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "trimtab" and len(parts) > 1:
                assert parts[1] in {"report", "results", "_base", "errors", "_version"}, f"{path.name} imports {name}"


@pytest.mark.parametrize("library", FENCES)
def test_heavy_libraries_stay_behind_their_fence(library: str) -> None:
    for path in modules():
        inside = path.relative_to(SOURCE).with_suffix("").as_posix()
        for name in imported(path):
            if name.split(".")[0] == library:
                assert inside.startswith(FENCES[library]), f"{inside} imports {library}, fenced to {FENCES[library]}"


def imported_at_start(path: Path) -> list[str]:
    """Return what is imported when a module is, in the order of its text."""
    names: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_no_import_cycle_inside_a_package() -> None:
    """Packages may import their own modules, but never in a circle when they are loaded."""
    graph: dict[str, set[str]] = {}
    names = {path: ".".join(("trimtab", *path.relative_to(SOURCE).with_suffix("").parts)) for path in modules()}
    known = set(names.values())
    for path, name in names.items():
        targets = set()
        for one in imported_at_start(path):
            module = one if one in known else one.rpartition(".")[0]
            if module in known and module != name:
                targets.add(module)
        graph[name] = targets
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
