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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("form", ["first", "last", "table"])
@pytest.mark.parametrize("name", [*GATED, "relu"])
def test_limits_in_kernels(name: str, form: str, dtype: str, library: Library) -> None:
    """The same where the formulas are compiled: of values that are normalized already, gradients of finite ones."""
    end = float(np.finfo(dtype).max) / 4
    z = np.array([-np.inf, -end, -(end**0.5), -1e4, 1e4, end**0.5, end, np.inf]).astype(dtype)
    shape, axis = {"first": ((1, 8, 40), 1), "last": ((1, 40, 8), -1), "table": ((16, 8), -1)}[form]
    x = np.broadcast_to(z[:, None] if form == "first" else z, shape).astype(dtype)
    samples = shape[0]
    given = {"mean": library.array(np.zeros((samples, 1))), "rstd": library.array(np.ones((samples, 1)))}
    y = cugn.normalize(library.array(x), given["mean"], given["rstd"], 1, channel_axis=axis, activation=name)
    np.testing.assert_array_equal(library.numpy(y), np.where(x < 0, 0, x))
    if dtype == "float64":  # its backward takes the mean again, from x
        return
    x[~np.isfinite(x)] = 0
    with np.errstate(over="ignore"):  # of dx
        arrays = (library.array(np.ones(shape, dtype)), library.array(x))
        grads = cugn.group_norm_backward(*arrays, 1, channel_axis=axis, activation=name, **given)
    np.testing.assert_array_equal(library.numpy(grads.dbias)[1:-1], ((z > 0) * (x.size // 8))[1:-1])


@pytest.mark.parametrize("any_power", [False, True], ids=["clipped", "any power"])
@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("name", GATED)
def test_compiled(name: str, compute: str, any_power: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """act within 4u of |z|, and slopes within 6u of 1, on processors of both kinds."""
    numba = pytest.importorskip("numba")
    from cugn.cpu import activate as compiled
    from cugn.cpu import convert, powers

    if any_power and not powers.scales_any_power():
        pytest.skip("the processor has no AVX-512")
    monkeypatch.setattr(compiled, "scales_any_power", lambda: any_power)
    act, act_slope = compiled.activation_kernels.__wrapped__(compute, name)
    load, store = convert.loader(compute, compute)[0], convert.storer(compute, compute)[0]
    one = convert.to_compute(compute)

    @numba.njit
    def apply(z: int, y: int, dz: int, count: int, size: int) -> None:
        for at in range(0, count * size, 16 * size):
            store(y + at, act(load(z + at)))
            store(dz + at, act_slope(one(1.0), load(z + at)))

    far = np.geomspace(1, 1e30, 1600)
    z = np.concatenate([np.linspace(-50, 50, 16_000), far, -far, [-np.inf, np.inf] * 8, [np.nan] * 16]).astype(compute)
    y, dz = np.empty_like(z), np.empty_like(z)
    apply(z.ctypes.data, y.ctypes.data, dz.ctypes.data, z.size, z.itemsize)
    finite = z[:-32]
    wide = finite.astype(oracle.LONG)
    u = float(np.finfo(compute).eps) / 2
    with np.errstate(over="ignore"):  # of the oracle's exp, far below 0
        assert (np.abs(y[:-32] - oracle.act(name, wide)) <= 4 * u * np.abs(wide)).all()
        assert (np.abs(dz[:-32] - oracle.act_slope(name, wide)) <= 6 * u).all()
    np.testing.assert_array_equal(y[-32:-16], [0, np.inf] * 8)
    np.testing.assert_array_equal(dz[-32:-16], [0, 1] * 8)
    assert np.isnan(y[-16:]).all()
    assert np.isnan(dz[-16:]).all()


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
