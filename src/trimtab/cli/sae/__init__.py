"""`trimtab sae VERB`: one file per verb, holding the function of its name; each is named here with its line."""

from __future__ import annotations

HELP = "Sparse autoencoders: train in mixed precision, evaluate, export."
VERBS = {
    "eval": "Evaluate autoencoders on one fixed set: FVU, L0, what the model loses, dead latents, examples.",
    "export": "Write an autoencoder in SAELens's format, or one latent as a steering.",
    "precision": "Measure what a precision would do to the tensors of a training, before it.",
    "train": "Train autoencoders or transcoders on the activations of a model, a trace or a synthetic dictionary.",
}
