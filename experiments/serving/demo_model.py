"""A small whole model generates tokens in the demo, and every token is compared with float64.

It has four layers, all with experts, in the form of DeepSeek-V3, and random weights. It is served
by the engine of the experiment `generate`: requests enter and leave between steps, prompts are
prefilled in chunks, some begin with the same pages, and drafts are checked.
"""

import dataclasses
import time

import jax
import numpy as np

from experiments.framework.experiment import Row
from experiments.framework.results import first_line
from experiments.generate import weights
from experiments.generate.engine import Engine, Sizes
from experiments.generate.float64 import in_float64, logits_float64
from experiments.generate.model import ModelConfig, ModelParams, Routing
from experiments.generate.requests import Request
from mla_jax import MLAConfig

# How far below the largest logit that of a token may be, in standard deviations of the logits. Both
# are those of float64. A token at random is about 3 below. In bfloat16 two experts of nearly
# the same score may change places, which changes logits more than rounding does. The experts' scale
# of 0.25 keeps that small: with bfloat16 on a CPU the largest of 8 seeds is 0.17.
BOUND = {"float32": 1e-3, "bfloat16": 0.5}
# A decode step has 16 rows, and a prefill step 32: Triton in XLA refuses some odd numbers of rows.
SIZES = Sizes(slots=4, drafts=3, prefill_rows=2, chunk=16, max_tokens=64, num_pages=12)
REQUESTS, SHARED, PROMPT, NEW = 5, 32, 36, 16


def model_config(attention: MLAConfig) -> ModelConfig:
    """Returns the shape of the model; the widths of the cache are those of the attention."""
    narrow = dataclasses.replace(
        attention, hidden_size=256, num_heads=4, q_lora_rank=128, num_hidden_layers=4
    )
    return ModelConfig(
        attention=narrow,
        vocab_size=128,  # few, so that tokens repeat and there are drafts
        num_layers=4,
        num_dense_layers=0,  # layers of one kind, so that each step traces one
        dense_width=1,
        expert_width=128,
        shared_width=128,
        routing=Routing("sigmoid", 8, 2, 4, 2, normalize=True, scale=0.25),
        norm_eps=1e-6,
    )


def random_params(config: ModelConfig, dtype: str, seed: int) -> ModelParams:
    """Returns random weights, made by NumPy: JAX would compile for longer than the model runs."""
    rng = np.random.default_rng(seed)
    shapes = weights.shapes_of(config, dtype)

    def values(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return np.ones(shape.shape, shape.dtype)
        drawn = rng.standard_normal(shape.shape, np.float32)
        if name.endswith(("embedding", "bias")):
            return (drawn * (1.0 if name.endswith("embedding") else 0.1)).astype(shape.dtype)
        # The inner width of a product is the last axis but one, of W_UQ the first.
        inner = shape.shape[0] if name.endswith("w_uq") else shape.shape[-2]
        if name.endswith(("head", "w_uk")):
            inner = shape.shape[-1]
        if name.endswith("w_o"):
            inner = shape.shape[0] * shape.shape[1]
        return (drawn * inner**-0.5).astype(shape.dtype)

    return jax.device_put(jax.tree_util.tree_map_with_path(values, shapes))


def drawn_requests(config: ModelConfig, seed: int) -> list[Request]:
    """Returns requests with prompts of different lengths, of which all begin alike."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, config.vocab_size, SHARED).tolist()
    return [
        Request(i, shared + rng.integers(0, config.vocab_size, PROMPT - SHARED + i).tolist(), NEW)
        for i in range(REQUESTS)
    ]


def run(attention: MLAConfig, dtype: str, seed: int) -> Row:
    """Generates, and compares with float64; a failure is a row that has not passed."""
    dtype = dtype if dtype == "float32" else "bfloat16"
    try:
        return _run(model_config(attention), dtype, seed)
    except Exception as error:  # as that of a compiler, which must not take the demo with it
        return {"model": "four layers", "dtype": dtype, "status": f"failed: {first_line(error)}",
                "passed": False}  # fmt: skip


def _run(config: ModelConfig, dtype: str, seed: int) -> Row:
    start = time.perf_counter()
    params = random_params(config, dtype, seed)
    requests = drawn_requests(config, seed)
    engine = Engine(params, config, SIZES)
    found = engine.run(requests)
    seconds = time.perf_counter() - start
    exact = in_float64(params)
    worst = max(furthest_below(exact, config, r, found[r.id]) for r in requests)
    return {
        "model": "four layers", "dtype": dtype, "status": "measured",
        "requests": len(requests), "new_tokens": sum(map(len, found.values())),
        "seconds_with_compilation": seconds, "counts": dict(sorted(engine.counts.items())),
        "furthest_below_best": worst, "bound": BOUND[dtype], "passed": bool(worst <= BOUND[dtype]),
    }  # fmt: skip


def furthest_below(
    params: ModelParams, config: ModelConfig, request: Request, new: list[int]
) -> float:
    """Returns how far the logit of a token is below the largest, at most, as BOUND says."""
    tokens = np.array([*request.prompt, *new])
    logits = logits_float64(params, config, tokens[:-1])[len(request.prompt) - 1 :]
    below = logits.max(-1) - logits[np.arange(len(new)), new]
    return float((below / logits.std(-1)).max())


def in_words(row: Row) -> str:
    """Returns a sentence about the row."""
    if row["status"] != "measured":
        return f"The model of four layers {row['status']}."
    counts = row["counts"]
    return (
        f"A model of four layers generates {row['new_tokens']} tokens for {row['requests']} "
        f"requests in {counts['prefill steps']} prefill and {counts['decode steps']} decode steps, "
        f"{counts.get('tokens from the prefix cache', 0)} prompt tokens shared, "
        f"{counts.get('drafts kept', 0)} of {counts.get('drafts', 0)} drafts kept; each is in "
        f"float64 at most {row['furthest_below_best']:.1e} below the likeliest "
        f"(bound {row['bound']:g})."
    )
