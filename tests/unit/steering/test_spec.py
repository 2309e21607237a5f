"""Steering: composition, canonical form, digest, files, and the refusals of each."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import SiteError, SteeringError, VectorError
from trimtab.steering import (
    Ablate,
    AblateSubspace,
    Add,
    BoundOp,
    Cap,
    CapSubspace,
    Constant,
    Decay,
    LowRank,
    Patch,
    Ramp,
    SetProjection,
    Steering,
    SteeringVector,
)

GOLDEN = """
from trimtab.steering import *
import torch
v = torch.arange(1, 9).float()
add = Add(v, -0.5, unit="token_norm", math="bfloat16")
a = Steering({"layers.2.resid_post": [Cap(v, max=5.0), add]}, positions="prompt,!0:1")
b = Steering({"layers.{4,0-1}.mlp_out": Ablate(v.flip(0), keep=0.25), "embed": Add(v)}, gain=Ramp(0.9))
print((a + b).digest)
"""
DIGEST = "ec45f87ded180000684c8521531d43855d481cdfddfe9f44139b7e6718d40c0d"


def everything() -> Steering:
    g = torch.Generator().manual_seed(3)
    v = torch.randn(6, 8, generator=g)
    return (
        Steering({"layers.*.resid_post": [Add(v[0], 0.1), Cap(v[1], -0.3, max_ratio=0.5)], "embed": Ablate(v[2], 0.0)})
        + Steering(
            {"layers.1.resid_post": SetProjection(v[3], 1e-30, math="float16")}, positions="tokens{3,1},-4:P,!7:9"
        )
        + Steering({"layers.0-2.attn_out": AblateSubspace(v[:3], 0.5, strict=True)}, gain=Decay(0.3))
        + Steering({"final_norm": CapSubspace(v[:2], min=[None, -1.0], max=2.0, math="model")}, gain=Ramp(0.5))
        + Steering({"module:a.b.output": [Patch(v[:2], 0.3, positions=[5, 2]), LowRank(v[:2], None, v[:2].T)]})
        + Steering({"layers.5.q": Add(v[4], 2.0, unit="median_norm", median_norm=7.25)}, gain=0.3)
    )


def test_saving_and_loading_gives_back_every_bit(tmp_path: Path) -> None:
    steering = everything()
    steering.save(tmp_path / "s.safetensors")
    again = Steering.load(tmp_path / "s.safetensors")
    assert again == steering
    assert again.digest == steering.digest
    assert [one.op.describe() for one in again.bound] == [one.op.describe() for one in steering.bound]


def test_tensors_of_equal_bytes_keep_their_shapes_and_dtypes(tmp_path: Path) -> None:
    u = torch.tensor([0.6, 0.8])
    steering = Steering(
        {"embed": [LowRank(u[None], torch.ones(1), u[:, None]), Patch(torch.zeros(1, 2), positions=[0])]}
    )
    steering.save(tmp_path / "s.safetensors")
    for again in (Steering.load(tmp_path / "s.safetensors"), Steering.loads(steering.dumps())):
        assert again == steering
        low, patch = (one.op for one in again.bound)
        assert isinstance(low, LowRank)
        assert torch.equal(low.A, u[None])
        assert torch.equal(low.B, u[:, None])
        assert patch == steering.bound[1].op


def test_a_file_is_safetensors_whose_metadata_holds_the_canonical_form(tmp_path: Path) -> None:
    steering = Steering({"embed": [Cap([3.0, 4.0], max=0.1), Ablate([3.0, 4.0], 0.0)]})
    steering.save(tmp_path / "s.safetensors")
    with safetensors.safe_open(str(tmp_path / "s.safetensors"), framework="pt") as stream:
        metadata = stream.metadata()
        assert len(stream.keys()) == 1, "equal tensors are stored once"
    document = json.loads(metadata["steering"])
    assert metadata["digest"] == steering.digest
    assert document["ops"][0]["op"]["max"] == (0.1).hex()
    assert document["version"] == 1


def test_the_digest_is_the_one_it_always_was_in_a_process_of_any_hash_seed() -> None:
    for seed in ("0", "4242"):
        done = subprocess.run(
            [sys.executable, "-c", GOLDEN],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == DIGEST


@given(
    st.permutations(["embed", "layers.0.resid_post", "layers.*.resid_post", "layers.{0,2}.resid_post", "final_norm"])
)
def test_the_order_of_a_dict_does_not_matter(sites: list[str]) -> None:
    ops = {site: Add([float(index), 1.0]) for index, site in enumerate(sorted(sites))}
    reference = Steering(dict(sorted(ops.items())))
    assert Steering({site: ops[site] for site in sites}).digest == reference.digest


def test_composition_keeps_the_order_where_ops_can_meet_and_only_there() -> None:
    a, b = (
        Steering({"layers.1.resid_post": Add([1.0, 2.0])}),
        Steering({"layers.*.resid_post": Cap([1.0, 2.0], max=1.0)}),
    )
    c = Steering({"layers.2.resid_post": Ablate([1.0, 2.0], 0.0)})
    assert (a + b).digest != (b + a).digest
    assert (a + c).digest == (c + a).digest
    assert (a + b + c).digest == (a + (b + c)).digest
    kinds = [one.op.kind for one in (a + b).bound if one.pattern.matches(next(iter(a.bound)).pattern.resolve(3)[0])]
    assert kinds == ["Add", "Cap"]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=7), st.randoms(use_true_random=False))
def test_the_canonical_order_is_the_same_for_every_order_that_means_the_same(
    picks: list[tuple[int, bool]], rng: Any
) -> None:
    parts = [
        Steering({"layers.*.q" if wide else f"layers.{layer}.q": Add([float(index + 1)])})
        for index, (layer, wide) in enumerate(picks)
    ]

    def total(order: list[Steering]) -> Steering:
        return Steering.of([one for part in order for one in part.bound])

    shuffled = list(range(len(parts)))
    for _ in range(20):  # swap neighbours that cannot meet
        i = rng.randrange(max(len(parts) - 1, 1))
        if i + 1 < len(parts):
            (x, wide_x), (y, wide_y) = (picks[shuffled[i]], picks[shuffled[i + 1]])
            if not wide_x and not wide_y and x != y:
                shuffled[i], shuffled[i + 1] = shuffled[i + 1], shuffled[i]
    assert total([parts[i] for i in shuffled]).digest == total(parts).digest


def test_every_field_enters_the_digest() -> None:
    v = [1.0, 2.0, 3.0]
    variants = [
        Steering({"embed": Cap(v, max=5.0)}),
        Steering({"final_norm": Cap(v, max=5.0)}),
        Steering({"embed": Cap(v, max=5.000001)}),
        Steering({"embed": Cap(v, min=5.0)}),
        Steering({"embed": Cap(v, max=5.0, math="bfloat16")}),
        Steering({"embed": Cap(v, max=5.0, math="model")}),
        Steering({"embed": Cap(v, max=5.0, max_ratio=0.5)}),
        Steering({"embed": Cap([1.0, 2.0, 3.000001], max=5.0)}),
        Steering({"embed": Cap(v, max=5.0)}, positions="prompt"),
        Steering({"embed": Cap(v, max=5.0)}, gain=0.5),
        Steering({"embed": Cap(v, max=5.0)}, gain=Ramp(0.5)),
        Steering({"embed": Cap(v, max=5.0)}, gain=Decay(0.5)),
        Steering({"embed": [Cap(v, max=5.0)] * 2}),
        Steering({"embed": SetProjection(v, 5.0)}),
    ]
    assert len({one.digest for one in variants}) == len(variants)
    assert Steering({"embed": Cap([2.0, 4.0, 6.0], max=5.0)}) == variants[0], "a cap does not depend on the norm given"


def test_equal_layers_in_other_words_are_equal() -> None:
    op = Add([1.0])
    assert Steering({"layers.{3,0-1,2}.q": op}).digest == Steering({"layers.0-3.q": op}).digest
    assert Steering({"layers.0-3.q": op}).sites == ("layers.0-3.q",)


def test_a_steering_cannot_be_changed_and_can_be_pickled_for_a_worker() -> None:
    steering = everything()
    with pytest.raises(AttributeError, match="cannot be changed"):
        steering.bound = ()
    again = pickle.loads(pickle.dumps(steering))
    assert again == steering
    assert hash(again) == hash(steering)
    assert again.digest == steering.digest


def test_describe_and_with_math() -> None:
    steering = Steering({"layers.1.q": Cap([1.0], max=5.0)}, positions="generated", gain=Ramp(0.5))
    assert steering.describe() == "Cap(max=5, float32) at layers.1.q on generated gain Ramp(a=0.5)"
    assert "Cap[generated]" in repr(steering)
    assert steering.with_math("model").bound[0].op.math == "model"
    assert everything().with_math("float32").with_math("bfloat16").bound[0].op.math == "bfloat16"


def test_a_vector_stays_at_the_site_it_was_made_at() -> None:
    vector = SteeringVector.of([1.0, 2.0], site="layers.12.resid_post")
    Steering({"layers.12.resid_post": Add(vector)})
    with pytest.raises(
        VectorError,
        match=r"layers\.3\.resid_post: the vector of Add was made at layers\.12\.resid_post; bind it there, or",
    ):
        Steering({"layers.3.resid_post": Add(vector)})
    Steering({"layers.3.resid_post": Add(vector.vector)})


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Steering({}), SteeringError, "a Steering maps sites to ops"),
        (lambda: Steering([Add([1.0])]), SteeringError, "a Steering maps sites to ops"),
        (lambda: Steering({"embed": []}), SteeringError, "embed: no op was given"),
        (lambda: Steering({"embed": [torch.ones(2)]}), SteeringError, "a Tensor was given where an op such as Add"),
        (lambda: Steering({"layers.-1.q": Add([1.0])}), SiteError, "not bound to a model yet; write 0-based layers"),
        (lambda: Steering({"layer.1.q": Add([1.0])}), SiteError, "is not a site"),
        (lambda: Steering.of([]), SteeringError, "at least one op"),
    ],
)
def test_refusals(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def rewrite(path: Path, change: Any, *, sign: bool = True) -> None:
    """Write the file again with its canonical text changed, and its digest made to fit."""
    import hashlib

    with safetensors.safe_open(str(path), framework="pt") as stream:
        metadata, tensors = stream.metadata(), {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    document = json.loads(metadata["steering"])
    change(metadata, document, tensors)
    if sign:
        metadata["steering"] = json.dumps(document, sort_keys=True, separators=(",", ":"))
        metadata["digest"] = hashlib.blake2b(metadata["steering"].encode(), digest_size=32).hexdigest()
    path.write_bytes(safetensors.torch.save(tensors, metadata))


def at(name: str) -> Any:
    return lambda m, d, t: d["ops"][0]["op"].update({name: 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, d, t: m.update(version="2"), "version '2' was written by a newer Trimtab; upgrade"),
        (lambda m, d, t: m.update(version="x"), "version 'x' is not a version that exists"),
        (lambda m, d, t: m.update(format="other"), "format 'other'; 'trimtab-steering' was expected"),
        (lambda m, d, t: m.update(extra="1"), "unknown keys extra; known: digest, format"),
        (lambda m, d, t: m.pop("steering") and d, "missing keys steering"),
        (lambda m, d, t: d.update(note=1), "unknown keys note"),
        (at("strength"), "Cap: unknown keys strength; known: direction"),
        (lambda m, d, t: d["ops"][0]["op"].pop("direction"), "Cap: missing keys direction"),
        (lambda m, d, t: d["ops"][0]["op"].update(kind="Clip"), "unknown op 'Clip'; known: Ablate"),
        (lambda m, d, t: d["ops"][0]["gain"].update(kind="Sine"), "unknown gain 'Sine'; known: Constant, Decay, Ramp"),
        (lambda m, d, t: d["ops"][0].update(positions="last"), "there is no bare 'last'"),
        (lambda m, d, t: d["ops"][0].update(site="layers.x.q"), "is not a site"),
        (lambda m, d, t: d["ops"][0]["op"].update(min="0x1.9p+9"), "min=800 is above max=1"),
        (lambda m, d, t: d["ops"][0]["op"]["direction"].update(shape=[3]), "corrupt: tensor"),
        (lambda m, d, t: d["ops"][0]["op"]["direction"].update(shape=[-1, -2]), "corrupt: tensor"),
        (lambda m, d, t: d["ops"][0]["op"]["direction"].update(dtype="float64"), "corrupt: tensor"),
        (lambda m, d, t: d["ops"][0]["op"]["direction"].update(shape="2"), r"^[^:]*s\.safetensors is corrupt: tensor"),
        (lambda m, d, t: t.clear() or t.update(x=torch.ones(1)), "corrupt: the bytes of tensor x"),
        (lambda m, d, t: d.update(ops=[3]), "not the canonical form"),
    ],
)
def test_a_file_with_anything_unknown_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "s.safetensors"
    Steering({"embed": Cap([3.0, 4.0], max=1.0)}).save(path)
    missing = "missing keys steering" in message
    with pytest.raises(SteeringError, match=message):
        rewrite(path, change, sign=not missing)
        Steering.load(path)


def test_corrupt_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    Steering({"embed": Cap([3.0, 4.0], max=1.0)}).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"0x1.0", b"0x1.1"))
    with pytest.raises(SteeringError, match="corrupt: its text does not match its digest"):
        Steering.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(SteeringError, match="corrupt: the bytes of tensor"):
        Steering.load(path)
    for content in (whole[: len(whole) // 2], b"", b"not a file of ours", whole[:3]):
        path.write_bytes(content)
        with pytest.raises(SteeringError, match="is not a readable safetensors file"):
            Steering.load(path)
    with pytest.raises(SteeringError, match="no such file"):
        Steering.load(tmp_path / "absent")
    with pytest.raises(SteeringError, match="cannot be written"):
        Steering({"embed": Add([1.0])}).save(tmp_path / "no" / "s.safetensors")


def test_ops_already_bound_can_carry_rows_and_gains_of_their_own() -> None:
    parts = [
        *Steering({"embed": Add([1.0])}, positions="prompt").bound,
        *Steering({"embed": Add([2.0])}, gain=0.5).bound,
    ]
    steering = Steering.of(parts)
    assert [(str(one.positions), one.gain) for one in steering.bound] == [
        ("prompt", Constant(1.0)),
        ("all", Constant(0.5)),
    ]
    assert all(isinstance(one, BoundOp) for one in steering.bound)
