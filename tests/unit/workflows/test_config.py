"""Options in words: which op, which configuration."""

from __future__ import annotations

import pytest

from trimtab.errors import InputError, RecipeError
from trimtab.workflows.config import PRESETS, Steer, SweepConfig


@pytest.mark.parametrize(
    ("steer", "op"),
    [
        (Steer(), ""),
        (Steer(vector="v", cap=1.0), "cap"),
        (Steer(vector="v", cap_min=-1.0), "cap"),
        (Steer(vector="v", cap=1.0, cap_min=-1.0), "cap"),
        (Steer(vector="v", add=0.0), "add"),
        (Steer(vector="v", keep=0.0), "keep"),
    ],
)
def test_the_op_is_read_from_what_was_given(steer: Steer, op: str) -> None:
    assert steer.op == op


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        (Steer(vector="v"), "a vector was given without cap"),
        (Steer(cap=1.0), "cap was given without a vector"),
        (Steer(vector="v", add=1.0, keep=0.0), "got add and keep"),
    ],
)
def test_half_a_steering_is_refused(steer: Steer, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _ = steer.op


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_their_names_say(name: str) -> None:
    config = SweepConfig.parse(name)
    assert config.label == name and config.backend == "hf"
    assert SweepConfig.parse(name, "vllm").label == f"vllm_{name}"


def test_bf16_and_bf16_cap_fp32_differ_in_the_arithmetic_alone() -> None:
    one, two = SweepConfig.parse("bf16"), SweepConfig.parse("bf16_cap_fp32")
    assert (one.dtype, two.dtype) == ("bfloat16", "bfloat16")
    assert (one.op_math, two.op_math) == ("model", "float32")


def test_a_configuration_of_ones_own() -> None:
    assert SweepConfig.parse("mine=hf:float16:float32") == SweepConfig(
        label="mine", backend="hf", dtype="float16", op_math="float32"
    )
    assert SweepConfig.parse("hf:float16").op_math == "model"


@pytest.mark.parametrize("text", ["fp8", "hf:int8:float32", "hf:float32:float8", "a=b=c", "hf:float32:model:x"])
def test_an_unknown_configuration_lists_the_presets(text: str) -> None:
    with pytest.raises(RecipeError, match="bf16, bf16_cap_fp32, float16, float32"):
        SweepConfig.parse(text)
