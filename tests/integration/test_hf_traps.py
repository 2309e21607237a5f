"""Known traps of hooking transformers models: each is met by a refusal or shown to do no harm."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trimtab import testbed
from trimtab.backends import Capture, Request, Sampling, open_backend
from trimtab.errors import BackendError, InputError, NotAppliedError, SiteError, UnfiredError
from trimtab.sites import Site
from trimtab.steering import Add, Steering
from trimtab.testing.conformance import MemoryWriter, direction
from trimtab.testing.models import tiny, tiny_tokenizer

PROMPT = (9, 17, 33, 40, 51)
VECTOR = direction(64)


def captured(model: nn.Module, *requests: Request, sites: tuple[str, ...], **options: Any) -> MemoryWriter:
    writer = MemoryWriter()
    open_backend("hf", model).generate(requests, capture=Capture(sites=sites, **options), writer=writer)
    return writer


def add(site: str = "layers.0.resid_post", positions: str = "all") -> Steering:
    return Steering({site: [Add(VECTOR, scale=3.0)]}, positions=positions)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# -- what is read


def test_captures_do_not_depend_on_the_recorder_of_output_hidden_states() -> None:
    """Trap 3: transformers' own recorder hooks stay installed, and would show the unsteered tensor to later hooks."""
    model, ids = tiny("qwen3", layers=3), torch.tensor([PROMPT])
    with torch.no_grad():
        model(input_ids=ids, output_hidden_states=True)
    request = Request(prompt=PROMPT, id="r", steering=add(), max_new_tokens=3, ignore_eos=True)
    writer = captured(model, request, sites=("layers.*.resid_post", "layers.*.resid_pre"))
    for layer in (0, 1):
        after, before = (
            writer.rows(site, "r")[1] for site in (f"layers.{layer}.resid_post", f"layers.{layer + 1}.resid_pre")
        )
        assert torch.equal(after, before)


def test_the_last_resid_post_is_the_stream_before_the_final_norm() -> None:
    """Trap 4: the last of transformers' hidden states is normed."""
    model, ids = tiny("qwen3", layers=2), torch.tensor([PROMPT])
    with torch.no_grad():
        last = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    request = Request(prompt=PROMPT, id="r", max_new_tokens=0)
    writer = captured(model, request, sites=("layers.1.resid_post", "final_norm"))
    stream, normed = (writer.rows(site, "r")[1] for site in ("layers.1.resid_post", "final_norm"))
    torch.testing.assert_close(normed, last, rtol=1e-5, atol=1e-5)
    assert (stream - last).abs().max() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(model.model.norm(stream), last, rtol=1e-5, atol=1e-5)


def test_captured_rows_are_copies() -> None:
    """Trap 34: what the model does with a tensor afterwards does not change what was recorded."""
    model = tiny("qwen3")
    seen: list[torch.Tensor] = []

    def spoil(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        seen.append(output.clone())
        output.zero_()

    backend = open_backend("hf", model)
    writer = MemoryWriter()
    with torch.no_grad():
        run = model.model.norm.register_forward_hook(spoil)
        backend.generate(
            [Request(prompt=PROMPT, id="r", max_new_tokens=3, ignore_eos=True)],
            capture=Capture(sites=("final_norm",)),
            writer=writer,
        )
        run.remove()
    rows = writer.rows("final_norm", "r")[1]
    assert rows.shape[0] == 7
    assert hooks_of(model) == 0


def test_captures_can_be_edited_and_enter_autograd() -> None:
    """Trap 36: tensors of an inference-mode run could be neither."""
    request = Request(prompt=PROMPT, id="r", max_new_tokens=2, ignore_eos=True)
    writer = captured(tiny("qwen3"), request, sites=("layers.0.resid_post",))
    rows = writer.records[0].tensor
    assert not rows.is_inference()
    weight = torch.ones(64, requires_grad=True)
    (rows.add_(1.0) @ weight).sum().backward()
    assert weight.grad is not None


def test_pads_are_in_no_capture_whatever_attention_does_with_them() -> None:
    """Trap 35: pad rows are zeros under sdpa and averages under eager; means of captures must agree."""
    requests = [
        Request(prompt=PROMPT[:2], id="short", max_new_tokens=2, ignore_eos=True),
        Request(prompt=PROMPT, id="long", max_new_tokens=2, ignore_eos=True),
    ]
    means = {}
    for attention in ("sdpa", "eager"):
        model = tiny("qwen3")
        model.set_attn_implementation(attention)
        writer = captured(model, *requests, sites=("layers.0.attn_out",))
        assert [len(writer.rows("layers.0.attn_out", name)[0]) for name in ("short", "long")] == [3, 6]
        means[attention] = torch.cat([one.tensor for one in writer.records]).mean(0)
    torch.testing.assert_close(means["sdpa"], means["eager"], rtol=1e-4, atol=1e-5)


# -- what is run


def test_left_padding_keeps_learned_positions() -> None:
    """Trap 14: GPT-2 beside a longer prompt gives the logits of a plain forward pass."""
    model = tiny("gpt2")
    requests = [
        Request(prompt=PROMPT[:1], id="short", max_new_tokens=1),
        Request(prompt=PROMPT, id="long", max_new_tokens=1),
    ]
    writer = captured(model, *requests, sites=("logits",))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([PROMPT[:1]])).logits[0]
    torch.testing.assert_close(writer.rows("logits", "short")[1], expected, rtol=1e-5, atol=1e-5)


