"""A whole training by `transformers.Trainer` with the callback: what it records is what the Trainer did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from trimtab import dump
from trimtab.compare import compare
from trimtab.trace import Trace

STEPS, ACCUMULATION, BATCH, LENGTH = 3, 2, 2, 6


class Ids(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A dozen sequences."""

    def __len__(self) -> int:
        return STEPS * ACCUMULATION * BATCH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 32, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def train(folder: Path, callbacks: list[Any], **options: Any) -> Trainer:
    """Train a tiny Llama for three steps of two micro batches."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=STEPS, per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION, learning_rate=1e-2, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, seed=0, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=Ids(), callbacks=callbacks)
    trainer.train()
    return trainer


def test_a_training_is_recorded_as_it_was(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", [])
    trainer = train(tmp_path / "a", [dump.DumpCallback(dump.record(tmp_path / "trace"))])
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name)), name  # to the bit as without the callback
    trace = Trace.open(tmp_path / "trace", incomplete_ok=False)
    index = trace.index
    forward = index.filter((pl.col("name") == "module:model.layers.1.output") & (pl.col("kind") == "value"))
    places = [(step, micro) for step in range(STEPS) for micro in range(ACCUMULATION)]
    assert forward.select("step", "micro_step").rows() == places and set(forward["phase"]) == {"fwd_bwd"}

    losses = index.filter(pl.col("name") == "loss")
    told = [trace.tensor(record).item() for record in losses["record_id"]]
    logged = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    assert losses.select("step", "micro_step").rows() == places
    for step, loss in enumerate(logged):  # each micro batch's share of the mean is what is differentiated
        assert sum(told[2 * step : 2 * step + 2]) == pytest.approx(loss, rel=1e-3)

    name = "model.layers.0.self_attn.q_proj.weight"
    moments = index.filter(pl.col("name") == f"{name}.exp_avg_sq")
    state = trainer.optimizer.state[trainer.model.get_parameter(name)]  # type: ignore[union-attr]
    assert moments["step"].to_list() == list(range(STEPS))
    assert torch.equal(trace.tensor(moments["record_id"][-1]), state["exp_avg_sq"])
    gradients = index.filter((pl.col("name") == name) & (pl.col("kind") == "grad"))
    assert gradients["step"].to_list() == list(range(STEPS))
    norms = [
        torch.stack([trace.tensor(one).norm() for one in grads["record_id"]]).norm().item()
        for _, grads in index.filter((pl.col("kind") == "grad") & pl.col("name").str.ends_with("weight")).group_by(
            "step", maintain_order=True
        )
    ]
    clipped = [min(1.0, one["grad_norm"]) for one in trainer.state.log_history if "grad_norm" in one]
    assert norms == pytest.approx(clipped, rel=1e-3)
    rates = [trace.tensor(one).item() for one in index.filter(pl.col("name") == "lr.0")["record_id"]]
    assert rates == pytest.approx([1e-2 * (STEPS - step) / STEPS for step in range(STEPS)])
    assert not dump.active()


def test_two_trainings_are_compared_and_the_changed_one_is_found(tmp_path: Path) -> None:
    """The learning rate's schedule differs: the inputs of the second step still agree, its parameters do not."""
    for name, warmup in (("a", 0), ("b", 0), ("c", 2)):
        train(
            tmp_path / name, [dump.DumpCallback(dump.record(tmp_path / "traces" / name, parts="params loss lr"))],
            warmup_steps=warmup,
        )  # fmt: skip
    assert compare(tmp_path / "traces" / "a", tmp_path / "traces" / "b").counts["identical"] > 20
    other = compare(tmp_path / "traces" / "a", tmp_path / "traces" / "c")
    assert not other.passed and other.first_divergence is not None
    assert other.first_divergence.key.name == "lr.0" and other.first_divergence.key.step == 0
