"""Every kind of vector file: what is read, at which layer, and what is refused."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from trimtab import testbed
from trimtab.directions import load_direction, write_gguf
from trimtab.errors import InputError, SteeringError, VectorError
from trimtab.steering import Add, Cap, Steering, SteeringVector

WIDTH = 5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def test_a_bare_tensor_and_an_array(tmp_path: Path) -> None:
    v = random(WIDTH)
    np.save(tmp_path / "v.npy", v.double().numpy())
    for given in (saved(tmp_path / "v.pt", v), saved(tmp_path / "r.pt", v[None]), tmp_path / "v.npy", v):
        found = load_direction(given, hidden_size=WIDTH)
        assert torch.equal(found.vector, v)
        assert found.norm == pytest.approx(float(v.double().norm()), rel=1e-12)
        assert (found.layer, found.site) == (None, None)
    half = load_direction(saved(tmp_path / "h.pt", v.bfloat16()))
    assert torch.equal(half.vector, v.bfloat16().float())
    assert float(half.unit.double().norm()) == pytest.approx(1.0, abs=1e-7)


def test_our_own_file_keeps_site_norm_and_calibration(tmp_path: Path) -> None:
    vector = SteeringVector.of(random(WIDTH), site="layers.3.resid_post", median_norm=2.5, quantiles={0.5: 0.1})
    vector.save(tmp_path / "v.safetensors")
    found = load_direction(tmp_path / "v.safetensors", layer=3)
    assert (found.layer, str(found.site), found.median_norm) == (3, "layers.3.resid_post", 2.5)
    assert found.calibrated == vector
    assert torch.equal(Cap(found, max=1.0).direction, vector.direction)
    assert Add(found, unit="median_norm").median_norm == 2.5
    with pytest.raises(VectorError, match="is a vector of layer 3; layer 1 was asked for"):
        load_direction(tmp_path / "v.safetensors", layer=1)


def test_a_foreign_safetensors_file_needs_a_key_when_it_holds_several(tmp_path: Path) -> None:
    a, b = random(WIDTH), random(WIDTH, seed=1)
    safetensors.torch.save_file({"a": a, "b": b}, tmp_path / "two.safetensors")
    safetensors.torch.save_file({"a": a}, tmp_path / "one.safetensors")
    assert torch.equal(load_direction(tmp_path / "two.safetensors", key="b").vector, b)
    assert torch.equal(load_direction(tmp_path / "one.safetensors").vector, a)
    for key, asked in [(None, "no key was given"), ("c", "there is no 'c'")]:
        with pytest.raises(VectorError, match=f"holds 2 entries and {asked}; keys: a, b"):
            load_direction(tmp_path / "two.safetensors", key=key)


def test_a_persona_file_begins_with_the_embedding(tmp_path: Path) -> None:
    rows = random(4, WIDTH)  # embedding, layers 0 to 2
    path = saved(tmp_path / "trait_response_avg_diff.pt", rows)
    for layer in range(3):
        found = load_direction(path, layer=layer)
        assert torch.equal(found.vector, rows[layer + 1])
        assert str(found.site) == f"layers.{layer}.resid_post"
    for layer, asked in [(None, "no layer was given"), (3, "layer 3 was asked for"), (-1, "layer -1 was asked for")]:
        with pytest.raises(VectorError, match=f"4 rows: the embedding, then the outputs of layers 0 to 2; {asked}"):
            load_direction(path, layer=layer)
    dictionary = saved(tmp_path / "d.pt", {"pos_3": rows, "all": rows * 2})
    assert torch.equal(load_direction(dictionary, layer=1, key="pos_3").vector, rows[2])
    with pytest.raises(VectorError, match="holds 2 entries and no key was given; keys: pos_3, all"):
        load_direction(dictionary, layer=1)


def test_a_trained_vector_directory_says_its_layer(tmp_path: Path) -> None:
    v = random(WIDTH)
    saved(tmp_path / "steering_vector.pt", {"steering_vector": v})
    config = tmp_path / "steering_config.json"
    config.write_text(json.dumps({"model_name": "m", "target_layer": 2, "init_scale": 0.0}))
    for given in (tmp_path, tmp_path / "steering_vector.pt"):
        found = load_direction(given)
        assert torch.equal(found.vector, v)
        assert str(found.site) == "layers.2.resid_post"
    for text, message in [
        ("{", "is not JSON"),
        ("[]", "is not JSON"),
        ('{"layer": 2}', "has no target_layer; keys: layer"),
        ('{"target_layer": -1}', "target_layer -1 is not a 0-based layer"),
    ]:
        config.write_text(text)
        with pytest.raises(VectorError, match=message):
            load_direction(tmp_path)
    config.unlink()
    with pytest.raises(
        VectorError, match=r"needs steering_vector\.pt and steering_config\.json; it holds steering_vector\.pt"
    ):
        load_direction(tmp_path)
    assert torch.equal(load_direction(tmp_path / "steering_vector.pt").vector, v)


def test_a_gguf_file_is_read_by_layer(tmp_path: Path) -> None:
    write_gguf(tmp_path / "v.gguf", {1: random(WIDTH), 4: random(WIDTH, seed=1)}, model_hint="qwen3")
    found = load_direction(tmp_path / "v.gguf", layer=4)
    assert torch.equal(found.vector, random(WIDTH, seed=1))
    assert str(found.site) == "layers.4.resid_post"
    with pytest.raises(VectorError, match="has directions for layers 1, 4; no layer was given"):
        load_direction(tmp_path / "v.gguf")


def test_a_seed_names_one_direction_for_good() -> None:
    found = load_direction("random:7", hidden_size=4)
    # numpy's RandomState(7).standard_normal(4), normalised: a stream that numpy promises never to change
    assert found.vector.tolist() == pytest.approx([0.93887362, -0.25876939, 0.01822746, 0.22632385], rel=1e-6)
    assert found.norm == 1.0
    assert torch.equal(load_direction("random:7", hidden_size=4).vector, found.vector)
    assert not torch.equal(load_direction("random:8", hidden_size=4).vector, found.vector)


class Payload:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    saved(tmp_path / "zip.pt", {"v": Payload(mark)})
    torch.save({"v": Payload(mark)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Payload(mark)))
    for name in ("zip.pt", "old.pt", "raw.pt"):
        with pytest.raises(
            VectorError, match=r"holds Python objects, which could run code, and is not loaded|not a readable torch"
        ):
            load_direction(tmp_path / name)
    assert not mark.exists()
    np.save(tmp_path / "o.npy", np.array([Payload(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(VectorError, match="is not an array of numbers"):
        load_direction(tmp_path / "o.npy")
    assert not mark.exists()


def test_an_archive_that_claims_more_than_it_holds_is_not_unpacked(tmp_path: Path) -> None:
    path = saved(tmp_path / "v.pt", random(WIDTH))
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as bad:
        for entry in good.infolist():
            data = good.read(entry)
            bad.writestr(entry.filename, data if not entry.filename.endswith("data/0") else b"\0" * 50_000_000)
    assert bomb.stat().st_size < 100_000
    with pytest.raises(
        VectorError, match=r"was not written by torch\.save \(entry .* is compressed\) and is not unpacked"
    ):
        load_direction(bomb)
    whole = path.read_bytes()
    place = whole.rindex(b"PK\x01\x02")  # the last entry of the directory: claim four billion bytes
    (tmp_path / "claim.pt").write_bytes(whole[: place + 20] + b"\xff\xff\xff\x7f" * 2 + whole[place + 28 :])
    with pytest.raises(VectorError, match="its entries claim 2147"):
        load_direction(tmp_path / "claim.pt")


def test_a_view_that_repeats_its_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="claims more values than the file holds"):
        load_direction(saved(tmp_path / "v.pt", torch.ones(1).expand(10**12)))
    with pytest.raises(VectorError, match=r"layout torch\.sparse_coo was given"):
        load_direction(saved(tmp_path / "s.pt", torch.ones(3).to_sparse()))


@pytest.mark.parametrize("keep", [0, 3, 30, 200])
def test_truncated_and_foreign_files_are_refused_in_one_line(tmp_path: Path, keep: int) -> None:
    whole = saved(tmp_path / "v.pt", random(WIDTH)).read_bytes()
    safetensors.torch.save_file({"a": random(WIDTH)}, tmp_path / "v.safetensors")
    np.save(tmp_path / "v.npy", random(WIDTH).numpy())
    write_gguf(tmp_path / "v.gguf", {1: random(WIDTH)}, model_hint="x")
    contents = {}
    for name in ("v.safetensors", "v.npy", "v.gguf"):
        content = (tmp_path / name).read_bytes()
        contents[name] = content[: min(keep, len(content) - 1)]
    contents["v.pt"] = whole[: keep * 3]
    contents["w.pt"] = b"#!/bin/sh\n" * keep
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VectorError) as caught:
            load_direction(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "1 of its 2 values are not finite"),
        (torch.zeros(3), r"it is zero \(width 3\)"),
        (torch.ones(2, 2, 2), r"shape \[2, 2, 2\] was given"),
        (torch.ones(()), r"shape \[\] was given"),
        ([1.0, 2.0], "holds a list; a tensor was expected"),
        ({"vectors": {}, "experiments": []}, "is a capping configuration with experiments; read it with load_capping"),
        ({}, "holds 0 entries and no key was given; keys: none"),
    ],
)
def test_what_is_not_a_direction_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(VectorError, match=message):
        load_direction(saved(tmp_path / "v.pt", value))


def test_the_width_is_checked_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="the vector has width 5 and the model has hidden size 8"):
        load_direction(saved(tmp_path / "v.pt", random(WIDTH)), hidden_size=8)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("absent.pt", r"absent\.pt: no such file; a vector is a \.safetensors vector of ours"),
        ("random:x", "expected random:SEED with a seed from 0"),
        ("random:-1", "expected random:SEED"),
        ("random:1", "needs a width; give hidden_size"),
    ],
)
def test_specs_that_name_nothing(spec: str, message: str) -> None:
    with pytest.raises(VectorError, match=message):
        load_direction(spec)


def test_other_kinds_of_file(tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text("{}")
    with pytest.raises(VectorError, match=r"unknown kind of file '\.json'; a vector is"):
        load_direction(tmp_path / "v.json")
    Steering({"embed": Add([1.0])}).save(tmp_path / "s.safetensors")
    with pytest.raises(VectorError, match=r"is a whole Steering; read it with Steering\.load"):
        load_direction(tmp_path / "s.safetensors")
    SteeringVector.of([1.0]).save(tmp_path / "v.safetensors")
    with pytest.raises(SteeringError, match="'trimtab-steering' was expected"):
        Steering.load(tmp_path / "v.safetensors")


def test_a_ready_direction_of_the_testbed_says_its_site() -> None:
    found = load_direction("testbed:person", hidden_size=128)
    ready = testbed.direction("person")
    assert torch.equal(found.vector, ready.vector)
    assert str(found.site) == ready.site
    with pytest.raises(InputError, match="vegetable"):
        load_direction("testbed:vegetable")
    with pytest.raises(VectorError, match=r"testbed:person.*128.*64"):
        load_direction("testbed:person", hidden_size=64)


def test_the_directory_of_an_extraction_gives_its_best_site_or_the_one_that_is_named(tmp_path: Path) -> None:
    for layer in (0, 2):
        made = SteeringVector(direction=torch.ones(4), norm=layer + 2.0, site=f"layers.{layer}.resid_post")
        made.save(tmp_path / f"layers.{layer}.resid_post.safetensors")
    (tmp_path / "extraction.json").write_text('{"best": "layers.2.resid_post"}')
    assert load_direction(tmp_path).layer == 2
    assert load_direction(tmp_path, layer=0).norm == pytest.approx(2.0)
    assert load_direction(tmp_path, key="layers.0.resid_post").layer == 0
    with pytest.raises(VectorError, match=r"holds vectors of layers.0.resid_post, layers.2.resid_post; layer 1 was"):
        load_direction(tmp_path, layer=1)
    (tmp_path / "extraction.json").unlink()
    with pytest.raises(VectorError, match="no layer was given"):
        load_direction(tmp_path)
