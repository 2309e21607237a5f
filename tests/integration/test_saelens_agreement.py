"""Autoencoders go to the real sae-lens and back: the same latents, the same reconstruction."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.sae import learners
from tests.unit.sae.factory import Learned, config, parameters, sae
from trimtab.sae import Learner, Precision
from trimtab.sae.files import load, save
from trimtab.sae.model import SAE

ORACLE = Path(sys.prefix) / "sae-lens-oracle"
PROGRAM = Path(__file__).with_name("saelens_oracle.py")
THEIRS = (
    "standard",
    "not-centred",
    "jumprelu",
    "topk",
    "topk-rescaled",
    "gated",
    "transcoder",
    "jumprelu-transcoder",
    "scaled",
    "topk-training",
    "batchtopk-training",
)
OURS = ("standard", "jumprelu", "topk", "gated", "batchtopk", "matryoshka-batchtopk", "matryoshka-jumprelu")
LEARNED = tuple(kind for kind in learners.CONFIGS if "batchtopk" not in kind)
"""The latents that a BatchTopK training sees depend on its batch; after it they go by a threshold."""
NORM = 3.4
# Both compute in float32 and in one order of operations; SAELens's folds round a weight once more.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def trained(kind: str) -> Learner:
    """A learner with random scales after some steps of float32 training."""
    one = learners.learner(kind, precision=Precision(), scales=learners.scales(7))
    for batch in learners.batches(20):
        one.step(batch.float())
    return one


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, Tensor], Path]]:
    """Everything that sae-lens has to do, in one process: name -> (answer, its z and y, the directory)."""
    if not (ORACLE / "sae_lens").is_dir():
        text = f"sae-lens is not in {ORACLE}; make test installs it (requirements/sae-lens-oracle.txt)"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            raise RuntimeError(text)
        pytest.skip(text)
    folder = tmp_path_factory.mktemp("saelens")
    wide = torch.randn(64, 12, generator=torch.Generator().manual_seed(3)) * 2
    save_file({"x": wide}, folder / "x.safetensors")
    jobs = {}
    for kind in THEIRS:
        jobs[kind] = {"do": "make", "kind": kind, "dir": str(folder / kind)}
    for kind in OURS:
        save(
            SAE.of(Learned(config(kind), parameters(kind)), norm=NORM, site="layers.3.resid_post"),
            folder / f"our {kind}",
        )
        jobs[f"our {kind}"] = {"do": "load", "dir": str(folder / f"our {kind}")}
    for kind in ("standard", "jumprelu", "topk"):
        crossing = SAE.of(
            Learned(config(kind, d_out=9), parameters(kind, d_out=9)),
            norm=NORM,
            target_norm=0.7,
            site="layers.3.resid_mid",
            target_site="layers.3.mlp_out",
        )
        save(crossing, folder / f"our {kind} transcoder")
        jobs[f"our {kind} transcoder"] = {"do": "load", "dir": str(folder / f"our {kind} transcoder")}
    fresh = torch.cat(learners.batches(2))
    save_file({"x": fresh * NORM}, folder / "learned-x.safetensors")
    for kind in LEARNED:
        one = trained(kind)
        save_file({"z": one.latents(fresh), "y": one.reconstruct(fresh)}, folder / f"{kind}.learner")
        save(SAE.of(one, norm=NORM, site="layers.3.resid_post"), folder / f"learned {kind}")
        place, x = str(folder / f"learned {kind}"), str(folder / "learned-x.safetensors")
        jobs[f"learned {kind}"] = {"do": "load", "dir": place, "x": x}
    for name, job in jobs.items():
        job["out"] = str(folder / f"{name}.out")
        job.setdefault("x", str(folder / "x.safetensors"))
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(ORACLE)],
        input=json.dumps(list(jobs.values())),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"WANDB_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {}
    for (name, job), answer in zip(jobs.items(), lines, strict=True):
        tensors = load_file(job["out"]) if "error" not in answer else {}
        found[name] = (answer, tensors, Path(job["dir"]))
    found["x"] = ({}, {"x": wide}, folder)
    return found


@pytest.mark.parametrize("kind", THEIRS)
def test_what_saelens_wrote_is_read_as_it_runs_there(answers: Any, kind: str) -> None:
    answer, theirs, folder = answers[kind]
    assert "error" not in answer, answer
    x = answers["x"][1]["x"]
    read = load(folder)
    z = read.encode(x)
    # Of activations that SAELens scales, latents are in units of the scaled ones there, and in hidden units here.
    torch.testing.assert_close(z * (0.375 if kind == "scaled" else 1.0), theirs["z"], **CLOSE)
    torch.testing.assert_close(read.decode(z), theirs["y"], **CLOSE)
    assert 0 < int((theirs["z"] > 0).sum()) < theirs["z"].numel(), "some latents fire, not all"
    assert torch.equal(z > 0, theirs["z"] > 0)


@pytest.mark.parametrize("kind", [*OURS, "standard transcoder", "jumprelu transcoder"])
def test_what_is_written_here_runs_the_same_in_saelens(answers: Any, kind: str) -> None:
    answer, theirs, folder = answers[f"our {kind}"]
    assert "error" not in answer, answer
    x = answers["x"][1]["x"]
    ours = load(folder)
    torch.testing.assert_close(ours.encode(x), theirs["z"], **CLOSE)
    torch.testing.assert_close(ours(x), theirs["y"], **CLOSE)
    assert torch.equal(ours.encode(x) > 0, theirs["z"] > 0)
    assert 0 < int((theirs["z"] > 0).sum()) < theirs["z"].numel()


@pytest.mark.parametrize("kind", LEARNED)
def test_saelens_computes_what_a_scaled_training_computed(answers: Any, kind: str) -> None:
    """Parameters are stored with scales and trained on normalised activations; SAELens gets hidden units."""
    answer, theirs, folder = answers[f"learned {kind}"]
    assert "error" not in answer, answer
    ours = load_file(folder.parent / f"{kind}.learner")
    same = (theirs["z"] > 0) == (ours["z"] > 0)
    assert float(same.double().mean()) > 0.999, "at most a latent at its threshold falls on the other side"
    torch.testing.assert_close(theirs["z"][same], ours["z"][same] * NORM, rtol=1e-3, atol=1e-4)
    whole = same.all(dim=1)
    torch.testing.assert_close(theirs["y"][whole], ours["y"][whole] * NORM, rtol=1e-3, atol=1e-3)
    assert 0 < float((ours["z"] > 0).double().mean()) < 1


@pytest.mark.parametrize("kind", OURS)
def test_a_file_says_what_the_learner_computes(answers: Any, kind: str) -> None:
    """The learner's own parameters on normalised activations, without any file or fold, in float64."""
    _, theirs, _ = answers[f"our {kind}"]
    x = answers["x"][1]["x"]
    bare = sae(kind).to(dtype=torch.float64)
    expected = bare(x.double() / NORM) * NORM
    torch.testing.assert_close(theirs["y"].double(), expected, rtol=1e-4, atol=1e-5)


def test_saelens_refuses_a_transcoder_that_it_has_no_class_for(answers: Any) -> None:
    answer, _, folder = answers["our topk transcoder"]
    assert "topk_transcoder" in answer["error"]
    assert load(folder).d_out == 9, "and it is read back here"


def test_saelens_knows_where_it_was_trained(answers: Any) -> None:
    written = json.loads((answers["our jumprelu"][2] / "cfg.json").read_text())
    assert written["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert load(answers["our jumprelu"][2]).site == "layers.3.resid_post"
