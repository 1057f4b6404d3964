"""Gradients of the layer in both forms, through the cache, against the naive layer and float64."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from small_layer import SMALL, new_cache, random_layer, relative_error

from mla_jax.cache import PagedKVCache
from mla_jax.layer import mla_layer
from mla_jax.prefill import form as layer_form
from mla_jax.reference.layer import layer_float64
from mla_jax.reference.naive import naive_mla_layer
from mla_jax.sharding.specs import param_specs

STEPS = np.array([(5, 0), (7, 7), (7, 3), (7, 7), (3, 1)], np.int32)  # tokens of 2 requests
LENGTH, ROOM = 29, 7  # tokens of the longer request, and of a step
LENS = STEPS.sum(0)


def loss_of_steps(params, x, weights, **options):
    """Feeds all tokens in steps, with padding; the weighted sum of the outputs of real tokens."""
    cache, tables = new_cache(SMALL, 2, LENGTH)
    cache = jax.tree.map(lambda pages: jnp.full_like(pages, jnp.nan), cache)

    def step(state, counts):
        lens, cache = state
        token = np.arange(ROOM, dtype=np.int32)
        places = np.arange(2)[:, None], jnp.minimum(lens[:, None] + token, LENGTH - 1)
        lens, new = lens + counts, x[places]
        out, cache = mla_layer(
            params, SMALL, new, cache, tables, lens, query_lens=counts, **options
        )
        real = (token < counts[:, None])[..., None]
        return (lens, cache), jnp.sum(jnp.where(real, out * weights[places], 0))

    return jax.lax.scan(step, (np.zeros(2, np.int32), cache), STEPS)[1].sum()


@functools.cache
def case():
    params, x = random_layer(SMALL, length=LENGTH)
    weights = np.random.default_rng(3).standard_normal(x.shape)
    weights[1, LENS[1] :] = 0
    return params, x, weights.astype(np.float32)


@functools.cache
def naive_gradients():
    loss = lambda params, x, weights: jnp.sum(naive_mla_layer(params, SMALL, x) * weights)  # noqa: E731
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(*case())


def slope_float64(d_params, d_x):
    """Returns the derivative of the loss along a direction, by differences of float64."""
    params, x, weights = case()

    def loss(step):
        moved = [
            jax.tree.map(lambda at, d: np.asarray(at, np.float64) + step * d, *pair)
            for pair in ((params, d_params), (x, d_x))
        ]
        return (layer_float64(SMALL, *moved) * weights).sum()

    return (loss(1e-5) - loss(-1e-5)) / 2e-5


def direction():
    """Returns a direction of params and x."""
    rng = np.random.default_rng(4)
    return jax.tree.map(lambda at: rng.standard_normal(at.shape).astype(np.float32), case()[:2])


def slope_forward(**options):
    """Returns the jitted derivative of the loss along a direction, in forward mode."""
    run = functools.partial(loss_of_steps, weights=jnp.asarray(case()[2]), **options)
    return jax.jit(lambda d: jax.jvp(run, case()[:2], d)[1])


def test_gradients_of_params_and_x(monkeypatch):
    """Requests of up to 2 tokens take the absorbed form, the others the expanded form.

    The last token of each prefix joins the new ones. Earlier ones are in parts of 16, which begin
    and end inside of requests.
    """
    monkeypatch.setattr(layer_form, "_cheaper", lambda count, *_: layer_form.FORMS[count > 2])
    options = {"workspace_tokens": 2 * (ROOM + 1)}
    loss = functools.partial(loss_of_steps, **options)
    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(*case())
    compared = jax.tree.map(relative_error, found, naive_gradients())
    assert max(jax.tree.leaves(compared)) < 1e-5, compared
    along = direction()
    products = jax.tree.map(lambda g, d: np.vdot(np.asarray(g, np.float64), d), found, along)
    assert sum(jax.tree.leaves(products)) == pytest.approx(slope_float64(*along), rel=1e-4)
    assert slope_forward(**options).eval_shape(along).dtype == jnp.float32


def test_the_slope_of_the_absorbed_form():
    """In forward mode; the test above has its gradients, and so has test_key_shards."""
    along = direction()
    slope = slope_forward(form="absorbed")(along)
    assert slope == pytest.approx(slope_float64(*along), rel=1e-4)


def test_memory_of_the_expanded_form_is_linear_in_length():
    """The largest array has the keys of all tokens and heads, or a block of scores."""
    tokens, widths = 2**14, {"kv_lora_rank": 18, "rope_dim": 4}
    params, _ = random_layer(SMALL)
    cache = PagedKVCache.create(tokens // 64, dtype=jnp.float32, **widths)
    x = jax.ShapeDtypeStruct((1, tokens // 2, SMALL.hidden_size), jnp.float32)
    tables, lens = np.arange(tokens // 64, dtype=np.int32)[None], jnp.full(1, tokens, jnp.int32)

    def loss(params, x):
        return mla_layer(params, SMALL, x, cache, tables, lens, form="expanded")[0].sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).as_text()
    shapes = re.findall(r"tensor<([\dx]+)x[a-z]", text)
    largest = max(math.prod(map(int, shape.split("x"))) for shape in shapes)
    assert largest == max(tokens * 22, tokens // 2 * 3 * (6 + 4))


def test_expanded_form_over_shards_of_the_heads():
    """The gradients of what is equal on all devices are equal on them: the types say so."""
    mesh = jax.make_mesh((3,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    cache, tables = new_cache(SMALL, 2, 2 * LENGTH)
    lens, specs = jnp.full(2, 2 * LENGTH, jnp.int32), (param_specs(SMALL, "tp"), PartitionSpec())

    def gradient(params, x):
        options = {"form": "expanded", "head_axis": "tp"}
        run = functools.partial(mla_layer, config=SMALL, cache=cache, block_tables=tables)
        return jax.grad(
            lambda params, x: run(params, x=x, seq_lens=lens, **options)[0].sum(), argnums=(0, 1)
        )(params, x)

    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=specs)
    found = jax.eval_shape(sharded, *case()[:2])
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, case()[:2])
