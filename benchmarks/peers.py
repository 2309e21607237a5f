"""Make an environment for every peer in .bench-peers, and measure one added vector there and here.

Each peer's script adds one vector at one layer of the same random Llama (from its config, seeded) during greedy
generation, and times it against the same generation unsteered, in interleaved pairs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "peers"
ENVIRONMENTS = Path(__file__).parents[1] / ".bench-peers"
PEERS = {
    "trimtab": (),
    "steering_vectors": ("steering-vectors==0.12.2", "transformers==4.57.6", "torch==2.13.0"),
    "repeng": ("repeng==0.4.0", "torch==2.13.0"),
}


AUTOENCODERS = {
    "sae_lens": ("sae-lens==6.54.12", "torch==2.13.0"),
    "dictionary_learning": ("dictionary-learning==0.1.0", "transformers==4.49.0", "torch==2.13.0"),
}
"""Trainers of autoencoders, which `sae_throughput.py` runs."""

UNWANTED = {"dictionary_learning": "torchvision"}
"""What a peer brings that does not fit this torch."""


def home(peer: str) -> Path:
    """Return the directory of a peer's environment."""
    return ENVIRONMENTS / peer


def python(peer: str, packages: tuple[str, ...]) -> str:
    """Return the interpreter of a peer's environment, made when it is not there."""
    if not packages:
        return sys.executable
    folder = home(peer)
    interpreter = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(interpreter), "-m", "pip", "install", "--quiet", *packages], check=True)
        unwanted = UNWANTED.get(peer)
        if unwanted:
            subprocess.run([str(interpreter), "-m", "pip", "uninstall", "--quiet", "--yes", unwanted], check=True)
        (folder / ".installed").touch()
    return str(interpreter)


def main() -> None:
    print(f"{'system':20} {'steered / unsteered, CPU seconds (median of pairs)':>52}")
    for peer, packages in PEERS.items():
        done = subprocess.run(
            [python(peer, packages), str(FOLDER / f"{peer}.py")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            print(f"{peer:20} {'failed, see above':>52}", flush=True)
            continue
        ratios = json.loads(done.stdout.splitlines()[-1])["ratios"]
        print(f"{peer:20} {statistics.median(ratios):52.3f}", flush=True)
    for peer, packages in AUTOENCODERS.items():
        python(peer, packages)
    subprocess.run([sys.executable, str(FOLDER.parent / "sae_throughput.py")], check=False)


if __name__ == "__main__":
    main()
