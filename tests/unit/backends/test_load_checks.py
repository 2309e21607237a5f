"""What is checked when a model is loaded: its head, its blocks against the family's table, its tokenizer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab.architectures import describe
from trimtab.backends import Message, Request, open_backend
from trimtab.backends.hf._head import check_head
from trimtab.errors import BackendError, InputError, PrerequisiteError
from trimtab.sites import Site
from trimtab.testing.models import tiny, tiny_tokenizer


def with_logits(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Do something to the logits after the head, as some families do."""
    real = model.forward

    @functools.wraps(real)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = real(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = forward
    return model


def running(model: nn.Module, real: str, shown: nn.ModuleList) -> nn.Module:
    """Let the inner model run its blocks under another name, beside a list of the table's name."""
    inner: Any = model.model
    setattr(inner, real, inner.layers)
    inner.layers = shown
    forward = inner.forward

    @functools.wraps(forward)
    def swapped(*args: Any, **kwargs: Any) -> Any:
        inner.layers = getattr(inner, real)
        try:
            return forward(*args, **kwargs)
        finally:
            inner.layers = shown

    inner.forward = swapped
    return model


# -- the head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_vl", "llama4_multimodal", "gpt_neox"])
def test_the_head_makes_the_logits_to_the_bit(family: str, dtype: torch.dtype) -> None:
    assert open_backend("hf", tiny(family, dtype=dtype)).checks["head"] == 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda logits: logits * 0.25, r"the logits are 0\.25 times head\(final_norm\(resid_post\)\)"),
        (lambda logits: 10 * torch.tanh(logits * 3 / 10), r"the logits are not head\(final_norm.* \(relative error"),
        (lambda logits: logits.roll(1, -1), "the logits are not head"),
    ],
)
def test_logits_that_are_something_else_are_refused_in_words(change: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(BackendError, match=f"head failed.*{words}") as found:
        open_backend("hf", with_logits(tiny("llama"), change))
    assert "\n" not in str(found.value)


def test_a_softcap_is_taken_from_the_facts_and_named_when_they_lack_it() -> None:
    model = tiny("gemma2")
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    sites = describe(model)
    assert sites.numerics is not None and sites.numerics.logit_softcap == 30.0
    assert open_backend("hf", model).checks["head"] == 0.0
    seen, logits = states(model)
    lacking = replace(sites, numerics=replace(sites.numerics, logit_softcap=None))
    found = check_head(model, lacking, seen, logits)
    assert found.error is not None and found.error > 0.1
    assert found.words.endswith("under a softcap of 30")


def test_another_stream_before_the_final_norm_is_named() -> None:
    model = tiny("llama")
    seen, logits = states(model)
    post = Site("resid_post", layer=1)
    found = check_head(model, describe(model), {**seen, post: seen[post].roll(1, -1)}, logits)
    assert "the final norm takes something else than the last resid_post" in found.words


def states(model: nn.Module) -> tuple[dict[Site, Tensor], Tensor]:
    seen: dict[Site, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _a, out, site=site: seen.update({site: out.clone()}))
        for site, module in (
            (Site("resid_post", layer=1), model.model.layers[1]),
            (Site("final_norm"), model.model.norm),
        )
    ]
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[5, 9, 31]])).logits
    for hook in hooks:
        hook.remove()
    return seen, logits


@pytest.mark.parametrize(("family", "factor"), [("granite", "0.125"), ("cohere2", "0.0625")])
def test_an_unknown_family_with_a_scale_is_read_and_says_so(family: str, factor: str) -> None:
    backend = open_backend("hf", tiny(family))
    assert any(f"the logits are {factor} times" in note for note in backend.info.notes)
    assert backend.provenance()["notes"] == list(backend.info.notes)


# -- the blocks


