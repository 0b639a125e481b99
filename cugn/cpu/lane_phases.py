"""Tables (S = 1) whose groups are small, labelled or masked: sixteen samples at a time, one in each lane.

A group of eight values side by side fills half a vector, and its sums then go across lanes; labels put its values
anywhere. With a sample in each lane both are nothing: sums stay in their lanes, and a channel is one address. What it
costs is the way there and back (`transpose.py`), half a cycle an element.

A sample's bits are those of its own lane, whatever the other lanes hold. Arithmetic is that of float64. Sums over the
channels of a label group are of terms in units of one number: integers, so that the channels' order is nothing.

`real` is the dtype of the channels in lanes: float32, or float64 where x or y is that. Then there is more to be done:
x_hat = (x*scale - mean - rest) * root, with a power of two that keeps squares in range, a mean of two float64,
and sums whose roundings are added as well.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from . import words as w
from .access import word
from .activate import activation_kernels
from .compile import inner
from .convert import itemsize, loader, storer
from .labelled import group_sums
from .lane_memory import move_statistics, read_mask, reader, real_of, writer
from .lane_moments import elements, group_moments, inverse_deviation, unscaled
from .memory import bits_float, load_f64, load_i64, store_f64
from .simd import LANES, fma, less, narrow, select, splat

_X, _OUT = 0, 1  # positions among the arrays of the geometry
_load64, _ = loader("float64", "float64")
_store64 = storer("float64", "float64")[0]


@cache
def moments_block(x: str, y: str, labelled: bool, masked: bool) -> Any:
    """Kernel: mean and m2 of sixteen samples, under a mask the counts behind m2."""
    real = real_of(x, y)
    read, moments = reader(x, real), group_moments(real, labelled, masked)

    @inner
    def block(geometry: int, call: int, task: int, chunk: int, store_at: int, scratch: int) -> None:
        n0 = LANES * task
        samples, groups = word(geometry, w.SAMPLES), word(geometry, w.GROUPS)
        count = min(LANES, samples - n0)
        turned = scratch + word(geometry, w.TURNED_AT)
        read(geometry, call, _X, n0, count, turned, scratch)
        mask = 0
        if masked:
            mask = read_mask(geometry, call, n0, count, scratch)
        means = scratch + word(geometry, w.LANE_STATISTICS_AT)
        squares = means + 8 * LANES * groups
        counts = scratch + word(geometry, w.BLOCKS_AT)
        for g in range(groups):
            mean, rest, m2, values, scale = moments(geometry, g, turned, mask, 0.0)
            m2 = select(less(splat(0.0), values), m2, splat(0.0))  # of nothing it is 0, and the mean NaN
            _store64(means + 8 * LANES * g, unscaled(mean + rest, scale))
            _store64(squares + 8 * LANES * g, unscaled(unscaled(m2, scale), scale))
            if masked:
                _store64(counts, values)
                for r in range(count):
                    store_f64(load_i64(call, w.CALL_RSTD), (samples + n0 + r) * groups + g, load_f64(counts, r))
        move_statistics(geometry, call, n0, count, means, squares, False)

    return block


@cache
def group_results(x: str, y: str, compute: str, activation: str | None, labelled: bool) -> Any:
    """apply(geometry, group, turned, scratch, mean, rest, root, scale): y in the place of x."""
    real = real_of(x, y)
    line = LANES * itemsize(real)
    channels_of, channel_at, _ = group_sums(labelled)
    normal = elements(real)
    act = activation_kernels(compute, activation)[0]
    wide = compute == "float64" or activation is None
    store = storer(real, "float64" if wide else compute)[0]

    @inner
    def apply(
        geometry: int, group: int, turned: int, scratch: int, mean: Any, rest: Any, root: Any, scale: Any
    ) -> None:
        weight, bias = scratch + word(geometry, w.WEIGHT_AT), scratch + word(geometry, w.BIAS_AT)
        first, size = channels_of(geometry, group)
        for k in range(first, first + size):
            c = channel_at(geometry, k)
            x_hat = normal(turned + c * line, mean, rest, root, scale)
            z = fma(x_hat, splat(load_f64(weight, c)), splat(load_f64(bias, c)))
            if wide:
                store(turned + c * line, act(z))
            else:
                store(turned + c * line, act(narrow(z)))

    return apply


@cache
def forward_block(x: str, y: str, compute: str, activation: str | None, labelled: bool, masked: bool) -> Any:
    """Kernel: y of sixteen samples, with mean and rstd."""
    real = real_of(x, y)
    read, write = reader(x, real), writer(y, real)
    moments, root_of = group_moments(real, labelled, masked), inverse_deviation(real)
    apply = group_results(x, y, compute, activation, labelled)
    exact = real == "float64"

    @inner
    def block(geometry: int, call: int, task: int, chunk: int, store_at: int, scratch: int) -> None:
        n0 = LANES * task
        count = min(LANES, word(geometry, w.SAMPLES) - n0)
        turned = scratch + word(geometry, w.TURNED_AT)
        read(geometry, call, _X, n0, count, turned, scratch)
        mask = 0
        if masked:
            mask = read_mask(geometry, call, n0, count, scratch)
        means = scratch + word(geometry, w.LANE_STATISTICS_AT)
        rstds = means + 8 * LANES * word(geometry, w.GROUPS)
        eps = bits_float(word(geometry, w.EPS))
        for g in range(word(geometry, w.GROUPS)):
            mean, rest, m2, values, scale = moments(geometry, g, turned, mask, eps)
            root = root_of(m2, values, scale, eps)
            _store64(means + 8 * LANES * g, unscaled(mean + rest, scale))
            _store64(rstds + 8 * LANES * g, root * scale)
            # the mean's second part is nothing in a y of float32
            apply(geometry, g, turned, scratch, mean, rest if exact else splat(0.0), root, scale)
        move_statistics(geometry, call, n0, count, means, rstds, False)
        write(geometry, call, _OUT, n0, count, turned, scratch)

    return block


@cache
def normalize_block(x: str, y: str, compute: str, activation: str | None, labelled: bool) -> Any:
    """Kernel: y of sixteen samples under statistics that the caller gave."""
    real = real_of(x, y)
    read, write = reader(x, real), writer(y, real)
    apply = group_results(x, y, compute, activation, labelled)
    exact = real == "float64"

    @inner
    def block(geometry: int, call: int, task: int, chunk: int, store_at: int, scratch: int) -> None:
        n0 = LANES * task
        count = min(LANES, word(geometry, w.SAMPLES) - n0)
        turned = scratch + word(geometry, w.TURNED_AT)
        read(geometry, call, _X, n0, count, turned, scratch)
        means = scratch + word(geometry, w.LANE_STATISTICS_AT)
        rstds = means + 8 * LANES * word(geometry, w.GROUPS)
        move_statistics(geometry, call, n0, count, means, rstds, True)
        one = splat(1.0)
        for g in range(word(geometry, w.GROUPS)):
            scale, root = one, _load64(rstds + 8 * LANES * g)
            if exact:  # x - mean may be out of range where x_hat is not
                scale = select(less(root, one), splat(0.5), one)
                root = unscaled(root, scale)
            mean = _load64(means + 8 * LANES * g) * scale
            apply(geometry, g, turned, scratch, mean, splat(0.0), root, scale)
        write(geometry, call, _OUT, n0, count, turned, scratch)

    return block
