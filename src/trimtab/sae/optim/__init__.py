"""How parameters move: schedules, the control of the sparsity, and the update of what is stored."""

from __future__ import annotations

from trimtab.sae.optim.control import SparsityControl
from trimtab.sae.optim.schedule import lr_factor, sparsity_factor
from trimtab.sae.optim.update import Updater

__all__ = ["SparsityControl", "Updater", "lr_factor", "sparsity_factor"]
