"""One engine on the embedded model, and small training data of it."""

from __future__ import annotations

import pytest

from trimtab.vectors.train import Engine, TrainingConfig, TrainingData, prepare

SITE = "layers.3.resid_post"


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine("testbed")


@pytest.fixture(scope="session")
def half() -> Engine:
    return Engine("testbed", dtype="bfloat16")


@pytest.fixture
def config() -> TrainingConfig:
    return TrainingConfig(sites=(SITE,), epochs=2, learning_rate=0.3)


@pytest.fixture(scope="session")
def small(engine: Engine) -> TrainingData:
    """Twelve sequences for training and four for validation."""
    found = prepare(engine, "testbed:animal", TrainingConfig(sites=(SITE,)))
    return TrainingData(name="small", train=found.train[:12], validation=found.validation[:4])
