"""Training: what it does to the loss, what it restores, what it saves, how it goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab import testbed
from trimtab.backends import Request
from trimtab.errors import InputError, NonFiniteError, SiteError, UnfinishedError, VectorError
from trimtab.results import from_json, to_json
from trimtab.results.training import Training
from trimtab.steering import Add, LowRank, Steering, SteeringVector
from trimtab.vectors.train import (
    Engine,
    Preference,
    TokenSequence,
    Trained,
    TrainingConfig,
    TrainingData,
    load_trained,
    prepare,
    sweep_lr,
    train,
)
from trimtab.vectors.train import _loop as loop_module
from trimtab.vectors.train._maps import LowRankMap, VectorMap

SITE = "layers.3.resid_post"


def losses(trained: Trained) -> list[float]:
    return [one.loss for one in trained.result.steps]


def vector(trained: Trained) -> torch.Tensor:
    (one,) = trained.steering.bound
    assert isinstance(one.op, Add)
    return one.op.vector


def test_float32_vectors_on_a_bfloat16_model_improve_with_the_rate_until_its_optimum(half: Engine) -> None:
    """A vector kept in bfloat16 does not move at the small rates: its steps are below its own rounding."""
    sweep = sweep_lr(half, "testbed:animal", sites=(SITE,), epochs=3)
    assert [row.learning_rate for row in sweep.rows] == [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    found = [row.loss for row in sweep.rows if row.loss is not None]
    best = found.index(min(found))
    assert best >= 5
    assert found[: best + 1] == sorted(found[: best + 1], reverse=True)
    norms = [row.norm or 0.0 for row in sweep.rows]
    assert norms == sorted(norms) and norms[0] > 0.01
    assert sweep.best_rate == sweep.rows[best].learning_rate


def test_the_parameters_stay_float32(half: Engine, config: TrainingConfig, small: TrainingData) -> None:
    """A hook that casts the parameter to the model's dtype shows as a vector of bfloat16 values."""
    found = vector(train(half, small, config))
    assert found.dtype is torch.float32
    assert not torch.equal(found, found.to(torch.bfloat16).float())


def test_small_steps_are_not_lost_on_a_large_vector(half: Engine, small: TrainingData) -> None:
    settings = {"sites": (SITE,), "epochs": 1, "schedule": "constant", "warmup": 0.0, "patience": 0, "init_scale": 50.0}
    made = [train(half, small, learning_rate=rate, max_steps=1, **settings) for rate in (1e-3, 1e-9)]
    moved = (vector(made[0]) - vector(made[1])).abs()
    assert float(moved.median()) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("restored_with", [0, 2])
def test_the_best_is_restored_with_and_without_early_stopping(
    engine: Engine, small: TrainingData, restored_with: int
) -> None:
    """Restoring only when patience is set, or never, leaves the last vector, which is worse here by far."""
    config = TrainingConfig(
        sites=(SITE,), learning_rate=6.0, epochs=8, evaluate_every=1, patience=restored_with, schedule="constant"
    )
    made = train(engine, small, config)
    result = made.result
    marked = [one for one in result.evaluations if one.best]
    lowest = min(result.evaluations, key=lambda one: one.loss)
    assert result.best_step == lowest.step == marked[-1].step < result.evaluations[-1].step
    assert result.best_loss == lowest.loss < result.evaluations[-1].loss
    assert result.validation is not None
    assert result.validation.steered == pytest.approx(lowest.perplexity, rel=1e-6)
    if restored_with:
        assert result.stopped == "early"
        assert result.evaluations[-1].step == result.best_step + 2
    else:
        assert result.stopped == "finished"


def test_evaluations_are_those_of_the_steering_that_is_returned(engine: Engine, small: TrainingData) -> None:
    """The perplexity of the result is the one that the backend finds with the saved ops: same site, rows and sums."""
    made = train(engine, small, sites=(SITE, "layers.1.mlp_out"), learning_rate=0.3, epochs=2)
    scores = engine._backend.score([one.ids for one in _sequences(small.validation)], steering=made.steering)
    total = sum(sum(score.logprobs) for score in scores)
    targets = made.result.counts.validation_targets
    assert made.result.best_loss == pytest.approx(-total / targets, rel=1e-5)


def _sequences(items: Any) -> list[TokenSequence]:
    return list(items)


