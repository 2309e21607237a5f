"""`trimtab weights VERB`: one file per verb, holding the function of its name; each is named here with its line."""

from __future__ import annotations

HELP = "What training changed, read from the weights of two models through directions."
VERBS = {
    "attention": "Compare who attends to whom, and what attention writes, head by head.",
    "mlp": "Compare what every layer's MLP answers to each direction.",
    "susceptibility": "Compare what every weight matrix makes of each direction, and the matrices themselves.",
}
