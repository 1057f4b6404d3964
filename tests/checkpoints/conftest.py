"""The checkpoint that tests of weights read and break."""

import pytest
from random_layer import random_params
from small_checkpoint import CONFIG

from mla_jax.checkpoints.weights import save_hf


@pytest.fixture
def checkpoint(tmp_path):
    save_hf(tmp_path, CONFIG, random_params(CONFIG))
    return tmp_path