def test_float64_with_eager_attention_and_padding_is_refused() -> None:
    """Trap 15: it gives NaN in real rows."""
    model = tiny("qwen3", dtype=torch.float64)
    model.set_attn_implementation("eager")
    backend = open_backend("hf", model)
    requests = [Request(prompt=PROMPT[:2], max_new_tokens=1), Request(prompt=PROMPT, max_new_tokens=1)]
    with pytest.raises(BackendError, match="sdpa"):
        backend.generate(requests)
    assert len(backend.generate(requests[:1])) == 1


def test_a_pad_token_that_is_the_end_token_masks_nothing_real() -> None:
    """Trap 16: a prompt may hold the end token, and the end token may be the pad."""
    model = tiny("gpt2")
    model.config.pad_token_id = model.generation_config.pad_token_id = 2
    prompt = (2, 9, 2, 17)
    writer = captured(model, Request(prompt=prompt, id="r", max_new_tokens=1), sites=("logits",))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt])).logits[0, -1:]
    torch.testing.assert_close(writer.rows("logits", "r")[1], expected, rtol=1e-5, atol=1e-5)


def test_what_is_sampled_does_not_touch_the_recorded_logits() -> None:
    """Trap 19: temperature and filters work on a copy."""
    sampling = Sampling(temperature=2.0, top_k=3, top_p=0.5, seed=1)
    request = Request(prompt=PROMPT, id="r", max_new_tokens=5, ignore_eos=True, sampling=sampling)
    model = tiny("qwen3")
    writer = MemoryWriter()
    (result,) = open_backend("hf", model).generate([request], capture=Capture(sites=("logits",)), writer=writer)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*PROMPT, *result.token_ids[:-1]]])).logits[0, 4:]
    torch.testing.assert_close(writer.rows("logits", "r")[1], logits, rtol=1e-4, atol=1e-4)


def test_sampling_keeps_every_token_unless_told_otherwise() -> None:
    """Trap 20: transformers samples from the best 50 when nothing was said."""
    sampling = Sampling(temperature=1e6, seed=0)
    request = Request(prompt=PROMPT, max_new_tokens=400, ignore_eos=True, sampling=sampling)
    (result,) = open_backend("hf", tiny("qwen3")).generate([request])
    assert len(set(result.token_ids)) > 100


def test_the_models_own_generation_settings_are_not_followed() -> None:
    """Trap 22: no beams, no sampling, no penalties from generation_config; only its end tokens count."""
    request = Request(prompt=PROMPT, max_new_tokens=6, ignore_eos=True)
    expected = open_backend("hf", tiny("qwen3")).generate([request])
    model = tiny("qwen3")
    settings = model.generation_config
    settings.num_beams, settings.do_sample, settings.top_k, settings.repetition_penalty = 4, True, 5, 2.0
    assert open_backend("hf", model).generate([request]) == expected
    settings.eos_token_id = [expected[0].token_ids[2]]
    (ended,) = open_backend("hf", model).generate([Request(prompt=PROMPT, max_new_tokens=6)])
    assert (ended.stop, ended.token_ids) == ("eos", expected[0].token_ids[:3])


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_a_chunked_prefill_gives_the_same_rows_once_each(chunk: int) -> None:
    """Trap 23: the width of a pass is not the length of the prompt."""
    requests = [
        Request(prompt=one, id=str(len(one)), steering=add(positions="1:4"), max_new_tokens=3, ignore_eos=True)
        for one in (PROMPT, PROMPT[:3])
    ]
    found = []
    for size in (None, chunk):
        writer = MemoryWriter()
        backend = open_backend("hf", tiny("qwen3"), prefill_chunk=size)
        done = backend.generate(requests, capture=Capture(sites=("layers.1.resid_post", "logits")), writer=writer)
        found.append((done, writer))
    (whole, one), (chunked, two) = found
    assert [a.token_ids for a in whole] == [a.token_ids for a in chunked]
    assert [a.doses[0].rows for a in whole] == [a.doses[0].rows for a in chunked]
    for name in ("5", "3"):
        for site in ("layers.1.resid_post", "logits"):
            (places, rows), (same, pieces) = one.rows(site, name), two.rows(site, name)
            assert places == same
            torch.testing.assert_close(rows, pieces, rtol=1e-4, atol=1e-5)
    scores = [
        open_backend("hf", tiny("qwen3"), prefill_chunk=size).score([PROMPT, PROMPT[:2]]) for size in (None, chunk)
    ]
    for a, b in zip(*scores, strict=True):
        assert b.logprobs == pytest.approx(a.logprobs, rel=1e-4)


