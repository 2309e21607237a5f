"""Train the embedded model from its seed: grammar in, a directory for `from_pretrained` out.

The same recipe, seed, machine, library versions and thread count give the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trimtab._base import files, jsonio, provenance
from trimtab._base.progress import progress as show_progress
from trimtab.errors import InputError, RecipeError
from trimtab.sites import Site
from trimtab.steering import SteeringVector
from trimtab.testbed import assets, exact, grammar, lexicon, scorer
from trimtab.testbed.recipe import RECIPE, Recipe
from trimtab.workflows._arguments import checked

FORMAT_VERSION = 1
"""Of training.json. 1: recipe, seed, loss curve, evaluation, directions, steering check, versions."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95)
_IGNORED = -100
_CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant'] %}
        {{- raise_exception("the testbed's chat has the roles user and assistant, not " ~ message['role']) }}
    {%- endif %}
    {{- '<|' ~ message['role'] ~ '|> ' ~ message['content'] ~ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TestbedBuild:
    """What a build made and how good it is."""

    __test__ = False  # not a test, whatever pytest makes of the name

    path: str
    seed: int
    steps: int
    parameters: int
    weights_bytes: int
    weights_sha256: str
    loss: float
    """Mean loss in nats per token of the rounded (bfloat16) weights on fresh text, computed in float32."""
    surprisal: float
    """Mean exact surprisal of the same tokens under the grammar: the loss of a perfect model on them."""
    entropy: float
    """Mean exact entropy of the grammar's next-token distributions at the same places."""
    steering: dict[str, float]
    """Share of animal nouns by strength of the animal direction."""
    seconds: float

    @property
    def excess(self) -> float:
        """Loss above the exact surprisal, as a fraction of it; 0 is a perfect model."""
        return self.loss / self.surprisal - 1


@checked
def build(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    steps: int | None = None,
    recipe: Recipe = RECIPE,
    progress: bool | None = None,
) -> TestbedBuild:
    """Train the embedded model and write its directory, whole or not at all.

    Args:
        out: a directory that does not exist yet, or is empty.
        seed: of the initial weights, the corpus and every check.
        steps: optimizer steps instead of the recipe's.
        recipe: architecture, training and checks.
        progress: show a bar on standard error; None shows it on a terminal.

    Returns:
        Where it is and how good it is; `training.json` in the directory holds more.

    Raises:
        InputError: `out` is a file or a directory with content, or its parent does not exist.
        RecipeError: impossible numbers.
    """
    recipe = recipe if steps is None else replace(recipe, steps=steps)
    if not -(2**63) <= seed < 2**64:
        raise RecipeError(f"seed is {seed}; an integer of 64 bits was expected")
    target = _check_target(Path(out))
    started = time.perf_counter()
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    staging.chmod(0o755)
    try:
        with torch.random.fork_rng(devices=[]), show_progress("training", recipe.steps, show=progress) as bar:
            torch.manual_seed(seed)
            model, curve = _train(recipe, seed, bar.advance)
            bar.describe("checking")
            _write_model(model, staging)
            result = _check_and_record(model, staging, recipe, seed, curve, started)
        for file in staging.iterdir():
            file.chmod(0o644)
        if target.exists():
            target.rmdir()
        staging.replace(target)
        files.fsync_directory(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return replace(result, path=str(target))


def _check_target(target: Path) -> Path:
    if target.is_file():
        raise InputError(f"{target} is a file; give a directory that does not exist yet")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target} is not empty; give a directory that does not exist yet")
    if not target.absolute().parent.is_dir():
        raise InputError(f"{target.absolute().parent} does not exist; make it first, or choose another place")
    return target.absolute()


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer of the closed vocabulary, with its chat template."""
    words = Tokenizer(models.WordLevel(dict(lexicon.TOKEN_IDS), unk_token=lexicon.UNK))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    marks = [decoders.Replace(f" {mark}", mark) for mark in ".,?:"]
    words.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False), *marks])
    words.post_processor = processors.TemplateProcessing(
        single=f"{lexicon.BOS} $A", special_tokens=[(lexicon.BOS, lexicon.TOKEN_IDS[lexicon.BOS])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words,
        pad_token=lexicon.PAD,
        bos_token=lexicon.BOS,
        eos_token=lexicon.EOS,
        unk_token=lexicon.UNK,
        additional_special_tokens=list(lexicon.ROLE_MARKS.values()),
        clean_up_tokenization_spaces=False,
        model_max_length=RECIPE.max_positions,
        padding_side="left",
        chat_template=_CHAT_TEMPLATE,
    )


def _new_model(recipe: Recipe) -> Any:
    ids = lexicon.TOKEN_IDS
    config = Qwen3Config(
        vocab_size=len(lexicon.VOCABULARY),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        initializer_range=recipe.initializer_range,
        tie_word_embeddings=False,
        pad_token_id=ids[lexicon.PAD],
        bos_token_id=ids[lexicon.BOS],
        eos_token_id=ids[lexicon.EOS],
        dtype=torch.float32,
    )
    return Qwen3ForCausalLM(config)  # type: ignore[no-untyped-call]


def _train(recipe: Recipe, seed: int, advance: Any) -> tuple[Any, list[float]]:
    model = _new_model(recipe).train()
    corpus = random.Random(f"corpus/{seed}")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    curve, recent = [], []
    for step in range(recipe.steps):
        rows, length = recipe.batches[step % len(recipe.batches)]
        ids, labels = _batch([grammar.document(corpus, max_tokens=length).tokens for _ in range(rows)])
        loss = _losses(model, ids, labels).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if len(recent) == recipe.log_every or step + 1 == recipe.steps:
            curve.append(math.fsum(recent) / len(recent))
            recent = []
        advance()
    return model.eval(), curve


def _rate(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _batch(documents: Sequence[Sequence[str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right; labels [rows, tokens] int64 hold -100 at padding and at the first token."""
    length = max(map(len, documents))
    ids = torch.full((len(documents), length), lexicon.TOKEN_IDS[lexicon.PAD])
    for row, tokens in enumerate(documents):
        ids[row, : len(tokens)] = torch.tensor([lexicon.TOKEN_IDS[token] for token in tokens])
    labels = ids.masked_fill(ids == lexicon.TOKEN_IDS[lexicon.PAD], _IGNORED)
    labels[:, 0] = _IGNORED
    return ids, labels


def _losses(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss in nats of every predicted token, flat, padding left out."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    wanted = labels[:, 1:]
    kept = wanted != _IGNORED
    return torch.nn.functional.cross_entropy(logits[kept].float(), wanted[kept], reduction="none")


def _write_model(model: Any, directory: Path) -> None:
    """Round the weights to bfloat16, in the model as in the file; the model goes on computing in float32."""
    rounded = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict(rounded)
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    save_file(rounded, directory / "model.safetensors", metadata={"format": "pt"})
    ids = lexicon.TOKEN_IDS
    GenerationConfig(  # type: ignore[no-untyped-call]
        pad_token_id=ids[lexicon.PAD], bos_token_id=ids[lexicon.BOS], eos_token_id=ids[lexicon.EOS]
    ).save_pretrained(directory)
    tokenizer().save_pretrained(directory)


@torch.no_grad()
def _check_and_record(
    model: Any, directory: Path, recipe: Recipe, seed: int, curve: list[float], started: float
) -> TestbedBuild:
    source = random.Random(f"evaluation/{seed}")
    documents = [
        grammar.document(source, max_tokens=recipe.evaluation_tokens).tokens for _ in range(recipe.evaluation_documents)
    ]
    evaluation, rows = _evaluate(model, documents, recipe.direction_layer)
    weights = (directory / "model.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    vectors = {name: _direction(model, name, recipe, seed, rows, digest) for name in lexicon.ATTRIBUTES}
    (directory / "directions").mkdir()
    for name, vector in vectors.items():
        vector.save(directory / assets.direction_file(name))
    result = TestbedBuild(
        path=str(directory),
        seed=seed,
        steps=recipe.steps,
        parameters=sum(p.numel() for p in model.parameters()),
        weights_bytes=len(weights),
        weights_sha256=digest,
        steering=_steering_check(model, vectors["animal"].vector, recipe, seed),
        seconds=round(time.perf_counter() - started, 1),
        **evaluation,
    )
    record = {key: value for key, value in asdict(result).items() if key != "path"}
    machine = {"versions": provenance.versions(), "threads": torch.get_num_threads()}
    text = jsonio.dumps(
        {
            "format_version": FORMAT_VERSION,
            **record,
            "excess": result.excess,
            "recipe": asdict(recipe),
            "loss_curve": [round(value, 5) for value in curve],
            "directions": {name: _about(vector) for name, vector in vectors.items()},
            **machine,
        },
        indent=1,
    )
    files.atomic_write_text(directory / "training.json", text + "\n")
    return result


def _evaluate(model: Any, documents: Sequence[Sequence[str]], layer: int) -> tuple[dict[str, float], torch.Tensor]:
    """Loss, exact surprisal and entropy of documents, and their hidden states [rows, hidden_size] after a layer."""
    losses, rows = [], []
    surprisals: list[float] = []
    entropies: list[float] = []
    for first in range(0, len(documents), 16):
        chunk = documents[first : first + 16]
        ids, labels = _batch(chunk)
        losses.append(_losses(model, ids, labels).double())
        rows.append(_hidden(model, ids, layer)[ids != lexicon.TOKEN_IDS[lexicon.PAD]])
        for tokens in chunk:
            surprisals += exact.surprisals(tokens)
            entropies += exact.conditional_entropies(tokens)
    means = {
        "loss": float(torch.cat(losses).mean()),
        "surprisal": math.fsum(surprisals) / len(surprisals),
        "entropy": math.fsum(entropies) / len(entropies),
    }
    return means, torch.cat(rows)


def _hidden(model: Any, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """The residual stream after a block that is not the last, [rows, tokens, hidden_size]."""
    states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    found: torch.Tensor = states[layer + 1]
    return found


def _direction(
    model: Any, attribute: str, recipe: Recipe, seed: int, rows: torch.Tensor, digest: str
) -> SteeringVector:
    """The mean difference of an attribute's contrast set, calibrated on the rows of fresh text."""
    pairs = grammar.contrast(attribute, recipe.direction_pairs, seed, sentences=recipe.direction_sentences)
    means = [_mean_state(model, attribute, texts, recipe) for texts in (pairs.positive, pairs.negative)]
    difference = means[0] - means[1]
    unit = (difference / difference.norm()).float()
    projections = rows.double() @ unit.double()
    fractions = sorted({*QUANTILES, recipe.cap_quantile})
    return SteeringVector(
        direction=unit,
        norm=float(difference.norm()),
        site=Site.parse(f"layers.{recipe.direction_layer}.resid_post"),
        recipe={
            "method": "mean_difference",
            "attribute": attribute,
            "pairs": recipe.direction_pairs,
            "sentences": recipe.direction_sentences,
            "tokens": "rows that predict a word of the same kind",
            "seed": seed,
            "cap": round(float(projections.quantile(recipe.cap_quantile)), 2),
        },
        model_digest=f"sha256:{digest}",
        data_hash=f"sha256:{hashlib.sha256(jsonio.dumps(asdict(pairs)).encode()).hexdigest()}",
        quantiles={fraction: float(projections.quantile(fraction)) for fraction in fractions},
        median_norm=float(rows.double().norm(dim=-1).median()),
        provenance={"model": "testbed", "versions": provenance.versions()},
    )


def _about(vector: SteeringVector) -> dict[str, Any]:
    """What training.json says of a direction."""
    return {
        "site": str(vector.site),
        "norm": round(vector.norm, 4),
        "median_norm": round(vector.median_norm or 0.0, 4),
        "cap": vector.recipe["cap"],
        "quantiles": {f"{fraction:g}": round(value, 4) for fraction, value in vector.quantiles.items()},
    }


def _mean_state(model: Any, attribute: str, texts: Sequence[str], recipe: Recipe) -> torch.Tensor:
    """Mean over the rows that predict a word of the attribute's kind, such as any noun; [hidden_size] float64."""
    ids, _ = _batch([(lexicon.BOS, *lexicon.tokenize(text)) for text in texts])
    words = sorted(word for name in lexicon.kind_of(attribute) for word in lexicon.evidence_words(name))
    predicted = torch.isin(ids[:, 1:], torch.tensor([lexicon.TOKEN_IDS[word] for word in words]))
    return _hidden(model, ids, recipe.direction_layer)[:, :-1][predicted].double().mean(dim=0)


def _steering_check(model: Any, difference: torch.Tensor, recipe: Recipe, seed: int) -> dict[str, float]:
    """Share of animal nouns in sampled continuations, by strength of the animal direction."""
    words = tokenizer()
    prompts = grammar.prompts(recipe.steering_prompts, seed)
    inputs = words(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    found = {}
    for strength in recipe.steering_strengths:
        torch.manual_seed(seed)
        with _added(model.model.layers[recipe.direction_layer], strength * difference):
            ids = model.generate(
                **inputs,
                max_new_tokens=recipe.steering_tokens,
                do_sample=True,
                top_k=0,
                pad_token_id=lexicon.TOKEN_IDS[lexicon.PAD],
            )
        texts = words.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found[f"{strength:g}"] = round(scorer.score(" ".join(texts)).share("animal"), 4)
    return found


@contextlib.contextmanager
def _added(block: Any, vector: torch.Tensor) -> Iterator[None]:
    """Add a vector to a block's output in every row: a bias on its last projection is the same thing, without hooks."""
    projection = block.mlp.down_proj
    projection.bias = torch.nn.Parameter(vector, requires_grad=False)
    try:
        yield
    finally:
        projection.bias = None
