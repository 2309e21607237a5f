"""`trimtab evaluate VERB`: one file per verb, holding the function of its name; each is named here with its line."""

from __future__ import annotations

HELP = "Does the steering work? Rollouts, scores, statistics."
VERBS = {
    "rollouts": "Let every variant continue every prompt, some samples each; one directory, resumable.",
    "score": "Score rollouts: effect, side effects, dose-response, and the strength that holds up.",
    "stress": "Vectors from more and more data: how well each steers, at what cost, and where more adds nothing.",
}
