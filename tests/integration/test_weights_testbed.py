"""The testbed, fine-tuned on one tone: that tone's direction is among what the MLPs changed most."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab import testbed
from trimtab.testbed import lexicon
from trimtab.weights import DirectionSet, isotropic, measure_mlp, read_directions

STEPS, ROWS, RATE = 60, 8, 2e-4
SEEDS = [5, *(pytest.param(seed, marks=pytest.mark.full) for seed in (6, 7, 8, 9))]


def tune(tone: str, seed: int, folder: Path) -> tuple[Path, Path]:
    """Train a few steps on the words of one tone, in passages that are otherwise as before."""
    tokenizer = AutoTokenizer.from_pretrained(testbed.path())
    model = AutoModelForCausalLM.from_pretrained(testbed.path(), dtype=torch.float32)
    model.save_pretrained(folder / "base")
    texts = testbed.contrast(tone, STEPS * ROWS, seed=seed, sentences=4).positive  # type: ignore[arg-type]
    encoded = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    length = min(map(len, encoded))
    words = set(tokenizer.convert_tokens_to_ids(sorted(lexicon.evidence_words(tone))))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for step in range(STEPS):
        batch = torch.stack([one[:length] for one in encoded[step * ROWS : (step + 1) * ROWS]])
        labels = batch.clone()
        labels[~torch.isin(batch, torch.tensor(sorted(words)))] = -100
        model(batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tone", testbed.TONES)
def test_the_tone_is_found_at_the_focus_layers(tone: str, seed: int, tmp_path: Path) -> None:
    own = read_directions([f"testbed:{name}" for name in testbed.ATTRIBUTES])
    others = isotropic(50 - len(own), own.hidden_size, seed=9).units
    given = own + DirectionSet.of([(f"random {place}", row) for place, row in enumerate(others)])
    assert len(given) == 50
    report = measure_mlp(*tune(tone, seed, tmp_path), given).report
    assert [one.measure for one in report.focus] == ["absolute", "angular"]
    for focus in report.focus:
        assert f"vector {tone}" in focus.top[:3], (focus.measure, focus.layer, focus.top)
        assert focus.value > focus.control_value