def test_checkpointing_and_training_mode_change_nothing_and_come_back() -> None:
    """Traps 13 and 31: hooks would run twice, and dropout would be on."""
    expected = open_backend("hf", tiny("gpt2")).generate([Request(prompt=PROMPT, steering=add(), max_new_tokens=4)])
    model = tiny("gpt2")
    model.config.resid_pdrop = 0.5
    model.gradient_checkpointing_enable()
    model.train()
    model.lm_head.eval()
    backend = open_backend("hf", model)
    assert backend.generate([Request(prompt=PROMPT, steering=add(), max_new_tokens=4)]) == expected
    assert expected[0].doses[0].rows == expected[0].rows
    assert model.training and model.transformer.h[0].training and not model.lm_head.training


def test_ambient_precision_settings_change_no_bit_and_come_back() -> None:
    """Trap 26: autocast and a reduced matrix precision would round projections inside ops."""
    request = Request(prompt=PROMPT, id="r", steering=add(), max_new_tokens=3, ignore_eos=True)
    plain = captured(tiny("qwen3"), request, sites=("layers.*.resid_post", "logits"))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ambient = captured(tiny("qwen3"), request, sites=("layers.*.resid_post", "logits"))
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(plain.records, ambient.records, strict=True))


def test_the_same_batch_twice_differs_by_nothing_and_another_batch_by_rounding() -> None:
    """Trap 27: what the size of a batch does to a row is not an effect of steering."""
    backend = open_backend("hf", tiny("qwen3"))
    request = Request(prompt=PROMPT, id="r", forced_tokens=(9, 8, 7, 6))
    others = [Request(prompt=PROMPT, id=f"o{index}", forced_tokens=(9, 8, 7, 6)) for index in range(3)]

    def rows(*requests: Request) -> torch.Tensor:
        writer = MemoryWriter()
        backend.generate(requests, capture=Capture(sites=("logits",)), writer=writer)
        return writer.rows("logits", "r")[1]

    assert torch.equal(rows(request, *others), rows(request, *others))
    torch.testing.assert_close(rows(request), rows(request, *others), rtol=1e-4, atol=1e-5)


# -- hooks


@pytest.mark.parametrize("fail_at", [0, 3, 5])
def test_an_error_in_a_hook_surfaces_and_leaves_no_hook(fail_at: int) -> None:
    """Trap 24: in the prefill and in the middle of the decoding."""
    model = tiny("qwen3", layers=3)
    backend = open_backend("hf", model)
    request = Request(prompt=PROMPT, id="r", steering=add(), max_new_tokens=300, ignore_eos=True)
    with pytest.raises(RuntimeError, match="on purpose"):
        backend.generate(
            [request], capture=Capture(sites=("layers.*.resid_post",)), writer=MemoryWriter(fail_at=fail_at)
        )
    assert hooks_of(model) == 0
    assert all(not module.training for module in model.modules())


def test_a_run_leaves_no_hook() -> None:
    model = tiny("qwen3")
    captured(model, Request(prompt=PROMPT, id="r", steering=add(), max_new_tokens=2), sites=("layers.*.resid_post",))
    assert hooks_of(model) == 0


@pytest.mark.parametrize("way", ["compile", "torch.compile", "block"])
def test_a_compiled_model_is_refused(way: str) -> None:
    """Trap 12: hooks that are added after compiling are ignored without a word."""
    model: Any = tiny("qwen3")
    if way == "compile":
        model.compile(backend="eager")
    elif way == "block":
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    with pytest.raises(BackendError, match="compile"):
        open_backend("hf", model)


def test_a_site_whose_module_never_runs_is_named() -> None:
    """Nothing captured, or an op not applied: the message names the hook and the site."""
    model = tiny("qwen3")
    model.extra = nn.Linear(64, 64)
    backend = open_backend("hf", model)
    request = Request(prompt=PROMPT, id="r", max_new_tokens=1)
    with pytest.raises(BackendError, match=r"nothing was captured at module:extra\.output.*module 'extra' never ran"):
        backend.generate([request], capture=Capture(sites=("module:extra.output",)), writer=MemoryWriter())
    steered = Request(prompt=PROMPT, id="r", steering=add("module:extra.output"), max_new_tokens=1)
    with pytest.raises(NotAppliedError, match=r"0:Add at module:extra\.output was not applied"):
        backend.generate([steered], allow_unfired=True)


