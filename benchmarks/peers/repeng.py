"""One added vector through repeng."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.remove(str(Path(__file__).parent))  # this file is called repeng too
from repeng import ControlModel, ControlVector

sys.path.insert(0, str(Path(__file__).parent))
from _common import LAYER, SCALE, compare, generate, model, vector


def main() -> None:
    llama, control = model(), ControlModel(model(), [LAYER])
    control.set_control(ControlVector("llama", {LAYER: vector().numpy()}), SCALE)
    compare(lambda: generate(control), lambda: generate(llama))


if __name__ == "__main__":
    main()
