"""Promise: activations keep their digits in the tails, and have their limits at infinity."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import oracle
import pytest
from libraries import Library

import cugn
from cugn.activations import activate, curvature, erfc, slope

GATED = ("silu", "gelu", "gelu_tanh")


def test_erfc() -> None:
    """Relative error 1e-15 down to the end of the normal range, and two steps of float64 below it."""
    near_zero = 10.0 ** np.linspace(-20, 0, 60)
    # the pieces meet at 0.46875 and 4; sixteenths are where exp(-x^2) is cut in two
    seams = [np.nextafter(v, v + s) for v in (0.46875, 4.0, *np.arange(1, 26, 1.0), 5.0625) for s in (-1, 0, 1)]
    x = np.concatenate([np.linspace(-7, 27.5, 2500), near_zero, -near_zero, seams])
    with mpmath.workdps(40):
        exact = [mpmath.erfc(mpmath.mpf(float(v))) for v in x]
        error = np.array([float(abs(mpmath.mpf(float(v)) - e)) for v, e in zip(erfc(np, x), exact, strict=True)])
        size = np.array([float(e) for e in exact])
    assert (error <= 1e-15 * size + 2.0**-1073).all(), float((error / size)[size > 1e-300].max())
    np.testing.assert_array_equal(erfc(np, np.array([-np.inf, np.inf, 1e300])), [2, 0, 0])
    assert math.isnan(erfc(np, np.array(np.nan)))


@pytest.mark.parametrize("name", GATED)
def test_limits(name: str, library: Library) -> None:
    """0 and z at the ends of the range, with slopes 0 and 1 and no curvature; no infinity times zero."""
    z = np.array([-np.inf, -1.7e308, -1e155, -1e4, 1e4, 1e155, 1.7e308, np.inf])
    given = library.array(z)

    def check(value: Any, wanted: np.ndarray) -> None:
        np.testing.assert_array_equal(library.numpy(value), wanted)

    with np.errstate(over="raise", invalid="raise"):
        xp = given.__array_namespace__()
        check(activate(xp, name, given), np.where(z < 0, 0, z))
        check(slope(xp, name, given), z > 0)
        check(curvature(xp, name, given), np.zeros(8))
    finite = z[np.isfinite(z)].astype(oracle.LONG)
    np.testing.assert_array_equal(oracle.act_slope(name, finite), finite > 0)
    np.testing.assert_array_equal(oracle.act_curvature(name, finite), np.zeros(6))
    for function in (activate, slope, curvature):
        assert np.isnan(library.numpy(function(xp, name, library.array(np.array(np.nan)))))


def test_gradients_where_a_mask_leaves_values_far_from_zero(library: Library) -> None:
    """One element is kept, so that the others are up to 1e40 in the units of rstd: slope 1 above, 0 below."""
    x = np.array([[2.2e38, -6.1e37, 3.4e37] * 8], np.float32).reshape(1, 3, 8, order="F")
    where = (np.arange(3) == 2)[None, :, None]
    dy = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    given = (library.array(a) for a in (dy, x))
    result = cugn.group_norm_backward(*given, 1, where=library.array(where), activation="silu")
    dbias = library.numpy(result.dbias)
    expected = [dy[0, 0].sum(dtype=float), 0, dy[0, 2].sum(dtype=float) / 2]  # of those that are kept z is 0
    np.testing.assert_allclose(dbias, expected, rtol=1e-5, atol=1e-30)
