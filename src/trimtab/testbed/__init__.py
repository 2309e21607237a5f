"""The embedded model: steering that can be measured exactly, without any download.

A small Qwen3 model, trained on a grammar whose words are exact evidence of what a text is about (five concepts), how it
feels (two tones) and who speaks (two roles). `path()` is its directory, `prompts` and `chat` give it something to say,
`score` counts what it said, `contrast` and `direction` make and give steering directions, and `surprisals` is the exact
loss of a perfect model. `trimtab.workflows.testbed.build` trains it again.
"""

from __future__ import annotations

from trimtab.testbed.assets import TestbedDirection, direction, path, training
from trimtab.testbed.exact import surprisals
from trimtab.testbed.grammar import ContrastSet, Document, Latents, chat, contrast, document, prompts
from trimtab.testbed.lexicon import ATTRIBUTES, CONCEPTS, ROLES, TONES, VOCABULARY
from trimtab.testbed.recipe import RECIPE, Recipe
from trimtab.testbed.scorer import Evidence, is_grammatical, score

__all__ = [
    "ATTRIBUTES",
    "CONCEPTS",
    "RECIPE",
    "ROLES",
    "TONES",
    "VOCABULARY",
    "ContrastSet",
    "Document",
    "Evidence",
    "Latents",
    "Recipe",
    "TestbedDirection",
    "chat",
    "contrast",
    "direction",
    "document",
    "is_grammatical",
    "path",
    "prompts",
    "score",
    "surprisals",
    "training",
]