def test_positions_mean_what_they_mean_in_a_steering(engine: Engine, small: TrainingData) -> None:
    cut = [
        replace(one, targets=tuple(place >= 6 for place in range(len(one.ids)))) for one in _sequences(small.validation)
    ]
    data = replace(small, validation=tuple(cut))
    made = train(engine, data, sites=(SITE,), positions="response", learning_rate=0.5, epochs=2)
    assert str(made.steering.bound[0].positions) == "response"
    found = 0.0
    for one in cut:
        request = Request(prompt=one.ids[:6], forced_tokens=one.ids[6:], steering=made.steering)
        found += sum(engine._backend.generate([request])[0].logprobs)
    assert made.result.best_loss == pytest.approx(-found / made.result.counts.validation_targets, rel=1e-4)


def test_a_padded_and_a_packed_training_are_the_same(engine: Engine, small: TrainingData) -> None:
    settings: dict[str, Any] = {"sites": (SITE,), "epochs": 2, "learning_rate": 0.3}
    packed, padded = (train(engine, small, packing=packing, **settings) for packing in (True, False))
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-4)


def test_accumulated_batches_are_one_large_batch(engine: Engine, small: TrainingData) -> None:
    """A mean of means would weigh tokens of short micro-batches more."""
    settings: dict[str, Any] = {"sites": (SITE,), "epochs": 1, "learning_rate": 0.3, "max_steps": 1}
    large = train(engine, small, batch_size=12, **settings)
    parts = train(engine, small, batch_size=5, accumulate=3, **settings)
    assert losses(parts) == pytest.approx(losses(large), rel=1e-5)
    assert parts.result.steps[0].grad_norm == pytest.approx(large.result.steps[0].grad_norm, rel=1e-4)


@pytest.mark.parametrize("change", [{"cache_mib": 0}, {"checkpointing": True}])
def test_kept_states_and_checkpoints_change_no_bit(
    engine: Engine, small: TrainingData, config: TrainingConfig, change: dict[str, Any]
) -> None:
    one, two = train(engine, small, config), train(engine, small, replace(config, **change))
    assert losses(one) == losses(two)
    assert torch.equal(vector(one), vector(two))


def test_blocks_below_run_once_per_batch(engine: Engine, small: TrainingData, config: TrainingConfig) -> None:
    block, calls = engine.model.model.layers[2], []  # type: ignore[union-attr]
    remove = block.self_attn.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled())).remove  # type: ignore[union-attr]
    try:
        made = train(engine, small, replace(config, epochs=5))
    finally:
        remove()
    assert len(made.result.steps) == 10
    assert len(calls) == 2 + 1 + 2  # two training batches, one of validation, and two to see that packing works
    assert "forward" not in vars(block)


