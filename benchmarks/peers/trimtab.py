"""One added vector through the Hugging Face backend."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.remove(str(Path(__file__).parent))  # this file is called trimtab too
import trimtab as tt
from trimtab.backends import Request

sys.path.insert(0, str(Path(__file__).parent))
from _common import LAYER, PROMPT, SCALE, TOKENS, compare, model, vector


def main() -> None:
    backend = tt.open_backend("hf", model())
    steering = tt.Steering({f"layers.{LAYER}.resid_post": [tt.Add(vector(), scale=SCALE)]})

    def run(spec: tt.Steering | None) -> None:
        prompt = tuple(PROMPT[0].tolist())
        backend.generate([Request(prompt=prompt, max_new_tokens=TOKENS, ignore_eos=True, steering=spec)])

    compare(lambda: run(steering), lambda: run(None))


if __name__ == "__main__":
    main()
