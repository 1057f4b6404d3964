"""The models of tests/data/models, loaded once."""

import functools
from pathlib import Path

import numpy as np
import pytest

MODELS = Path(__file__).parents[1] / "data" / "models"


@pytest.fixture(scope="session")
def golden():
    """Returns a function from a model's name to its config, its params and its golden arrays."""
    from experiments.generate import weights  # (after XLA_FLAGS)

    @functools.cache
    def load(name):
        with np.load(MODELS / name / "golden.npz") as file:
            return *weights.load(MODELS / name), dict(file)

    return load


@pytest.fixture
def models():
    """The folder of the models."""
    return MODELS
