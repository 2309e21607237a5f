"""Device maps: a model whose blocks lie on the processor and on disk trains what the whole model trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.errors import InputError
from trimtab.vectors.train import Engine, TrainingConfig, TrainingData, train

pytest.importorskip("accelerate")


def vector(made: Any) -> torch.Tensor:
    (one,) = made.steering.bound
    found: torch.Tensor = one.op.vector
    return found


def test_auto_is_the_model_as_it_was(small: TrainingData, config: TrainingConfig, engine: Engine) -> None:
    spread = Engine("testbed", device_map="auto")
    assert torch.equal(vector(train(spread, small, config)), vector(train(engine, small, config)))


def test_blocks_on_disk_train_the_same_vector(
    small: TrainingData, config: TrainingConfig, engine: Engine, tmp_path: Path
) -> None:
    places: dict[str, str] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"lm_head": "cpu"} | {f"model.layers.{layer}": "disk" if layer in (1, 5) else "cpu" for layer in range(6)}
    spread = Engine("testbed", device_map=places, offload_folder=tmp_path)
    assert any(tmp_path.iterdir())
    block: Any = spread.model.get_submodule("model.layers.5.mlp.up_proj")
    assert block.weight.device.type == "meta"  # its weights are read when it runs
    assert torch.equal(vector(train(spread, small, config)), vector(train(engine, small, config)))
    assert block.weight.device.type == "meta"


def test_a_map_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="disk needs offload_folder="):
        Engine("testbed", device_map={"": "disk"})
    with pytest.raises(InputError, match="device_map="):
        Engine("testbed", device_map={"model.embed_tokens": "cpu"})
