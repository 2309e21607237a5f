"""The public surface: what is exported exists, loads lazily, and changes only on purpose."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab

GOLD = Path(__file__).parents[1] / "gold" / "signatures.txt"
PACKAGES = (
    "numerics",
    "trace",
    "architectures",
    "steering",
    "backends",
    "directions",
    "dump",
    "compare",
    "report",
    "results",
    "sae",
    "weights",
)


def test_all_names_the_lazy_exports_and_nothing_else() -> None:
    assert trimtab.__all__ == sorted(trimtab.__all__)
    assert set(trimtab.__all__) - {"__version__"} == set(trimtab._WHERE)
    for name in trimtab.__all__:
        assert getattr(trimtab, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = trimtab.nonsense


def test_a_function_keeps_its_name_when_the_package_of_that_name_is_imported() -> None:
    code = "import trimtab.compare, trimtab.report, trimtab as tt; print(tt.compare.__name__, tt.report.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["compare", "report"]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_exports_what_it_says(package: str) -> None:
    module = importlib.import_module(f"trimtab.{package}")
    for name in module.__all__:
        assert hasattr(module, name), f"trimtab.{package}.{name} is in __all__ and does not exist"
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and str(getattr(value, "__module__", "")).startswith(f"trimtab.{package}")
        and not inspect.ismodule(value)
    }
    assert public <= set(module.__all__), f"public by accident: {sorted(public - set(module.__all__))}"


@pytest.mark.parametrize(
    "module", ["trimtab", "trimtab.errors", "trimtab.sites", "trimtab.results", "trimtab.report", "trimtab.cli"]
)
def test_light_modules_import_no_torch(module: str) -> None:
    heavy = {"torch", "transformers", "vllm", "numba"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def signatures() -> str:
    lines = []
    for name in trimtab.__all__:
        value = getattr(trimtab, name)
        if callable(value) and not (isinstance(value, type) and issubclass(value, Exception)):
            lines.append(f"{name}({', '.join(parameter(one) for one in inspect.signature(value).parameters.values())})")
    return "\n".join(lines) + "\n"


def parameter(one: inspect.Parameter) -> str:
    """Kind, name and default; of a default that is an object, its type alone."""
    star = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(one.kind, "")
    mark = "kw " if one.kind is inspect.Parameter.KEYWORD_ONLY else star
    if one.default is inspect.Parameter.empty:
        return f"{mark}{one.name}"
    plain = isinstance(one.default, (str, int, float, bool, tuple, type(None)))
    return f"{mark}{one.name}={one.default!r}" if plain else f"{mark}{one.name}=<{type(one.default).__name__}>"


def test_signatures_change_on_purpose() -> None:
    """Write them again with: python tests/contracts/test_exports.py > tests/gold/signatures.txt"""
    assert signatures() == GOLD.read_text()


if __name__ == "__main__":
    sys.stdout.write(signatures())
