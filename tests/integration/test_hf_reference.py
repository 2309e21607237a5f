"""The Hugging Face backend against transformers itself: its hidden states, its logits, its generate()."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trimtab.backends import Capture, Request, open_backend
from trimtab.numerics import tolerances
from trimtab.steering import Add, Steering
from trimtab.testing.conformance import MemoryWriter, direction, rel_l2
from trimtab.testing.models import tiny, tiny_tokenizer

FAMILIES = ("qwen3", "gpt2", "gemma2", "llama", "mixtral", "olmo2")
PROMPTS = ((9, 17, 33), (40, 41, 42, 43, 44, 45, 46, 50), (60,))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_logits_of_a_padded_batch_are_those_of_plain_forward_passes(family: str) -> None:
    model = tiny(family)
    if family == "gemma2":
        model.set_attn_implementation("eager")
    backend = open_backend("hf", model)
    writer = MemoryWriter()
    requests = [Request(prompt=one, id=str(len(one)), max_new_tokens=8, ignore_eos=True) for one in PROMPTS]
    capture = Capture(sites=("layers.*.resid_post", "logits", "embed"), prompt_logits=True)
    done = backend.generate(requests, capture=capture, writer=writer)
    bound = tolerances.decode_vs_forward()
    for result in done:
        ids = torch.tensor([[*result.prompt_ids, *result.token_ids[:-1]]])
        with torch.no_grad():
            output = model(input_ids=ids, output_hidden_states=True)
        for site, expected in (
            ("layers.0.resid_post", output.hidden_states[1][0]),
            ("logits", output.logits[0]),
            ("embed", model.get_input_embeddings()(ids)[0].detach()),
        ):
            places, rows = writer.rows(site, result.id)
            assert places == list(range(ids.shape[1]))
            assert rel_l2(rows, expected) <= bound.rel_l2
            worst = (rows - expected).abs().amax(-1) / expected.abs().amax(-1)
            assert worst.max() <= bound.max_abs


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logprobs_are_those_of_generate(family: str) -> None:
    model = tiny(family, seed=1)
    if family == "gemma2":
        model.set_attn_implementation("eager")
    results = open_backend("hf", model).generate(
        [Request(prompt=one, id=str(len(one)), max_new_tokens=10) for one in PROMPTS]
    )
    for result in results:
        ids = torch.tensor([result.prompt_ids])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        expected = made.sequences[0, ids.shape[1] :]
        assert result.token_ids == tuple(expected.tolist())
        logprobs = torch.log_softmax(torch.cat(made.logits).float(), -1).gather(1, expected[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.logprobs), logprobs, rtol=1e-4, atol=1e-4)


def test_a_steered_run_is_that_of_a_bare_hook() -> None:
    model, vector = tiny("qwen3", layers=3), direction(64)
    backend = open_backend("hf", model)
    steering = Steering({"layers.1.resid_post": [Add(vector, scale=4.0)]})
    (steered,) = backend.generate([Request(prompt=PROMPTS[1], steering=steering, max_new_tokens=8)])
    ids = torch.tensor([PROMPTS[1]])
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: output + 4.0 * vector)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    handle.remove()
    assert steered.token_ids == tuple(made[0, ids.shape[1] :].tolist())
    assert steered.token_ids != backend.generate([Request(prompt=PROMPTS[1], max_new_tokens=8)])[0].token_ids


def test_score_is_the_loss_of_the_model() -> None:
    model = tiny("llama")
    for score in open_backend("hf", model).score(list(PROMPTS[:2])):
        ids = torch.tensor([score.ids])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        assert -score.total / (len(score.ids) - 1) == pytest.approx(loss.item(), rel=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny("qwen3", seed=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_saved_model_is_loaded_in_the_dtype_asked_for(saved: Path, dtype: str) -> None:
    backend = open_backend("hf", str(saved), dtype=dtype)
    assert backend.info.dtype == dtype
    assert backend.model_id == str(saved)
    assert all(one.dtype is torch.float32 for name, one in backend.model.named_buffers() if "inv_freq" in name)
    writer = MemoryWriter()
    (result,) = backend.generate(
        [Request(prompt="hello", id="r", max_new_tokens=2, ignore_eos=True)],
        capture=Capture(sites=("layers.0.resid_post",)),
        writer=writer,
    )
    rows = writer.rows("layers.0.resid_post", "r")[1]
    assert str(rows.dtype) == f"torch.{dtype}" and rows.isfinite().all()
    assert len(result.prompt_ids) == 5
    assert [one.text for one in writer.tokens][:5] == list("hello")


def test_the_weights_digest_names_the_weights(saved: Path, tmp_path: Path) -> None:
    first, second = (open_backend("hf", str(saved), dtype=one).info.weights_digest for one in ("float32", "bfloat16"))
    assert first == second and first.startswith("xxh3:full:")
    tiny("qwen3", seed=4).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert open_backend("hf", str(tmp_path)).info.weights_digest != first
    modules = [open_backend("hf", tiny("qwen3", seed=one)).info.weights_digest for one in (3, 3, 4)]
    assert modules[0] == modules[1] != modules[2]


def test_float64_is_an_oracle_that_does_not_depend_on_the_batch() -> None:
    """float64 with sdpa: a padded batch gives the solo rows to the last bit of float32."""
    model = tiny("qwen3", dtype=torch.float64)
    backend = open_backend("hf", model)
    requests = [Request(prompt=one, id=str(len(one)), max_new_tokens=4, ignore_eos=True) for one in PROMPTS]
    capture = Capture(sites=("logits",))
    batch = MemoryWriter()
    backend.generate(requests, capture=capture, writer=batch)
    for request in requests:
        solo = MemoryWriter()
        backend.generate([request], capture=capture, writer=solo)
        a, b = (writer.rows("logits", request.id)[1].float() for writer in (batch, solo))
        assert torch.equal(a, b)


def test_experts_are_loaded_for_float64(tmp_path: Path) -> None:
    tiny("mixtral").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    backend = open_backend("hf", str(tmp_path), dtype="float64")
    (result,) = backend.generate([Request(prompt=(9, 8, 7), max_new_tokens=3, ignore_eos=True)])
    assert len(result.token_ids) == 3
