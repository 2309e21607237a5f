"""The tiny models and their tokenizer, on which other tests stand."""

from __future__ import annotations

import pytest
import torch

from trimtab.errors import InputError
from trimtab.testing.models import FAMILY_NAMES, tiny, tiny_tokenizer


def test_models_are_seeded_and_leave_the_global_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    one, same, other = tiny("qwen3"), tiny("qwen3"), tiny("qwen3", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_norm_weights_and_biases_are_away_from_their_defaults() -> None:
    for family in FAMILY_NAMES:
        for name, weight in tiny(family).named_parameters():
            assert not torch.equal(weight, torch.zeros_like(weight)), (family, name)
            assert not torch.equal(weight, torch.ones_like(weight)), (family, name)


def test_weights_take_the_dtype_and_rotary_tables_do_not() -> None:
    model = tiny("llama", dtype=torch.bfloat16, layers=3)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32
    assert len(model.model.layers) == 3 and not model.training


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(InputError, match="no tiny model of family 'lama'; there are: llama, llama4"):
        tiny("lama")


def test_the_tokenizer_gives_texts_and_roles_back() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == 128 and tokenizer.padding_side == "left"
    text = "Hi, (you)!\n  1 < 2 ~"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert all(isinstance(tokenizer.decode([index]), str) for index in range(128))
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|user|>ab<|end|><|assistant|>c<|end|><|assistant|>"
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoded[0] == 5 and encoded[3] == 7 and encoded[-1] == 6
    batch = tokenizer(["a", "abc"], padding=True)
    assert batch["input_ids"][0][:2] == [0, 0] and batch["attention_mask"][0] == [0, 0, 1]
