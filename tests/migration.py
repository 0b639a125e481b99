"""Calls of other libraries written with cugn: for the migration page, and held against the originals by the tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

import cugn

Array = Any


# [torch]
def torch_group_norm(
    input: Array, num_groups: int, weight: Array = None, bias: Array = None, eps: float = 1e-5
) -> Array:
    """torch.nn.functional.group_norm: the same arguments."""
    return cugn.group_norm(input, num_groups, weight, bias, eps=eps)


def torch_layer_norm_last_axis(input: Array, weight: Array = None, bias: Array = None, eps: float = 1e-5) -> Array:
    """torch.nn.functional.layer_norm over the last axis: every other axis is a batch axis."""
    batch_axes = tuple(range(input.ndim - 1))
    return cugn.layer_norm(input, weight, bias, eps=eps, channel_axis=-1, batch_axis=batch_axes)


def torch_layer_norm(
    input: Array, normalized_shape: Sequence[int], weight: Array = None, bias: Array = None, eps: float = 1e-5
) -> Array:
    """torch.nn.functional.layer_norm over several axes: the weight has a value an element, so each is a channel."""
    channels = math.prod(normalized_shape)
    samples = math.prod(input.shape[: input.ndim - len(normalized_shape)])
    weight, bias = (None if v is None else v.reshape(channels) for v in (weight, bias))
    return cugn.layer_norm(input.reshape(samples, channels), weight, bias, eps=eps).reshape(input.shape)


def torch_instance_norm(input: Array, weight: Array = None, bias: Array = None, eps: float = 1e-5) -> Array:
    """torch.nn.functional.instance_norm with the statistics of the input."""
    return cugn.instance_norm(input, weight, bias, eps=eps)


def torch_batch_norm_training(
    input: Array,
    running_mean: Array,
    running_var: Array,
    weight: Array = None,
    bias: Array = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Array, Array, Array]:
    """torch.nn.functional.batch_norm with training=True: y, and the running statistics that torch updates in place."""
    channels = input.shape[1]
    m = cugn.moments(input, channels, batch_axis=None)
    y = cugn.normalize(input, m.mean, m.rstd(eps), channels, weight, bias)
    unbiased = m.m2 / (m.count - 1)  # running variances divide by n - 1, the normalization by n
    return y, (1 - momentum) * running_mean + momentum * m.mean, (1 - momentum) * running_var + momentum * unbiased


def torch_batch_norm_inference(
    input: Array,
    running_mean: Array,
    running_var: Array,
    weight: Array = None,
    bias: Array = None,
    eps: float = 1e-5,
) -> Array:
    """torch.nn.functional.batch_norm with training=False: statistics from elsewhere."""
    return cugn.normalize(input, running_mean, 1 / np.sqrt(running_var + eps), input.shape[1], weight, bias)


# [flax]
def flax_group_norm(
    x: Array, num_groups: int = 32, scale: Array = None, bias: Array = None, epsilon: float = 1e-6
) -> Array:
    """flax.linen.GroupNorm: channels last, epsilon 1e-6."""
    return cugn.group_norm(x, num_groups, scale, bias, eps=epsilon, channel_axis=-1)


def flax_layer_norm(x: Array, scale: Array = None, bias: Array = None, epsilon: float = 1e-6) -> Array:
    """flax.linen.LayerNorm: over the last axis alone, epsilon 1e-6."""
    return cugn.layer_norm(x, scale, bias, eps=epsilon, channel_axis=-1, batch_axis=tuple(range(x.ndim - 1)))


def flax_instance_norm(x: Array, scale: Array = None, bias: Array = None, epsilon: float = 1e-6) -> Array:
    """flax.linen.InstanceNorm: channels last, epsilon 1e-6."""
    return cugn.instance_norm(x, scale, bias, eps=epsilon, channel_axis=-1)


def jax_standardize(x: Array, axis: int = -1, epsilon: float = 1e-5) -> Array:
    """jax.nn.standardize over one axis."""
    rest = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    return cugn.layer_norm(x, eps=epsilon, channel_axis=axis, batch_axis=rest)


# [keras]
def keras_group_normalization(
    x: Array, groups: int = 32, gamma: Array = None, beta: Array = None, axis: int = -1, epsilon: float = 1e-3
) -> Array:
    """keras.layers.GroupNormalization: channels last, epsilon 1e-3; groups=-1 is instance norm."""
    return cugn.group_norm(x, x.shape[axis] if groups == -1 else groups, gamma, beta, eps=epsilon, channel_axis=axis)


def keras_layer_normalization(x: Array, gamma: Array = None, beta: Array = None, epsilon: float = 1e-3) -> Array:
    """keras.layers.LayerNormalization: over the last axis, epsilon 1e-3."""
    return cugn.layer_norm(x, gamma, beta, eps=epsilon, channel_axis=-1, batch_axis=tuple(range(x.ndim - 1)))


# [chainer]
def chainer_group_normalization(x: Array, groups: int, gamma: Array, beta: Array, eps: float = 1e-5) -> Array:
    """chainer.functions.group_normalization: the same arguments; chainer's double backward is here too."""
    return cugn.group_norm(x, groups, gamma, beta, eps=eps)


