"""`trimtab vectors VERB`: one file per verb, holding the function of its name; each is named here with its line."""

from __future__ import annotations

HELP = "Steering vectors: extract, train, clean, compare."
VERBS = {
    "clean": "Remove from vectors what has nothing to do with their concepts, and measure what that costs.",
    "compare": "Compare vectors: cosines, norms, validation losses, trained against extracted.",
    "convert": "Write a vector in another format.",
    "extract": "Make steering vectors from contrast data, one per site, and choose the best site.",
    "random": "Write a control of a vector: another direction of the same norm.",
    "show": "Say what a vector file holds.",
    "sweep-lr": "Train with many learning rates, one after the other, and say which is best.",
    "train": "Train steering vectors or low-rank maps; with --all, on every data set of a folder.",
}
