"""Layer, instance and batch norm: group norm with one group, with a group a channel, and over the whole batch."""

from __future__ import annotations

from typing import Any

from .functional import group_norm, group_norm_backward, group_norm_forward
from .plan import Each
from .results import GroupNormForward, GroupNormGrads

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
]

Array = Any


def layer_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    where: Array | None = None,
    activation: str | None = None,
    out: Array | None = None,
) -> Array:
    """Normalize each sample over all its channels and positions: `group_norm` with one group.

    Parameters
    ----------
    x : array
        As in `group_norm`.
    weight, bias : array of shape (C,), optional
        Scale and shift of each channel.
    eps, channel_axis, where, activation, out
        As in `group_norm`.
    batch_axis : int, tuple of int or None, optional
        As in `group_norm`.

    Returns
    -------
    array
        y, of x's shape and dtype: ``group_norm(x, 1, ...)``, bit for bit [1]_.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Notes
    -----
    With ``batch_axis=(0, 1), channel_axis=2`` each position of a (N, L, C) sequence is normalized by itself, as
    transformers do.

    References
    ----------
    .. [1] Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> x = np.arange(12.0).reshape(1, 4, 3)
    >>> float(cugn.layer_norm(x).mean().round(6) + 0)
    0.0
    """
    return group_norm(
        x,
        1,
        weight,
        bias,
        eps=eps,
        channel_axis=channel_axis,
        batch_axis=batch_axis,
        where=where,
        activation=activation,
        out=out,
    )


def layer_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    where: Array | None = None,
    activation: str | None = None,
    out: Array | None = None,
) -> GroupNormForward:
    """Normalize as `layer_norm` does, and return the statistics for the backward as well.

    Parameters
    ----------
    x : array
        As in `group_norm`.
    weight, bias : array of shape (C,), optional
        Scale and shift of each channel.
    eps, channel_axis, where, activation, out
        As in `group_norm`.
    batch_axis : int, tuple of int or None, optional
        As in `group_norm`.

    Returns
    -------
    GroupNormForward
        ``(y, mean, rstd)``; the statistics in float64, of the batch shape followed by 1.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> y, mean, rstd = cugn.layer_norm_forward(np.ones((2, 3, 5)))
    >>> mean.shape
    (2, 1)
    """
    return group_norm_forward(
        x,
        1,
        weight,
        bias,
        eps=eps,
        channel_axis=channel_axis,
        batch_axis=batch_axis,
        where=where,
        activation=activation,
        out=out,
    )


def layer_norm_backward(
    dy: Array,
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    mean: Array | None = None,
    rstd: Array | None = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    where: Array | None = None,
    activation: str | None = None,
    out: Array | None = None,
) -> GroupNormGrads:
    """Gradients of a scalar loss through `layer_norm`.

    Parameters
    ----------
    dy : array
        Gradient of the loss with respect to y; y's shape and dtype.
    x : array
        As it went into the forward.
    weight, bias : array of shape (C,), optional
        As they went into the forward; the bias has an effect only under an activation.
    mean, rstd : array, optional
        The forward's statistics, of the batch shape followed by 1; both or neither.
    eps, channel_axis, where, activation
        As in the forward.
    batch_axis : int, tuple of int or None, optional
        As in `group_norm`.
    out : array, optional
        Receives dx; it may be dy or x itself.

    Returns
    -------
    GroupNormGrads
        ``(dx, dweight, dbias)``, as `group_norm_backward` gives them.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> dy, x = np.random.default_rng(0).normal(size=(2, 4, 3, 10))
    >>> cugn.layer_norm_backward(dy, x).dweight.shape
    (3,)
    """
    return group_norm_backward(
        dy,
        x,
        1,
        weight,
        bias,
        mean=mean,
        rstd=rstd,
        eps=eps,
        channel_axis=channel_axis,
        batch_axis=batch_axis,
        where=where,
        activation=activation,
        out=out,
    )


def instance_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    where: Array | None = None,
    activation: str | None = None,
    out: Array | None = None,
) -> Array:
    """Normalize each channel of each sample by itself: `group_norm` with a group a channel.

    Parameters
    ----------
    x : array
        As in `group_norm`.
    weight, bias : array of shape (C,), optional
        Scale and shift of each channel.
    eps, channel_axis, where, activation, out
        As in `group_norm`.
    batch_axis : int, tuple of int or None, optional
        As in `group_norm`.

    Returns
    -------
    array
        y, of x's shape and dtype: ``group_norm(x, C, ...)``, bit for bit [1]_.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Notes
    -----
    The contrast of each image is divided out.

    References
    ----------
    .. [1] Ulyanov, Vedaldi, Lempitsky, "Instance Normalization", arXiv:1607.08022.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> x = np.random.default_rng(0).normal(size=(2, 3, 50))
    >>> bool(np.allclose(cugn.instance_norm(7 * x, eps=0), cugn.instance_norm(x, eps=0)))
    True
    """
    return group_norm(
        x,
        Each.CHANNEL,
        weight,
        bias,
        eps=eps,
        channel_axis=channel_axis,
        batch_axis=batch_axis,
        where=where,
        activation=activation,
        out=out,
    )


def instance_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    where: Array | None = None,
    activation: str | None = None,
    out: Array | None = None,
) -> GroupNormForward:
    """Normalize as `instance_norm` does, and return the statistics for the backward as well.

    Parameters
    ----------
    x : array
        As in `group_norm`.
    weight, bias : array of shape (C,), optional
        Scale and shift of each channel.
    eps, channel_axis, where, activation, out
        As in `group_norm`.
    batch_axis : int, tuple of int or None, optional
        As in `group_norm`.

    Returns
    -------
    GroupNormForward
        ``(y, mean, rstd)``; the statistics in float64, of the batch shape followed by C.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> y, mean, rstd = cugn.instance_norm_forward(np.ones((2, 3, 5)))
    >>> mean.shape
    (2, 3)
    """
    return group_norm_forward(
        x,
        Each.CHANNEL,
        weight,
        bias,
        eps=eps,
        channel_axis=channel_axis,
        batch_axis=batch_axis,
        where=where,
        activation=activation,
        out=out,
    )


