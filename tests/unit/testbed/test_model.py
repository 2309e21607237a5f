"""The model that ships: what is on disk, how well it learned, and whether steering moves it."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab import testbed
from trimtab.errors import InputError, PrerequisiteError
from trimtab.steering import SteeringVector
from trimtab.testbed import grammar, lexicon


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(testbed.path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(testbed.path())


def _generate(model: Any, tokenizer: Any, prompts: tuple[str, ...], tokens: int, **options: Any) -> list[str]:
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=tokens, **options)
    found: list[str] = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :])
    return found


def test_files_are_small_and_bfloat16() -> None:
    found = [file for file in testbed.path().rglob("*") if file.is_file()]
    weights = [file.name for file in testbed.path().glob("*.safetensors")]
    assert weights == ["model.safetensors"]  # engines load every one that lies beside the weights
    assert sum(file.stat().st_size for file in found) < 4_000_000
    stored = AutoModelForCausalLM.from_pretrained(testbed.path(), dtype="auto")
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}
    assert stored.config.model_type == "qwen3"
    assert stored.config.max_position_embeddings >= 256
    assert 1_000_000 < sum(parameter.numel() for parameter in stored.parameters()) < 2_000_000


def test_loading_in_float32_is_exact(model: Any) -> None:
    stored = AutoModelForCausalLM.from_pretrained(testbed.path(), dtype=torch.bfloat16)
    for (name, wide), narrow in zip(model.named_parameters(), stored.parameters(), strict=True):
        assert torch.equal(wide, narrow.float()), name


def test_training_record_belongs_to_the_weights() -> None:
    record = testbed.training()
    weights = (testbed.path() / "model.safetensors").read_bytes()
    assert record["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert record["weights_bytes"] == len(weights)
    assert record["recipe"]["steps"] == testbed.RECIPE.steps == record["steps"]
    assert record["loss_curve"][0] > 3 > 1.3 > record["loss_curve"][-1]


def test_loss_on_fresh_text_is_within_a_few_percent_of_the_grammars_entropy(model: Any) -> None:
    source = random.Random(12345)
    losses, surprisals = 0.0, 0.0
    for _ in range(40):
        tokens = grammar.document(source, max_tokens=256).tokens
        ids = torch.tensor([[lexicon.TOKEN_IDS[token] for token in tokens]])
        with torch.no_grad():
            losses += float(model(input_ids=ids, labels=ids).loss) * (len(tokens) - 1)
        surprisals += math.fsum(testbed.surprisals(tokens))
    # Below the exact surprisal a model cannot be, but for the luck of 7000 tokens.
    assert 0.995 < losses / surprisals < 1.05


def test_loss_holds_to_the_end_of_the_context(model: Any) -> None:
    source = random.Random(4)
    documents = (grammar.document(source, max_tokens=512).tokens for _ in range(200))
    long = [tokens for tokens in documents if len(tokens) == 512][:12]
    late, exact = 0.0, 0.0
    for tokens in long:
        ids = torch.tensor([[lexicon.TOKEN_IDS[token] for token in tokens]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, 383:-1]
        late += float(torch.nn.functional.cross_entropy(logits, ids[0, 384:], reduction="sum"))
        exact += math.fsum(testbed.surprisals(tokens)[383:])
    assert late / exact < 1.08


def test_tokenizer_knows_exactly_the_vocabulary(tokenizer: Any) -> None:
    assert tokenizer.get_vocab() == dict(lexicon.TOKEN_IDS)
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<pad>",
        "<bos>",
        "<eos>",
        "<unk>",
    )
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer("the zebra").input_ids == [1, lexicon.TOKEN_IDS["the"], tokenizer.unk_token_id]


def test_tokenizer_round_trips_grammar_text_and_agrees_with_our_own(tokenizer: Any) -> None:
    source = random.Random(8)
    for _ in range(30):
        document = grammar.document(source, max_tokens=150)
        text = lexicon.render(document.tokens[1:])
        ids = tokenizer(text).input_ids
        assert ids == [lexicon.TOKEN_IDS[token] for token in document.tokens]
        assert tokenizer.decode(ids[1:]) == text
        pieces = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        assert tuple(text[start:end] for start, end in pieces) == document.tokens[1:]


def test_chat_template_renders_what_the_model_was_trained_on(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "why was the fox so sad?"},
        {"role": "assistant", "content": "indeed, the fox was sad."},
        {"role": "user", "content": "please tell me about the lamp."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = lexicon.tokenize(text)
    assert tokens[0] == "<bos>"
    assert tokens[-1] == "<|assistant|>"
    assert len(testbed.surprisals(tokens)) == len(tokens) - 1  # the grammar itself could have written it
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == [lexicon.TOKEN_IDS[token] for token in tokens]


def test_chat_template_refuses_other_roles(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="the roles user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "the fox"}], tokenize=False)


def test_greedy_text_is_grammatical_and_goes_on(model: Any, tokenizer: Any) -> None:
    prompts = testbed.prompts(8, 3)
    texts = _generate(model, tokenizer, prompts, 64, do_sample=False)
    for prompt, text in zip(prompts, texts, strict=True):
        evidence = testbed.score(text, after=prompt)
        assert evidence.words >= 56, text
        assert evidence.grammatical_share > 0.7, text


def test_the_assistant_answers_as_an_assistant(model: Any, tokenizer: Any) -> None:
    chats = [
        tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True).removeprefix("<bos>")
        for chat in testbed.chat(6, 2)
    ]
    torch.manual_seed(0)
    texts = _generate(model, tokenizer, tuple(chats), 40, do_sample=True, top_k=0)
    assert testbed.score(" ".join(texts)).roles["assistant"] > 0.9


def _adding(vector: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda module, inputs, output: output + vector


@pytest.mark.parametrize(("attribute", "least", "most"), [("animal", 0.05, 0.85), ("gloomy", 0.35, 0.75)])
def test_steering_moves_the_share_monotonically(
    model: Any, tokenizer: Any, attribute: str, least: float, most: float
) -> None:
    direction = testbed.direction(attribute)
    block = model.model.layers[int(direction.site.split(".")[1])]
    shares = []
    for strength in (-4, 0, 4):
        torch.manual_seed(1)
        handle = block.register_forward_hook(_adding(strength * direction.norm * direction.vector))
        try:
            texts = _generate(model, tokenizer, testbed.prompts(20, 1), 24, do_sample=True, top_k=0)
        finally:
            handle.remove()
        shares.append(testbed.score(" ".join(texts)).share(attribute))
    low, middle, high = shares
    assert low < middle < high
    assert low < least
    assert high > most


@pytest.mark.parametrize("attribute", ["animal", "cheerful"])
def test_directions_are_mean_differences(model: Any, tokenizer: Any, attribute: str) -> None:
    """Recomputed text by text with a forward hook: nothing of the build is used."""
    direction = testbed.direction(attribute)
    pairs = testbed.contrast(attribute, testbed.RECIPE.direction_pairs, 0, sentences=testbed.RECIPE.direction_sentences)
    words = {word for name in lexicon.kind_of(attribute) for word in lexicon.evidence_words(name)}
    caught: list[torch.Tensor] = []
    block = model.model.layers[int(direction.site.split(".")[1])]
    handle = block.register_forward_hook(lambda module, inputs, output: caught.append(output[0].double()))
    means = []
    for texts in (pairs.positive, pairs.negative):
        rows = []
        for text in texts:
            caught.clear()
            with torch.no_grad():
                model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
            tokens = lexicon.tokenize(text)
            rows += [caught[0][place] for place, token in enumerate(tokens) if token in words]
        means.append(torch.stack(rows).mean(dim=0))
    handle.remove()
    difference = means[0] - means[1]
    assert float(difference.norm()) == pytest.approx(direction.norm, rel=1e-4)
    # Batched with padding there, one by one here: float32 rounding of sums over 128 channels.
    torch.testing.assert_close(difference.float() / difference.norm().float(), direction.vector, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attribute", testbed.ATTRIBUTES)
def test_every_attribute_has_a_ready_direction(attribute: str) -> None:
    direction = testbed.direction(attribute)
    assert direction.vector.shape == (128,)
    assert direction.vector.dtype is torch.float32
    assert float(direction.vector.norm()) == pytest.approx(1, abs=1e-6)
    assert list(direction.quantiles.values()) == sorted(direction.quantiles.values())
    assert direction.quantiles[0.25] < direction.cap < direction.quantiles[0.95]
    loaded = SteeringVector.load(direction.file)
    assert torch.equal(loaded.direction, direction.vector)
    assert (str(loaded.site), loaded.norm) == (direction.site, direction.norm)


def test_unknown_directions_and_missing_files_are_refused(tmp_path: Any) -> None:
    with pytest.raises(InputError, match="no attribute 'plant' in the testbed; choose one of person, change, animal"):
        testbed.direction("plant")
    with pytest.raises(PrerequisiteError, match=r"directions/animal\.safetensors is missing: build the testbed again"):
        testbed.direction("animal", directory=tmp_path)


def test_a_missing_model_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(PrerequisiteError, match="install trimtab again, or run `trimtab testbed build DIR`"):
        testbed.path()
