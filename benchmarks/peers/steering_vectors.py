"""One added vector through steering-vectors."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.remove(str(Path(__file__).parent))  # this file is called steering_vectors too
from steering_vectors import SteeringVector

sys.path.insert(0, str(Path(__file__).parent))
from _common import LAYER, SCALE, compare, generate, model, vector


def main() -> None:
    llama = model()
    steering = SteeringVector({LAYER: vector()}, "decoder_block")

    def steered() -> None:
        with steering.apply(llama, multiplier=SCALE):
            generate(llama)

    compare(steered, lambda: generate(llama))


if __name__ == "__main__":
    main()
