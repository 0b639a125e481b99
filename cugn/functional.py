"""The public functions of group normalization: a call reads from here into an engine, and nothing goes back up.

Every function does the same: `dispatch` checks the arguments and chooses the engine (`engines.py`, `plan.py`), and
the engine computes.
"""

from __future__ import annotations

from typing import Any

from .engines import dispatch
from .moments import Moments
from .results import BackwardSums, GroupNormDoubleGrads, GroupNormForward, GroupNormGrads

__all__ = [
    "backward_apply",
    "backward_sums",
    "group_norm",
    "group_norm_backward",
    "group_norm_double_backward",
    "group_norm_forward",
    "group_norm_jvp",
    "moments",
    "normalize",
]

Array = Any


def group_norm(
    x: Array,
    groups: Any,
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
    r"""Normalize groups of channels of each sample to mean 0 and variance 1.

    .. math:: y = \mathrm{act}\left(\gamma_c \frac{x - \mu_{ng}}{\sqrt{v_{ng} + \epsilon}} + \beta_c\right)

    with the mean :math:`\mu_{ng}` and the variance :math:`v_{ng}` over the channels of group g and all positions of
    sample n [1]_. No other sample has a part in it: y of a sample is the same, to the bit, in every batch.

    Parameters
    ----------
    x : array
        Samples, channels and any number of spatial axes, by default (N, C, ...). NumPy, CuPy, Dask or another
        array-API array; float16, bfloat16, float32, float64, or int8, uint8, int16, uint16 (images). Any strides.
    groups : int or sequence of int
        Number of groups G, which divides C (contiguous channels, equal groups), or C labels 0..G-1: any partition.
    weight, bias : array of shape (C,), optional
        Scale :math:`\gamma` and shift :math:`\beta` of each channel, of any float dtype. None stands for 1 and 0.
    eps : float, optional
        Added to the variance, in squared units of x. 0 is allowed: a constant group then gives NaN.
    channel_axis : int, optional
        Axis of the channels.
    batch_axis : int, tuple of int or None, optional
        Axis or axes of the samples; None for a single sample without a batch axis. All other axes are spatial.
    where : array of bool, optional
        Broadcasts against x. Only the True elements enter the statistics; every element is normalized with them. A
        group without any gives NaN.
    activation : {None, "relu", "silu", "gelu", "gelu_tanh"}, optional
        Applied to the result before it is rounded and stored.
    out : array, optional
        Receives the result; x's shape and dtype (any float dtype for integer x). It may be x itself.

    Returns
    -------
    array
        y, of x's shape and dtype; float32 for integer x. `out` if that was given.

    Raises
    ------
    TypeError
        For a dtype that is not listed above, anything but arrays, masked arrays, arrays of different libraries.
    ValueError
        For shapes, axes, groups, eps or an activation that do not fit, an `out` that is read-only or overlaps an
        input, arrays on different devices.

    See Also
    --------
    group_norm_forward : The same with the statistics.
    group_norm_backward : Its gradients.

    Notes
    -----
    Statistics are in float64 at least, the mean in two parts, so that the result keeps the accuracy of its dtype for
    mean/std up to 1e6 (1e12 in float64) and for all finite values. No memory as large as x is taken besides the
    result, except through the reference engine (see the user guide).

    References
    ----------
    .. [1] Wu, He, "Group Normalization", ECCV 2018, arXiv:1803.08494.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> x = np.random.default_rng(0).normal(5, 3, (2, 6, 8, 8)).astype(np.float32)
    >>> y = cugn.group_norm(x, 3)
    >>> float(round(abs(y[0, :2].mean()), 4)), float(round(y[0, :2].std(), 4))
    (0.0, 1.0)
    """
    arrays = (x, weight, bias, where, out)
    engine, plan = dispatch("forward", arrays, groups, eps, channel_axis, batch_axis, activation)
    return engine.forward(plan, x, weight, bias, where, out)[0]


def group_norm_forward(
    x: Array,
    groups: Any,
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
    """Normalize as `group_norm` does, and return the statistics for the backward as well.

    Parameters
    ----------
    x, groups, weight, bias, eps, channel_axis, batch_axis, where, activation, out
        As in `group_norm`.

    Returns
    -------
    GroupNormForward
        ``(y, mean, rstd)``: y as `group_norm` gives it; mean and ``rstd = 1 / sqrt(var + eps)`` in float64, of the
        batch shape followed by G.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> x = np.arange(24, dtype=np.float64).reshape(1, 4, 6)
    >>> y, mean, rstd = cugn.group_norm_forward(x, 2, eps=0)
    >>> mean
    array([[ 5.5, 17.5]])
    """
    arrays = (x, weight, bias, where, out)
    engine, plan = dispatch("forward", arrays, groups, eps, channel_axis, batch_axis, activation)
    return GroupNormForward(*engine.forward(plan, x, weight, bias, where, out))


def group_norm_backward(
    dy: Array,
    x: Array,
    groups: Any,
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
    r"""Gradients of a scalar loss through `group_norm`.

    .. math:: dx = \frac{1}{\sqrt{v + \epsilon}} \left(g - \overline{g} - \hat x\, \overline{g \hat x}\right),
              \qquad g = \gamma\, dy

    with :math:`\hat x` the normalized x and the bars means over a group; dweight and dbias are the sums of
    :math:`dy\,\hat x` and dy over samples and positions.

    Parameters
    ----------
    dy : array
        Gradient of the loss with respect to y; y's shape and dtype.
    x, groups, weight
        As they went into the forward.
    bias : array of shape (C,), optional
        As it went into the forward; it has an effect only under an activation.
    mean, rstd : array, optional
        The forward's statistics, which saves one pass over x; both or neither. Of the batch shape followed by G.
    eps, channel_axis, batch_axis, where, activation
        As in the forward. `eps` has no effect where `rstd` is given.
    out : array, optional
        Receives dx; x's shape, y's dtype. It may be dy or x itself.

    Returns
    -------
    GroupNormGrads
        ``(dx, dweight, dbias)``: dx of x's shape and dtype; dweight and dbias of shape (C,), in the dtype of the
        weight (of x without one), whether or not there is a weight or a bias.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Notes
    -----
    The result has the same bits from run to run and for any number of threads. A group of one element has dx = 0.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> rng = np.random.default_rng(0)
    >>> x, dy = rng.normal(size=(2, 2, 4, 5, 5))
    >>> y, mean, rstd = cugn.group_norm_forward(x, 2)
    >>> dx, dweight, dbias = cugn.group_norm_backward(dy, x, 2, mean=mean, rstd=rstd)
    >>> bool(np.allclose(dbias, dy.sum((0, 2, 3))))
    True
    >>> bool(abs(dx.reshape(2, 2, -1).sum(-1)).max() < 1e-12)
    True
    """
    _required(dy, "dy")
    _both_or_neither(mean, rstd)
    arrays = (x, dy, weight, bias, mean, rstd, where, out)
    engine, plan = dispatch("backward", arrays, groups, eps, channel_axis, batch_axis, activation)
    return GroupNormGrads(*engine.backward(plan, dy, x, weight, bias, mean, rstd, where, out))


def group_norm_jvp(
    tx: Array,
    x: Array,
    groups: Any,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    tweight: Array | None = None,
    tbias: Array | None = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    where: Array | None = None,
    activation: str | None = None,
    out: Array | None = None,
) -> Array:
    """Directional derivative of `group_norm` along (tx, tweight, tbias): forward-mode differentiation.

    Parameters
    ----------
    tx : array
        Tangent of x; x's shape, y's dtype.
    x, groups, weight, bias
        As in `group_norm`.
    tweight, tbias : array of shape (C,), optional
        Tangents of weight and bias. None stands for zero.
    eps, channel_axis, batch_axis, where, activation
        As in `group_norm`.
    out : array, optional
        Receives ty; x's shape, y's dtype. It may be tx or x itself.

    Returns
    -------
    array
        ty, of y's shape and dtype.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> x, tx = np.random.default_rng(0).normal(size=(2, 1, 4, 9))
    >>> step = 1e-6
    >>> difference = (cugn.group_norm(x + step * tx, 2) - cugn.group_norm(x - step * tx, 2)) / (2 * step)
    >>> bool(np.allclose(cugn.group_norm_jvp(tx, x, 2), difference, atol=1e-8))
    True
    """
    _required(tx, "tx")
    arrays = (x, tx, weight, bias, tweight, tbias, where, out)
    engine, plan = dispatch("jvp", arrays, groups, eps, channel_axis, batch_axis, activation)
    return engine.jvp(plan, tx, x, weight, bias, tweight, tbias, where, out)


def group_norm_double_backward(
    ddx: Array,
    dy: Array,
    x: Array,
    groups: Any,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    ddweight: Array | None = None,
    ddbias: Array | None = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    where: Array | None = None,
    activation: str | None = None,
) -> GroupNormDoubleGrads:
    """Gradients through `group_norm_backward`, for losses that contain gradients (penalties, meta-learning).

    Parameters
    ----------
    ddx : array
        Gradient of the loss with respect to dx; x's shape, y's dtype.
    dy, x, groups, weight, bias
        As they went into `group_norm_backward`; the bias has an effect only under an activation.
    ddweight, ddbias : array of shape (C,), optional
        Gradients of the loss with respect to dweight and dbias. None stands for zero.
    eps, channel_axis, batch_axis, where, activation
        As in `group_norm`.

    Returns
    -------
    GroupNormDoubleGrads
        ``(gdy, gx, gweight)``, the gradients with respect to dy, x and weight; also ``.gbias``, which is not zero
        under an activation only.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> ddx, dy, x = np.random.default_rng(0).normal(size=(3, 1, 4, 9))
    >>> gdy, gx, gweight = cugn.group_norm_double_backward(ddx, dy, x, 2)
    >>> bool(np.allclose(gdy, cugn.group_norm_jvp(ddx, x, 2)))
    True
    """
    _required(ddx, "ddx")
    _required(dy, "dy")
    arrays = (x, ddx, dy, weight, bias, ddweight, ddbias, where)
    engine, plan = dispatch("double_backward", arrays, groups, eps, channel_axis, batch_axis, activation)
    return GroupNormDoubleGrads(*engine.double_backward(plan, ddx, dy, x, weight, bias, ddweight, ddbias, where))


def moments(
    x: Array,
    groups: Any,
    *,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    where: Array | None = None,
) -> Moments:
    """Count, mean and sum of squared deviations of each group of each sample.

    Parameters
    ----------
    x, groups, channel_axis, batch_axis, where
        As in `group_norm`. For batch norm's statistics, shape (C,), take ``groups=C, batch_axis=None``.

    Returns
    -------
    Moments
        Of the batch shape followed by G, in float64; they merge (`Moments.merge`) with those of other parts.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    See Also
    --------
    normalize : Apply statistics.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> m = cugn.moments(np.arange(12.0).reshape(1, 4, 3), 2)
    >>> m.count, m.mean, m.m2
    (array([[6, 6]]), array([[2.5, 8.5]]), array([[17.5, 17.5]]))
    """
    engine, plan = dispatch("moments", (x, where), groups, 0.0, channel_axis, batch_axis, None)
    return Moments(*engine.moments(plan, x, where))


def normalize(
    x: Array,
    mean: Array,
    rstd: Array,
    groups: Any,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    activation: str | None = None,
    out: Array | None = None,
) -> Array:
    """Apply statistics that the caller supplies: ``act((x - mean) * rstd * weight + bias)``.

    For statistics from elsewhere: a whole volume's for its tiles, running ones for batch norm at inference.

    Parameters
    ----------
    x : array
        As in `group_norm`.
    mean, rstd : array
        Mean and ``1 / sqrt(var + eps)`` of each group, of any float dtype; they broadcast against the batch shape
        followed by G, so that shape (G,) serves all samples alike.
    groups, weight, bias, channel_axis, batch_axis, activation, out
        As in `group_norm`.

    Returns
    -------
    array
        y, of x's shape and dtype; float32 for integer x. `out` if that was given.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> x = np.random.default_rng(0).normal(3, 2, (2, 4, 50))
    >>> m = cugn.moments(x, 2)
    >>> bool(np.allclose(cugn.normalize(x, m.mean, m.rstd(1e-5), 2), cugn.group_norm(x, 2)))
    True
    """
    _required(mean, "mean")
    _required(rstd, "rstd")
    arrays = (x, mean, rstd, weight, bias, out)
    engine, plan = dispatch("normalize", arrays, groups, 0.0, channel_axis, batch_axis, activation)
    return engine.normalize(plan, x, mean, rstd, weight, bias, out)


def backward_sums(
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    groups: Any,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    activation: str | None = None,
) -> BackwardSums:
    """Take the sums of the backward over a part of an array: what `moments` is to the forward.

    An array that lies in parts (shards, tiles, chunks) is differentiated in two passes: the sums of each part, merged,
    and `backward_apply` with them on each part.

    Parameters
    ----------
    dy, x : array
        The part's gradient with respect to y, and its x.
    mean, rstd : array
        Statistics of the whole groups, taken as they are; they broadcast against the batch shape followed by G.
    groups, weight, bias, channel_axis, batch_axis, activation
        As in `group_norm`.

    Returns
    -------
    BackwardSums
        In float64.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    See Also
    --------
    backward_apply : The gradient from the merged sums.
    moments : The forward's sums.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> dy, x = np.random.default_rng(0).normal(size=(2, 3, 4, 50))
    >>> m = cugn.moments(x, 2)
    >>> whole = cugn.backward_sums(dy, x, m.mean, m.rstd(1e-5), 2)
    >>> left = cugn.backward_sums(dy[..., :20], x[..., :20], m.mean, m.rstd(1e-5), 2)
    >>> right = cugn.backward_sums(dy[..., 20:], x[..., 20:], m.mean, m.rstd(1e-5), 2)
    >>> all(np.allclose(a, b) for a, b in zip(left.merge(right), whole))
    True
    """
    _required(dy, "dy")
    _required(mean, "mean")
    _required(rstd, "rstd")
    arrays = (x, dy, mean, rstd, weight, bias)
    engine, plan = dispatch("backward_sums", arrays, groups, 0.0, channel_axis, batch_axis, activation)
    return BackwardSums(*engine.backward_sums(plan, dy, x, mean, rstd, weight, bias))


def backward_apply(
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    mean_wdy: Array,
    mean_wdy_xhat: Array,
    groups: Any,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    where: Array | None = None,
    activation: str | None = None,
    out: Array | None = None,
) -> Array:
    r"""Gradient with respect to a part of x, from sums over the whole: what `normalize` is to the forward.

    .. math:: dx = \frac{1}{\sqrt{v + \epsilon}} \left(\gamma\, dz - \overline{\gamma\, dz}
              - \hat x\, \overline{\gamma\, dz\, \hat x}\right)

    Parameters
    ----------
    dy, x : array
        The part's gradient with respect to y, and its x.
    mean, rstd : array
        Statistics of the whole groups, taken as they are; they broadcast against the batch shape followed by G.
    mean_wdy, mean_wdy_xhat : array
        The merged `backward_sums` of each group divided by the number of elements in its statistics
        (``Moments.count``), shaped as `mean`.
    groups, weight, bias, channel_axis, batch_axis, activation
        As in `group_norm`.
    where : array of bool, optional
        The part's mask: an element that has not entered the statistics has no gradient through them.
    out : array, optional
        Receives dx; it may be dy or x itself.

    Returns
    -------
    array
        dx, of x's shape and y's dtype.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    See Also
    --------
    backward_sums : The sums of a part.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> dy, x = np.random.default_rng(0).normal(size=(2, 3, 4, 50))
    >>> m = cugn.moments(x, 2)
    >>> statistics = m.mean, m.rstd(1e-5)
    >>> sums = cugn.backward_sums(dy, x, *statistics, 2)
    >>> means = sums.sum_wdy / m.count, sums.sum_wdy_xhat / m.count
    >>> tile = np.s_[:, :, 10:20]
    >>> dx = cugn.backward_apply(dy[tile], x[tile], *statistics, *means, 2)
    >>> bool(np.allclose(dx, cugn.group_norm_backward(dy, x, 2).dx[tile]))
    True
    """
    arrays = (x, dy, mean, rstd, mean_wdy, mean_wdy_xhat, weight, bias, where, out)
    for name, array in zip(("dy", "mean", "rstd", "mean_wdy", "mean_wdy_xhat"), arrays[1:], strict=False):
        _required(array, name)
    engine, plan = dispatch("backward_apply", arrays, groups, 0.0, channel_axis, batch_axis, activation)
    return engine.backward_apply(plan, dy, x, mean, rstd, mean_wdy, mean_wdy_xhat, weight, bias, where, out)


def _both_or_neither(mean: Array | None, rstd: Array | None) -> None:
    if (mean is None) != (rstd is None):
        raise ValueError(f"{'mean' if mean is None else 'rstd'} is missing: mean and rstd are given both or neither")


def _required(array: Array | None, name: str) -> None:
    if array is None:
        raise TypeError(f"{name} is None: it must be an array")