def test_states_that_more_than_one_block_needs_are_not_kept(
    engine: Engine, small: TrainingData, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose upper blocks read a lower one directly would get nothing from it."""
    low, high = engine.model.model.layers[0], engine.model.model.layers[5]  # type: ignore[union-attr]
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        low.mlp.register_forward_hook(lambda module, args, output: seen.update(low=output)),  # type: ignore[union-attr]
        high.register_forward_hook(lambda module, args, output: output + seen.pop("low", torch.zeros(()))),
    ]
    try:
        made = train(engine, small, config)
    finally:
        for hook in hooks:
            hook.remove()
    assert any("were not kept" in note for note in made.result.notes)


def test_everything_else_stays_frozen_and_is_put_back(
    engine: Engine, small: TrainingData, config: TrainingConfig
) -> None:
    before = {name: one.clone() for name, one in engine.model.named_parameters()}
    wanted = {name: one.requires_grad for name, one in engine.model.named_parameters()}
    engine.model.train()
    try:
        one = train(engine, small, config)
        assert engine.model.training
    finally:
        engine.model.eval()
    assert all(torch.equal(one, before[name]) for name, one in engine.model.named_parameters())
    assert wanted == {name: one.requires_grad for name, one in engine.model.named_parameters()}
    assert all(one.grad is None for one in engine.model.parameters())
    assert losses(one) == losses(train(engine, small, config))  # dropout would differ


def test_an_engine_forgets_the_sites_of_the_training_before(engine: Engine, small: TrainingData) -> None:
    """A model that is used again must not keep the layer, the vector or the hook of the last set."""
    settings: dict[str, Any] = {"epochs": 1, "learning_rate": 0.5}
    alone = train(Engine("testbed"), small, sites=("layers.1.resid_post",), **settings)
    train(engine, small, sites=(SITE,), **settings)
    after = train(engine, small, sites=("layers.1.resid_post",), **settings)
    assert torch.equal(vector(alone), vector(after))
    assert str(after.steering.bound[0].pattern) == "layers.1.resid_post"


@pytest.mark.parametrize(
    "site", ["embed", "layers.0.resid_pre", "layers.2.resid_mid", "layers.2.mlp_out", "final_norm"]
)
def test_every_point_of_the_stream_can_be_trained(engine: Engine, small: TrainingData, site: str) -> None:
    made = train(engine, small, sites=(site,), epochs=2, learning_rate=0.01)
    scores = engine._backend.score([one.ids for one in _sequences(small.validation)], steering=made.steering)
    total = sum(sum(score.logprobs) for score in scores)
    assert made.result.best_loss == pytest.approx(-total / made.result.counts.validation_targets, rel=1e-5)
    assert made.result.best_loss != made.result.unsteered_loss
    assert made.result.steps[0].grad_norm > 0


def test_several_sites_have_a_vector_each(engine: Engine, small: TrainingData, config: TrainingConfig) -> None:
    made = train(engine, small, replace(config, sites=("layers.{1,4}.resid_post",)))
    assert list(made.vectors) == ["layers.1.resid_post", "layers.4.resid_post"]
    assert all(one.norm > 0 for one in made.result.maps)


def test_a_low_rank_map_learns_and_is_an_op(engine: Engine, small: TrainingData, config: TrainingConfig) -> None:
    made = train(engine, small, replace(config, kind="low_rank", rank=2, learning_rate=0.05))
    (one,) = made.steering.bound
    assert isinstance(one.op, LowRank) and one.op.A.shape == (2, 128)
    assert made.result.improved and not made.vectors
    scores = engine._backend.score([one.ids for one in _sequences(small.validation)], steering=made.steering)
    total = sum(sum(score.logprobs) for score in scores)
    assert made.result.best_loss == pytest.approx(-total / made.result.counts.validation_targets, rel=1e-5)


@pytest.mark.parametrize("kind", [VectorMap, LowRankMap])
def test_a_limit_of_the_norm_acts(kind: type[Any]) -> None:
    """A limit that nothing can reach is no limit."""
    config = TrainingConfig(sites=(SITE,), init_scale=1.0, rank=2)
    part = kind(16, config, torch.Generator().manual_seed(0))
    norm = part.norm
    assert not part.limit(norm * 1.01) and part.norm == norm
    assert part.limit(norm / 2) and part.norm == pytest.approx(norm / 2)


def test_limits_act_and_are_counted(engine: Engine, small: TrainingData, config: TrainingConfig) -> None:
    free = train(engine, small, config).result
    tight = train(
        engine, small, replace(config, max_norm=free.maps[0].norm / 3, max_grad_norm=free.steps[0].grad_norm / 2)
    )
    assert not any(one.norm_limited or one.grad_limited for one in free.steps)
    assert any(one.norm_limited for one in tight.result.steps) and any(one.grad_limited for one in tight.result.steps)
    assert tight.result.maps[0].norm <= free.maps[0].norm / 3 * (1 + 1e-6)


def test_the_prompted_model_is_prompted(engine: Engine) -> None:
    """Perplexity of the unsteered model on the same tokens is no prompted baseline, whatever it is called."""
    prompt = testbed.contrast("animal", 1, seed=77).positive[0]
    config = TrainingConfig(sites=(SITE,), epochs=2, learning_rate=0.5, prompt=prompt)
    data = prepare(engine, "testbed:animal", config)
    found = train(engine, data, config).result.validation
    assert found is not None and found.prompted is not None
    assert found.prompted < found.unsteered - 0.1 and found.steered < found.unsteered
    logprobs = []
    for score, one in zip(engine._backend.score([one.ids for one in data.prompted]), data.prompted, strict=True):
        logprobs += [p for p, target in zip(score.logprobs, one.targets[1:], strict=True) if target]
    assert found.prompted == pytest.approx(float(torch.tensor(logprobs).mean().neg().exp()), rel=1e-4)


def test_preference_pairs_train_a_vector_with_two_ends(engine: Engine) -> None:
    made = train(engine, "testbed:animal", sites=(SITE,), loss="bipo", learning_rate=1.0, epochs=4, beta=0.1)
    result = made.result
    assert result.unsteered_loss == pytest.approx(0.6931, abs=1e-4)  # log 2: no preference
    assert result.best_loss is not None and result.best_loss < 0.62
    pairs = testbed.contrast("animal", 6, seed=9)
    margin = {}
    for sign in (1.0, -1.0):
        steering = Steering({SITE: Add(vector(made), scale=sign)})
        first, second = (
            sum(score.total for score in engine._backend.score(side, steering=steering))
            for side in (pairs.positive, pairs.negative)
        )
        margin[sign] = first - second
    assert margin[1.0] > margin[-1.0] + 1


def test_the_signs_of_preferences_are_drawn_per_pair(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    real = loop_module.bipo

    def watched(model: Any, batch: Any, reference: Any, signs: torch.Tensor, beta: float) -> Any:
        if torch.is_grad_enabled():
            drawn.append(signs.tolist())
        return real(model, batch, reference, signs, beta)

    monkeypatch.setattr(loop_module, "bipo", watched)
    train(engine, "testbed:animal", sites=(SITE,), loss="bipo", epochs=1, batch_size=16)
    assert {one for signs in drawn for one in signs} == {1.0, -1.0}
    assert any(len(set(signs)) == 2 for signs in drawn)


def test_a_pair_is_both_its_answers() -> None:
    one = TokenSequence(ids=(1, 2), targets=(False, True), question="q")
    assert Preference(chosen=one, rejected=one).question == "q"


def test_without_validation_the_last_stays_and_it_is_said(
    engine: Engine, small: TrainingData, config: TrainingConfig
) -> None:
    result = train(engine, replace(small, validation=()), config).result
    assert result.best_step == len(result.steps) and result.best_loss is None and result.improved is None
    assert any("no validation data" in note for note in result.notes)


def test_a_test_split_is_measured_once_at_the_end(engine: Engine, small: TrainingData, config: TrainingConfig) -> None:
    data = replace(small, validation=small.validation[:2], test=small.validation[2:])
    result = train(engine, data, config).result
    assert result.test is not None and result.test.steered < result.test.unsteered
    assert result.counts.test_sequences == 2


def test_a_loss_that_leaves_the_numbers(small: TrainingData, config: TrainingConfig) -> None:
    engine = Engine("testbed", dtype="float16")
    with pytest.raises(NonFiniteError, match=r"not finite at step \d+ at learning rate 1e\+30; lower"):
        train(engine, small, replace(config, learning_rate=1e30))


def test_what_is_saved_is_small_and_reads_back(
    engine: Engine, small: TrainingData, config: TrainingConfig, tmp_path: Path
) -> None:
    made = train(engine, small, config, out=tmp_path / "v")
    files = {one.name for one in (tmp_path / "v").iterdir()} - {".lock"}
    assert files == {"training.json", "steering.safetensors", f"{SITE}.safetensors"}
    assert sum((tmp_path / "v" / name).stat().st_size for name in files) < 40_000
    again = load_trained(tmp_path / "v", model=engine)
    assert again.result == made.result == from_json(Training, to_json(made.result))
    assert again.steering == made.steering
    one = SteeringVector.load(tmp_path / "v" / f"{SITE}.safetensors")
    assert torch.allclose(one.vector, vector(made)) and str(one.site) == SITE
    assert one.model_digest == engine.info.weights_digest and one.recipe["method"] == "trained:lm"


def test_another_model_is_refused(engine: Engine, small: TrainingData, config: TrainingConfig, tmp_path: Path) -> None:
    made = train(engine, small, config)
    for field, value, message in (
        ("hidden_size", 64, "width 64; this model has width 128"),
        ("model_digest", "xxh3:full:00", "with the weights xxh3:full:00; this model has"),
    ):
        Trained(result=replace(made.result, **{field: value}), steering=made.steering).save(tmp_path / field)  # type: ignore[arg-type]
        with pytest.raises(VectorError, match=message):
            load_trained(tmp_path / field, model=engine)
    other = Steering({SITE: Add(torch.ones(128))})
    Trained(result=made.result, steering=other).save(tmp_path / "mixed")
    with pytest.raises(VectorError, match="is not the steering that training"):
        load_trained(tmp_path / "mixed")
    with pytest.raises(InputError, match="holds no finished training"):
        load_trained(tmp_path)


class _Stop:
    """Interrupts a training after some steps, as Ctrl-C would: in the middle of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.taken: list[int] = []
        self.left: int | None = after
        real = loop_module.Loop._step

        def step(one: loop_module.Loop, done: int) -> Any:
            found = real(one, done)  # the parameters have moved when the interruption comes
            if self.left is not None:
                if self.left == 0:
                    self.left = None
                    raise KeyboardInterrupt
                self.left -= 1
            self.taken.append(done)
            return found

        monkeypatch.setattr(loop_module.Loop, "_step", step)


@pytest.mark.parametrize("loss", ["lm", "bipo"])
def test_an_interrupted_training_goes_on_with_the_very_next_step(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Any
) -> None:
    config = TrainingConfig(sites=(SITE,), epochs=3, evaluate_every=2, learning_rate=0.5, loss=loss, batch_size=16)
    whole = train(engine, "testbed:animal", config)
    stop = _Stop(monkeypatch, after=5)
    with pytest.raises(UnfinishedError, match=r"interrupted after 5 of \d+ steps; .*state.safetensors holds the state"):
        train(engine, "testbed:animal", config, out=tmp_path)
    made = train(engine, "testbed:animal", config, out=tmp_path)
    assert stop.taken == list(range(len(whole.result.steps)))
    assert torch.equal(vector(made), vector(whole))
    assert made.result.steps == whole.result.steps and made.result.evaluations == whole.result.evaluations
    assert (made.result.resumed, whole.result.resumed) == (1, 0)
    assert not (tmp_path / "state.safetensors").exists()


def test_a_finished_training_is_read_and_another_is_refused(
    engine: Engine, small: TrainingData, config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = train(engine, small, config, out=tmp_path)
    stop = _Stop(monkeypatch, after=0)
    assert train(engine, small, config, out=tmp_path).result == made.result
    assert not stop.taken and stop.left == 0
    with pytest.raises(InputError, match="holds another training"):
        train(engine, small, replace(config, learning_rate=0.2), out=tmp_path)


def test_the_state_of_another_training_is_refused(
    engine: Engine, small: TrainingData, config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Stop(monkeypatch, after=1)
    with pytest.raises(UnfinishedError):
        train(engine, small, config, out=tmp_path)
    with pytest.raises(InputError, match="is the checkpoint of another training"):
        train(engine, small, replace(config, seed=1), out=tmp_path)


def test_a_sweep_shares_model_data_and_states(engine: Engine, small: TrainingData, tmp_path: Path) -> None:
    sweep = sweep_lr(engine, small, (0.1, 0.3), sites=(SITE,), epochs=2, out=tmp_path)
    alone = train(engine, small, sites=(SITE,), epochs=2, learning_rate=0.3)
    assert sweep.rows[1].loss == alone.result.best_loss
    assert (tmp_path / "rates.json").is_file() and (tmp_path / "lr_0.3" / "training.json").is_file()
    for rates in ((), (0.1, 0.1), (0.0,), (float("nan"),)):
        with pytest.raises(InputError, match="learning rates"):
            sweep_lr(engine, small, rates, sites=(SITE,))
    with pytest.raises(InputError, match="no validation data, by which a rate"):
        sweep_lr(engine, replace(small, validation=()), (0.1,), sites=(SITE,))


def test_a_site_that_the_model_has_not(engine: Engine, small: TrainingData) -> None:
    with pytest.raises(SiteError, match="layers 0 to 5"):
        train(engine, small, sites=("layers.9.resid_post",))


def test_a_trained_vector_steers_more_than_random_ones(engine: Engine) -> None:
    """The share of animals among the nouns that the model writes, counted exactly."""
    made = train(engine, "testbed:animal", sites=(SITE,), learning_rate=1.0, epochs=4)
    norm = float(vector(made).norm())
    generator = torch.Generator().manual_seed(5)
    randoms = [torch.nn.functional.normalize(torch.randn(128, generator=generator), dim=0) * norm for _ in range(4)]
    prompts = testbed.prompts(6, seed=3)

    def share(steering: Steering | None) -> float:
        wanted = [Request(prompt=text, max_new_tokens=32, steering=steering, ignore_eos=True) for text in prompts]
        texts = [one.text for one in engine._backend.generate(wanted)]
        return sum(testbed.score(text).share("animal") for text in texts) / len(texts)

    steered, plain = share(made.steering), share(None)
    others = [share(Steering({SITE: Add(one)})) for one in randoms]
    assert steered > max(others) + 0.2
    assert steered > plain + 0.2
