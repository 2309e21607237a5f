"""Runs the real sae-lens; a program, started as `python saelens_oracle.py ORACLE < jobs.json`.

Each job makes an autoencoder of SAELens, or loads one of ours, and says what it does to activations:

    {"do": "make", "kind": K, "dir": D, "x": FILE, "out": FILE}    a new one of a kind, saved by SAELens
    {"do": "load", "dir": D, "x": FILE, "out": FILE}               one from a directory

`out` gets {"z", "y"}; the answer is one line of JSON: {"class": name} or {"error": text}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

D_IN, D_SAE, D_OUT = 12, 40, 9


def make(kind: str) -> Any:
    """Return a SAELens autoencoder with random parameters."""
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        GatedSAE,
        GatedSAEConfig,
        JumpReLUSAE,
        JumpReLUSAEConfig,
        JumpReLUTranscoder,
        JumpReLUTranscoderConfig,
        StandardSAE,
        StandardSAEConfig,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        TopKSAE,
        TopKSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
        Transcoder,
        TranscoderConfig,
    )

    sizes: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE}
    kinds: dict[str, Any] = {
        "standard": lambda: StandardSAE(StandardSAEConfig(**sizes)),
        "not-centred": lambda: StandardSAE(StandardSAEConfig(**sizes, apply_b_dec_to_input=False)),
        "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(**sizes)),
        "topk": lambda: TopKSAE(TopKSAEConfig(**sizes, k=6)),
        "topk-rescaled": lambda: TopKSAE(TopKSAEConfig(**sizes, k=6, rescale_acts_by_decoder_norm=True)),
        "gated": lambda: GatedSAE(GatedSAEConfig(**sizes)),
        "transcoder": lambda: Transcoder(TranscoderConfig(**sizes, d_out=D_OUT, apply_b_dec_to_input=False)),
        "jumprelu-transcoder": lambda: JumpReLUTranscoder(
            JumpReLUTranscoderConfig(**sizes, d_out=D_OUT, apply_b_dec_to_input=False)
        ),
        "scaled": lambda: StandardTrainingSAE(
            StandardTrainingSAEConfig(**sizes, normalize_activations="expected_average_only_in")
        ),
        "topk-training": lambda: TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, k=6)),
        "batchtopk-training": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes, k=6)),
    }
    sae = kinds[kind]()
    generator = torch.Generator().manual_seed(sum(map(ord, kind)))
    with torch.no_grad():
        for name, tensor in sae.named_parameters():
            drawn = torch.randn(tensor.shape, generator=generator) * (0.3 if name.startswith("W") else 0.1)
            tensor.copy_(drawn.abs() if name == "threshold" else drawn)
        if kind == "batchtopk-training":
            sae.topk_threshold.fill_(0.3)
    return sae


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job."""
    from sae_lens import SAE

    x = load_file(job["x"])["x"]
    folder = Path(job["dir"])
    if job["do"] == "load":
        sae = SAE.load_from_disk(folder)
    else:
        made = make(job["kind"])
        made.save_model(folder)
        scale = None
        if job["kind"] == "scaled":
            scale = 0.375
            (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
            made.fold_activation_norm_scaling_factor(scale)
        # what a training checkpoint computes is what SAELens itself exports of it for inference
        if hasattr(made, "save_inference_model"):
            made.save_inference_model(folder / "inference")
            sae = SAE.load_from_disk(folder / "inference")
        else:
            sae = made
    with torch.no_grad():
        z = sae.encode(x)
        save_file({"z": z.contiguous(), "y": sae.decode(z).contiguous()}, job["out"])
    return {"class": type(sae).__name__}


def main() -> None:
    """Answer every job of standard input."""
    sys.path.insert(0, sys.argv[1])
    for job in json.load(sys.stdin):
        try:
            answer = run(job)
        except Exception as error:  # the tests look at what went wrong
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
