"""GGUF control vectors against the gguf package's own reader and writer, and what the format cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from trimtab.directions import read_gguf, steering_to_gguf, write_gguf
from trimtab.errors import PrerequisiteError, SteeringError, VectorError
from trimtab.steering import Ablate, Add, Cap, Ramp, Steering

WIDTH = 8


def random(seed: int) -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def foreign(path: Path, tensors: dict[str, Any], arch: str = "controlvector", hint: str | None = "llama") -> Path:
    """Write a file as repeng's export does: with the package, tensor by tensor."""
    writer = gguf.GGUFWriter(str(path), arch)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_we_write_is_what_the_package_reads(tmp_path: Path) -> None:
    vectors = {3: random(3), 1: random(1)}
    write_gguf(tmp_path / "v.gguf", vectors, model_hint="qwen3")
    reader = gguf.GGUFReader(str(tmp_path / "v.gguf"))
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "qwen3"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    found = {tensor.name: (tensor.tensor_type, np.array(tensor.data)) for tensor in reader.tensors}
    assert sorted(found) == ["direction.1", "direction.3"]
    for layer, vector in vectors.items():
        kind, data = found[f"direction.{layer}"]
        assert kind == gguf.GGMLQuantizationType.F32
        np.testing.assert_array_equal(data, vector.numpy())
    assert [one.name for one in tmp_path.iterdir()] == ["v.gguf"]


def test_what_the_package_writes_is_what_we_read(tmp_path: Path) -> None:
    path = foreign(tmp_path / "v.gguf", {f"direction.{n}": random(n).numpy() for n in (10, 2)})
    file = read_gguf(path)
    assert (file.model_hint, file.layer_count, list(file.directions)) == ("llama", 2, [2, 10])
    for layer, vector in file.directions.items():
        assert torch.equal(vector, random(layer))


def test_entry_n_is_the_output_of_block_n_counted_from_zero(tmp_path: Path) -> None:
    """llama.cpp adds entry N to the output of block il = N; a Steering at layers.N.resid_post is that entry."""
    steering = Steering({"layers.2-3.resid_post": Add(random(2), 0.5)}, gain=2.0)
    steering += Steering({"layers.3.resid_post": Add(random(3), -1.0)})
    steering_to_gguf(steering, tmp_path / "v.gguf", model_hint="qwen3", num_layers=4)
    file = read_gguf(tmp_path / "v.gguf")
    assert list(file.directions) == [2, 3]
    h = torch.zeros(1, WIDTH)
    for layer, program in zip((2, 3), steering.resolve(num_layers=4, hidden_size=WIDTH).values(), strict=True):
        assert program.site.layer == layer
        moved = program.apply(h, positions=torch.tensor([0]), prompt_length=1).h[0]
        torch.testing.assert_close(file.directions[layer], moved, rtol=1e-6, atol=1e-7)


V = [1.0] * WIDTH


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        (Steering({"layers.1.resid_post": Cap(V, max=1.0)}), r"layers\.1\.resid_post: Cap: .* only vectors to add"),
        (Steering({"layers.1.resid_post": Ablate(V, 0.0)}), "only vectors to add"),
        (Steering({"layers.0.resid_post": Add(V)}), "layer 0: a GGUF control vector begins at the output of block 1"),
        (Steering({"layers.*.resid_post": Add(V)}), "layer 0: a GGUF control vector begins"),
        (Steering({"layers.1.mlp_out": Add(V)}), r"act at layers\.N\.resid_post, not at mlp_out"),
        (Steering({"embed": Add(V)}), "not at embed"),
        (Steering({"layers.1.resid_post": Add(V)}, positions="generated"), "cannot hold positions 'generated'"),
        (Steering({"layers.1.resid_post": Add(V)}, gain=Ramp(0.5)), "cannot hold the gain"),
        (Steering({"layers.1.resid_post": Add(V, unit="token_norm")}), "cannot hold unit='token_norm'"),
        (Steering({"layers.1.resid_post": Add(V, max_ratio=0.5)}), "cannot hold max_ratio=0.5"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(tmp_path: Path, steering: Steering, message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        steering_to_gguf(steering, tmp_path / "v.gguf", model_hint="qwen3", num_layers=4)
    assert not list(tmp_path.iterdir())


def test_writing_refuses_no_direction_several_widths_and_an_absent_directory(tmp_path: Path) -> None:
    for vectors, message in [({}, "no direction"), ({1: torch.ones(2), 2: torch.ones(3)}, r"one width; got \[2, 3\]")]:
        with pytest.raises(SteeringError, match=message):
            write_gguf(tmp_path / "v.gguf", vectors, model_hint="x")
    with pytest.raises(SteeringError, match="cannot be written"):
        write_gguf(tmp_path / "no" / "v.gguf", {1: torch.ones(2)}, model_hint="x")


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (
            {"direction.1": np.ones(4, np.float32)},
            {"arch": "llama"},
            "GGUF architecture 'llama'; 'controlvector' was expected",
        ),
        ({"weight": np.ones(4, np.float32)}, {}, r"holds no direction\.N; tensors: weight"),
        ({"direction.0": np.ones(4, np.float32)}, {}, r"direction\.0 has no meaning"),
        ({"direction.1": np.ones(4, np.float16)}, {}, "float16"),
        ({"direction.1": np.ones((2, 4), np.float32)}, {}, r"float32 \[2, 4\]"),
        (
            {"direction.1": np.ones(4, np.float32), "direction.2": np.ones(5, np.float32)},
            {},
            "directions of widths 4, 5",
        ),
    ],
)
def test_reading_refuses_other_files(tmp_path: Path, tensors: Any, options: Any, message: str) -> None:
    with pytest.raises(VectorError, match=message):
        read_gguf(foreign(tmp_path / "v.gguf", tensors, **options))


def test_a_file_without_hint_is_read(tmp_path: Path) -> None:
    assert read_gguf(foreign(tmp_path / "v.gguf", {"direction.1": np.ones(4, np.float32)}, hint=None)).model_hint == ""


def test_without_the_package_the_message_has_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(PrerequisiteError, match=r"pip install 'trimtab\[gguf\]'"):
        read_gguf(tmp_path / "v.gguf")
