"""Put first on PYTHONPATH by `trimtab dump -- CMD`: turns dumping on in a process once it has imported torch."""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType


class _AfterTorch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch as the others would, and begins when it has been executed."""

    def __init__(self) -> None:
        self._loader: importlib.abc.Loader | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None and module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        try:
            from trimtab.dump.environment import start
        except ImportError as error:  # another Python, such as that of a tool the program starts
            sys.stderr.write(f"trimtab: {sys.executable} has no trimtab ({error}); this process is not recorded\n")
            return
        start()


def _run_hidden() -> None:
    """Run the sitecustomize that this one hides."""
    here = os.path.realpath(os.path.join(__file__, os.pardir))  # noqa: PTH118 - pathlib would slow every start
    others = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if os.environ.get("TRIMTAB_DUMP"):
    sys.meta_path.insert(0, _AfterTorch())
_run_hidden()
