"""The whole model in float64 numpy, one request at a time, with loops over tokens and experts.

It shares the shapes of weights with `model.py`, and no computation. The attention layer is that of
`mla_jax.reference`, which expands keys and values and has no cache.
"""

from typing import Any

import jax
import numpy as np

from experiments.generate.model import (
    Experts,
    FeedForward,
    ModelConfig,
    Routing,
)
from mla_jax.reference.layer import layer_float64


def logits_float64(params: Any, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Returns the logits after each token of a request: [T] integers -> [T, vocab] float64.

    params: a `ModelParams` from `in_float64`.
    """
    x = params.embedding[tokens]
    for layer in params.layers:
        x = _layer(layer, config, x)
    head = params.embedding if params.head is None else params.head
    return _norm(x, params.norm, config) @ head.T


def in_float64(tree: Any) -> Any:
    """Returns the arrays of a pytree as float64 of NumPy, which this module computes with."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def _layer(p: Any, config: ModelConfig, x: np.ndarray) -> np.ndarray:
    normed = _norm(x, p.attention_norm, config)
    x = x + layer_float64(config.attention, p.attention, normed[None])[0]
    normed = _norm(x, p.feed_forward_norm, config)
    if isinstance(p.feed_forward, Experts):
        return x + mixture_float64(p.feed_forward, config.routing, normed)
    return x + _network(p.feed_forward, normed)


def mixture_float64(p: Any, r: Routing, x: np.ndarray) -> np.ndarray:
    """Computes a mixture of experts of one layer on tokens: [T, hidden] -> [T, hidden]."""
    out = np.zeros_like(x)
    for row, token in zip(out, x, strict=True):
        scores = token @ p.router
        if r.scoring == "softmax":
            scores = np.exp(scores - scores.max())
            scores /= scores.sum()
        else:
            scores = 1 / (1 + np.exp(-scores))
        choice = scores if p.bias is None else scores + p.bias
        grouped = np.sort(choice.reshape(r.num_groups, -1))[:, ::-1]
        worth = grouped[:, : 1 if r.scoring == "softmax" else 2].sum(1)
        best = np.argsort(-worth, kind="stable")[: r.groups_per_token]
        of_group = np.arange(len(scores)) // grouped.shape[1]
        choice = np.where(np.isin(of_group, best), choice, -np.inf)
        chosen = np.argsort(-choice, kind="stable")[: r.experts_per_token]
        total = scores[chosen].sum() if r.normalize else 1.0
        for e in chosen:
            expert = FeedForward(p.routed.gate_up[e], p.routed.down[e])
            row += r.scale * scores[e] / total * _network(expert, token)
    return out if p.shared is None else out + _network(p.shared, x)


def _network(p: Any, x: np.ndarray) -> np.ndarray:
    gate, up = np.split(x @ p.gate_up, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up @ p.down


def _norm(x: np.ndarray, weight: Any, config: ModelConfig) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weight