def test_blocks_that_the_table_does_not_name_are_refused_with_both_names() -> None:
    model = tiny("llama")
    model = running(model, "other", copy.deepcopy(model.model.layers))
    with pytest.raises(BackendError, match=r"in model\.layers \(2 of them\).*shows them in model\.other \(2 of them\)"):
        open_backend("hf", model)


def test_blocks_that_do_not_all_run_are_refused() -> None:
    model = tiny("llama", layers=3)
    model.config.num_hidden_layers = 2
    with pytest.raises(BackendError, match=r"in model\.layers \(3 of them\).* in no list of modules that ran once"):
        open_backend("hf", model)


def test_lists_that_are_not_run_or_are_no_chain_do_not_count() -> None:
    model = tiny("llama")
    blocks = copy.deepcopy(model.model.layers)
    model.unused = nn.ModuleList([*blocks, *copy.deepcopy(blocks)])
    model.apart = nn.ModuleList(nn.Linear(64, 4096) for _ in range(2))  # no chain
    model.alone = nn.ModuleList([nn.Linear(64, 9999)])  # of another length
    model.twice = nn.ModuleList(nn.Bilinear(64, 99, 64) for _ in range(2))  # a chain, but run twice

    def run(_module: nn.Module, _args: Any, output: Any) -> None:
        x = torch.zeros(1, 64)
        for block in (*model.apart, *model.alone):
            block(x)
        for block in (*model.twice, *model.twice):
            block(x, torch.zeros(1, 99))

    for block in model.twice:
        block.forward = lambda x, y: x
    model.register_forward_hook(run)
    assert open_backend("hf", model).info.num_layers == 2


# -- what the checks cost


def test_the_checks_take_three_short_passes_and_leave_nothing_behind() -> None:
    model, widths = tiny("qwen3"), []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: widths.append(kwargs["input_ids"].numel()), with_kwargs=True)
    state = torch.get_rng_state()
    backend = open_backend("hf", model)
    assert torch.equal(torch.get_rng_state(), state)
    assert widths == [10, 10, 10]
    assert sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules()) == 1
    unchecked = open_backend("hf", tiny("qwen3"), verify=False)
    request = [Request(prompt=(5, 9, 31), max_new_tokens=4)]
    assert backend.generate(request) == unchecked.generate(request)


# -- the tokenizer


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_directory_without_a_tokenizer_runs_token_ids_and_names_what_is_missing(family: str, tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path)
    backend = open_backend("hf", str(tmp_path))
    assert backend.tokenizer is None
    assert len(backend.generate([Request(prompt=(5, 9), max_new_tokens=2, ignore_eos=True)])[0].token_ids) == 2
    for prompt in ("ab", (Message(role="user", content="ab"),)):
        with pytest.raises(PrerequisiteError, match=r"has none of tokenizer\.json, .*; copy its tokenizer there, give"):
            backend.encode(prompt)
    given = open_backend("hf", str(tmp_path), tokenizer=tiny_tokenizer())
    assert given.encode("ab").ids
    tiny_tokenizer().save_pretrained(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").unlink()
    assert open_backend("hf", str(tmp_path)).tokenizer is None
    (tmp_path / "tokenizer.json").write_bytes(whole)
    assert open_backend("hf", str(tmp_path)).encode("ab").ids == given.encode("ab").ids


def test_a_tokenizer_that_knows_no_word_is_none(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(PrerequisiteError, match=r"has none of tokenizer\.json"):
        open_backend("hf", str(tmp_path)).encode("ab")


def test_a_model_is_a_name_or_a_module() -> None:
    with pytest.raises(InputError, match="model is 5; a directory, a hub id or a torch module was expected"):
        open_backend("hf", 5)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "complex64"])
def test_a_dtype_that_no_model_runs_in_lists_those_that_do(dtype: str) -> None:
    with pytest.raises(InputError, match=f"in {dtype}; use one of float32, bfloat16, float16, float64"):
        open_backend("hf", "testbed", dtype=dtype)