def instance_norm_backward(
    dy: Array,
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    mean: Array | None = None,
    rstd: Array | None = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    where: Array | None = None,
    activation: str | None = None,
    out: Array | None = None,
) -> GroupNormGrads:
    """Gradients of a scalar loss through `instance_norm`.

    Parameters
    ----------
    dy : array
        Gradient of the loss with respect to y; y's shape and dtype.
    x : array
        As it went into the forward.
    weight, bias : array of shape (C,), optional
        As they went into the forward; the bias has an effect only under an activation.
    mean, rstd : array, optional
        The forward's statistics, of the batch shape followed by C; both or neither.
    eps, channel_axis, where, activation
        As in the forward.
    batch_axis : int, tuple of int or None, optional
        As in `group_norm`.
    out : array, optional
        Receives dx; it may be dy or x itself.

    Returns
    -------
    GroupNormGrads
        ``(dx, dweight, dbias)``, as `group_norm_backward` gives them.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> dy, x = np.random.default_rng(0).normal(size=(2, 4, 3, 10))
    >>> cugn.instance_norm_backward(dy, x).dweight.shape
    (3,)
    """
    return group_norm_backward(
        dy,
        x,
        Each.CHANNEL,
        weight,
        bias,
        mean=mean,
        rstd=rstd,
        eps=eps,
        channel_axis=channel_axis,
        batch_axis=batch_axis,
        where=where,
        activation=activation,
        out=out,
    )


def batch_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    where: Array | None = None,
    activation: str | None = None,
    out: Array | None = None,
) -> Array:
    """Normalize each channel over all samples and positions.

    Parameters
    ----------
    x : array
        As in `group_norm`.
    weight, bias : array of shape (C,), optional
        Scale and shift of each channel.
    eps, channel_axis, where, activation, out
        As in `group_norm`.
    batch_axis : int, tuple of int or None, optional
        As in `group_norm`; the axes are checked, and reduced like the spatial ones.

    Returns
    -------
    array
        y, of x's shape and dtype: ``group_norm(x, C, batch_axis=None, ...)`` [1]_.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Notes
    -----
    The result of a sample depends on the others. For inference keep running statistics and apply them with
    `normalize`: ``normalize(x, mean, rstd, C)`` with mean and rstd of shape (C,).

    References
    ----------
    .. [1] Ioffe, Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> x = np.random.default_rng(0).normal(size=(8, 3, 50))
    >>> bool(np.allclose(cugn.batch_norm(x).mean(axis=(0, 2)), 0))
    True
    """
    return group_norm(
        x,
        Each.CHANNEL_OF_BATCH,
        weight,
        bias,
        eps=eps,
        channel_axis=channel_axis,
        batch_axis=batch_axis,
        where=where,
        activation=activation,
        out=out,
    )


def batch_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    where: Array | None = None,
    activation: str | None = None,
    out: Array | None = None,
) -> GroupNormForward:
    """Normalize as `batch_norm` does, and return the statistics for the backward as well.

    Parameters
    ----------
    x : array
        As in `group_norm`.
    weight, bias : array of shape (C,), optional
        Scale and shift of each channel.
    eps, channel_axis, where, activation, out
        As in `group_norm`.
    batch_axis : int, tuple of int or None, optional
        As in `group_norm`; the axes are checked, and reduced like the spatial ones.

    Returns
    -------
    GroupNormForward
        ``(y, mean, rstd)``; the statistics in float64, of shape (C,).

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> y, mean, rstd = cugn.batch_norm_forward(np.ones((2, 3, 5)))
    >>> mean.shape
    (3,)
    """
    return group_norm_forward(
        x,
        Each.CHANNEL_OF_BATCH,
        weight,
        bias,
        eps=eps,
        channel_axis=channel_axis,
        batch_axis=batch_axis,
        where=where,
        activation=activation,
        out=out,
    )


def batch_norm_backward(
    dy: Array,
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    mean: Array | None = None,
    rstd: Array | None = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    where: Array | None = None,
    activation: str | None = None,
    out: Array | None = None,
) -> GroupNormGrads:
    """Gradients of a scalar loss through `batch_norm`.

    Parameters
    ----------
    dy : array
        Gradient of the loss with respect to y; y's shape and dtype.
    x : array
        As it went into the forward.
    weight, bias : array of shape (C,), optional
        As they went into the forward; the bias has an effect only under an activation.
    mean, rstd : array, optional
        The forward's statistics, of shape (C,); both or neither.
    eps, channel_axis, where, activation
        As in the forward.
    batch_axis : int, tuple of int or None, optional
        As in `group_norm`; the axes are checked, and reduced like the spatial ones.
    out : array, optional
        Receives dx; it may be dy or x itself.

    Returns
    -------
    GroupNormGrads
        ``(dx, dweight, dbias)``, as `group_norm_backward` gives them.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> dy, x = np.random.default_rng(0).normal(size=(2, 4, 3, 10))
    >>> cugn.batch_norm_backward(dy, x).dweight.shape
    (3,)
    """
    return group_norm_backward(
        dy,
        x,
        Each.CHANNEL_OF_BATCH,
        weight,
        bias,
        mean=mean,
        rstd=rstd,
        eps=eps,
        channel_axis=channel_axis,
        batch_axis=batch_axis,
        where=where,
        activation=activation,
        out=out,
    )
