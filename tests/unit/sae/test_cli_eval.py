"""`trimtab sae eval`, `precision` and `export`: what they print and write, and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.unit.sae.factory import Learned, config, sae
from trimtab.cli import main
from trimtab.report import render_html
from trimtab.results import PrecisionReport, SAEEvaluation, from_json, to_json
from trimtab.sae import SAE, check_precision, save

SITE = "layers.3.resid_post"
SYNTHETIC = ["synthetic:48x16", "--d-sae", "32", "--batch-size", "256", "--batches", "2"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two autoencoders of the testbed's width in the directory of a training."""
    generator = torch.Generator().manual_seed(0)
    for name, size in (("small", 16), ("large", 48)):
        tensors = {
            "W_enc": torch.randn(128, size, generator=generator) * 0.1,
            "W_dec": torch.randn(size, 128, generator=generator) * 0.1,
            "b_enc": torch.zeros(size),
            "b_dec": torch.zeros(128),
        }
        save(SAE.of(Learned(config("standard"), tensors), site=SITE), tmp_path / "run" / name)
    return tmp_path / "run"


def test_eval_prints_writes_and_reports(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.json").write_text(precision())
    page, out = tmp_path / "sae.html", tmp_path / "out"
    words = ["--tokens", "150", "--latent", "3", "--examples", "2", "--precision", str(tmp_path / "p.json")]
    code = main(["sae", "eval", str(saved), *words, "--html", str(page), "--out", str(out), "--json"])
    printed = capsys.readouterr().out
    assert code == 0
    found = from_json(SAEEvaluation, printed)
    assert [one.name for one in found.scores] == ["large", "small"]
    assert [[latent.latent for latent in one.latents] for one in found.scores] == [[3], [3]]
    assert found.scores[0].splice is not None
    assert from_json(SAEEvaluation, (out / "evaluation.json").read_text()) == found
    assert page.read_text() == render_html(found)
    assert len(found.precision) == 1


def precision() -> str:
    return to_json(check_precision("synthetic:48x16", d_sae=32, batch_size=256, buffer_rows=512, held_out=0, batches=1))


def test_precision_reports_what_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sae", "precision", *SYNTHETIC, "--dtype", "fp16", "--adam-trick", "--json"]) == 0
    found = from_json(PrecisionReport, capsys.readouterr().out)
    assert (found.dtype, found.compute, found.batches, found.batch_size) == ("float16", "float16", 2, 256)
    assert found.scales["g"] > 1
    assert main(["sae", "precision", *SYNTHETIC]) == 0
    assert "float32 stored, float32 computed: fits" in capsys.readouterr().out


def test_export_writes_and_says_what(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sae", "export", str(saved / "small"), "--out", str(tmp_path / "a")]) == 0
    assert "wrote cfg.json, sae_weights.safetensors in" in capsys.readouterr().out
    assert json.loads((tmp_path / "a" / "cfg.json").read_text())["architecture"] == "standard"
    words = ["--latent", "3", "--tokens", "100", "--scale", "0.5"]
    assert main(["sae", "export", str(saved / "small"), "--out", str(tmp_path / "b"), *words]) == 0
    text = capsys.readouterr().out
    assert "latent 3 fires on" in text and f"steering at {SITE} on all: 0.5 x" in text
    assert (tmp_path / "b" / "steering.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "nowhere"], "nowhere does not exist; give a directory"),
        (["eval"], "SAES requires an argument"),
        (["eval", "SAVED", "--data", "nowhere.txt"], "nowhere.txt"),
        (["eval", "SAVED", "--tokens", "1"], "at least 2 were expected"),
        (["eval", "SAVED", "--precision", "nowhere.json"], "nowhere.json cannot be read"),
        (["eval", "SAVED", "--site", "layers.99.resid_post"], "99"),
        (["export", "SAVED", "--out", "o"], "holds several autoencoders (large, small)"),
        (["export", "SAVED/small", "--out", "o", "--scale", "2"], "scale, positions or data are of a latent"),
        (["export", "SAVED/small", "--out", "o", "--latent", "16"], "latent 16 was asked for; there are 0 to 15"),
        (["precision", *SYNTHETIC, "--dtype", "bf16", "--lower-dtype", "fp16"], "one of fp32/fp32, fp32/bf16"),
        (["precision", "synthetic:48x16", "--batches", "0"], "batches is 0; at least 1"),
        (["precision", *SYNTHETIC, "--seeds", "1", "2"], "2 autoencoders were asked for"),
        (["precision", *SYNTHETIC, "--target-l0", "50"], "at most d_sae = 32 latents can be active"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.replace("SAVED", str(saved)) for word in words]
    assert main(["sae", *filled]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_the_site_of_weights_alone_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(sae(), tmp_path / "bare")
    assert main(["sae", "eval", str(tmp_path / "bare")]) == 2
    assert "does not say its site; give site=" in capsys.readouterr().err