# [onnx]
def onnx_group_normalization(
    X: Array, scale: Array, bias: Array, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Array:
    """GroupNormalization (opset 21: scale and bias of each channel; before, of each group: repeat them)."""
    return cugn.group_norm(X, num_groups, scale, bias, eps=epsilon)


def onnx_instance_normalization(input: Array, scale: Array, B: Array, *, epsilon: float = 1e-5) -> Array:
    """InstanceNormalization."""
    return cugn.instance_norm(input, scale, B, eps=epsilon)


def onnx_layer_normalization(
    X: Array, Scale: Array, B: Array = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Array, Array, Array]:
    """LayerNormalization: Y, Mean, InvStdDev, the statistics with the normalized axes kept as ones."""
    axis %= X.ndim
    batch, rest = X.shape[:axis], X.shape[axis:]
    scale, bias = (None if v is None else np.broadcast_to(v, rest).reshape(-1) for v in (Scale, B))
    y, mean, rstd = cugn.layer_norm_forward(X.reshape(math.prod(batch), math.prod(rest)), scale, bias, eps=epsilon)
    kept = (*batch, *[1] * len(rest))
    return y.reshape(X.shape), mean.reshape(kept), rstd.reshape(kept)


def onnx_batch_normalization(
    X: Array,
    scale: Array,
    B: Array,
    input_mean: Array,
    input_var: Array,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> tuple[Array, ...]:
    """BatchNormalization: ONNX's momentum is the share of the old statistics, and its running variance divides by n."""
    channels = X.shape[1]
    if not training_mode:
        return (cugn.normalize(X, input_mean, 1 / np.sqrt(input_var + epsilon), channels, scale, B),)
    m = cugn.moments(X, channels, batch_axis=None)
    running = (momentum * old + (1 - momentum) * new for old, new in ((input_mean, m.mean), (input_var, m.var)))
    return cugn.normalize(X, m.mean, m.rstd(epsilon), channels, scale, B), *running


def onnx_mean_variance_normalization(X: Array, *, axes: Sequence[int] = (0, 2, 3)) -> Array:
    """MeanVarianceNormalization: 1e-9 is added to the standard deviation, not to the variance."""
    (channel_axis,) = set(range(X.ndim)) - {axis % X.ndim for axis in axes}
    groups = X.shape[channel_axis]
    m = cugn.moments(X, groups, channel_axis=channel_axis, batch_axis=None)
    return cugn.normalize(X, m.mean, 1 / (np.sqrt(m.var) + 1e-9), groups, channel_axis=channel_axis, batch_axis=None)


# [apex]
def apex_group_norm(x: Array, num_groups: int, weight: Array, bias: Array, eps: float = 1e-5, act: str = "") -> Array:
    """apex.contrib.group_norm.GroupNorm: channels last in memory, the activation fused; here for any C and G."""
    return cugn.group_norm(x, num_groups, weight, bias, eps=eps, activation=act or None)


# [scipy]
def scipy_zscore(a: Array, axis: int = 0) -> Array:
    """scipy.stats.zscore: eps of 0; a constant gives NaN in both."""
    rest = tuple(i for i in range(a.ndim) if i != axis % a.ndim)
    return cugn.layer_norm(a, eps=0, channel_axis=axis, batch_axis=rest)


# [scikit-learn]
def sklearn_scale(X: Array) -> Array:
    """sklearn.preprocessing.scale of a table (samples, features): batch norm; a constant column is NaN here."""
    return cugn.batch_norm(X, eps=0)


# [end]