def test_positions_that_no_request_has_are_named() -> None:
    backend = open_backend("hf", tiny("qwen3"))
    capture = Capture(sites=("layers.0.resid_post",), positions="generated")
    request = Request(prompt=PROMPT, id="r", max_new_tokens=1)
    with pytest.raises(UnfiredError, match=r"nothing was captured at layers\.0\.resid_post: positions generated"):
        backend.generate([request], capture=capture, writer=MemoryWriter())
    assert backend.generate([request], capture=capture, writer=MemoryWriter(), allow_unfired=True)


def test_any_module_with_one_row_per_token_can_be_captured() -> None:
    model = tiny("qwen3")
    request = Request(prompt=PROMPT, id="r", max_new_tokens=2, ignore_eos=True)
    writer = captured(model, request, sites=("module:model.layers.0.mlp.output", "layers.0.mlp_raw"))
    a, b = (writer.rows(site, "r") for site in ("module:model.layers.0.mlp.output", "layers.0.mlp_raw"))
    assert a[0] == b[0] == list(range(6))
    assert torch.equal(a[1], b[1])
    with pytest.raises(SiteError, match="no backward pass"):
        captured(model, request, sites=("module:model.layers.0.mlp.grad_output",))
    with pytest.raises(BackendError, match="one per token"):
        captured(tiny("mixtral"), request, sites=("module:model.layers.0.mlp.gate.output",))


# -- loading


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to(torch.bfloat16).float()]
)
def test_a_model_with_rounded_rotary_tables_is_refused(cast: Callable[[nn.Module], nn.Module]) -> None:
    """Trap 11: `.to(dtype)` rounds the tables, and casting back does not mend them."""
    with pytest.raises(BackendError, match=r"inv_freq was rounded.*from_pretrained\(\.\.\., dtype"):
        open_backend("hf", cast(tiny("qwen3")))


def test_a_softcap_that_sdpa_drops_is_warned_about_or_kept(tmp_path: Path) -> None:
    """Trap 10: Gemma 2 under sdpa loses its attention softcap."""
    model = tiny("gemma2")
    model.set_attn_implementation("sdpa")
    with pytest.warns(UserWarning, match="drops this model's attention softcap of 50"):
        backend = open_backend("hf", model)
    assert any("softcap" in note for note in backend.info.notes)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = open_backend("hf", str(tmp_path))
    assert loaded.info.attention == "eager"
    assert any("eager" in note for note in loaded.info.notes)
    with pytest.warns(UserWarning, match="softcap"):
        open_backend("hf", str(tmp_path), attention="sdpa")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "float32 and dtype=bfloat16 was asked for"),
        ({"device": "cuda"}, "lies on cpu"),
        ({"attention": "eager"}, "set_attn_implementation"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_options_that_a_loaded_module_cannot_follow_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_backend("hf", tiny("qwen3"), **options)


def test_a_model_that_is_none_gets_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"")
    cases = {
        str(tmp_path / "absent"): "no such directory",
        str(tmp_path): "without a config.json",
        str(file): "is a file",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            open_backend("hf", name)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(InputError, match="cannot be loaded") as found:
        open_backend("hf", str(tmp_path))
    assert "\n" not in str(found.value)
    with pytest.raises(InputError, match="no config"):
        open_backend("hf", nn.Linear(2, 2))
    with pytest.raises(InputError, match="no backend 'torch'; there are hf, mock, vllm"):
        open_backend("torch", "x")


def test_a_foreign_hook_that_breaks_the_sites_is_found_at_load() -> None:
    model = tiny("qwen3", layers=3)
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1.0, *args[1:]))
    with pytest.raises(BackendError, match="chain"):
        open_backend("hf", model)


def test_provenance_holds_the_inventory_of_sites_and_the_checks() -> None:
    backend = open_backend("hf", tiny("qwen3"))
    found = backend.provenance()
    assert found["sites"]["layers.1.resid_mid"] == {
        "module": "model.layers.1.post_attention_layernorm",
        "side": "input",
        "width": 64,
    }
    assert found["checks"]["identity"] and found["checks"]["effect"]
    assert found["checks"]["chain"] == 0.0
    assert found["model_dtype"] == "float32" and found["attention"] == "sdpa"
    assert Site.parse("layers.0.attn_z") in backend.sites()
    backend.close()


def test_weights_that_were_cut_off_are_refused_in_one_line(tmp_path: Path) -> None:
    place = tmp_path / "cut"
    shutil.copytree(testbed.path(), place)
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        open_backend("hf", str(place))
    assert "\n" not in str(caught.value)
