"""xarray: names of dimensions instead of axes; Dask arrays are handed over and stay lazy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cugn

xr = pytest.importorskip("xarray")
DIMS = ("time", "y", "band", "x")


@pytest.fixture
def field() -> Any:
    data = 1e4 + np.random.default_rng(0).normal(size=(3, 10, 6, 8))
    coords = {"time": [1, 2, 4], "band": list("abcdef"), "kind": ("band", ["i", "v", "v", "i", "w", "v"])}
    return xr.DataArray(data.astype(np.float32), dims=DIMS, coords=coords, name="radiance", attrs={"units": "K"})


def test_apply_ufunc_hands_dask_arrays_over(field: Any) -> None:
    pytest.importorskip("dask.array")
    chunked = field.chunk({"time": 1, "y": 4, "band": 4, "x": 8})
    kwargs = {"groups": 2, "channel_axis": 2}
    lazy = xr.apply_ufunc(cugn.group_norm, chunked, kwargs=kwargs, dask="allowed", keep_attrs=True)
    assert lazy.chunks == chunked.chunks
    assert lazy.dtype == np.float32
    wanted = xr.apply_ufunc(cugn.group_norm, field, kwargs=kwargs, keep_attrs=True)
    # both are rounded once from statistics that agree to 1e-10
    np.testing.assert_allclose(lazy.compute(), wanted, rtol=2e-7, atol=2e-7)
    for result in (lazy, wanted):
        assert (result.name, result.attrs, result.dims) == (field.name, {"units": "K"}, DIMS)
        xr.testing.assert_identical(result.coords.to_dataset(), field.coords.to_dataset())


@pytest.mark.parametrize("chunked", [False, True])
def test_group_norm(field: Any, chunked: bool) -> None:
    from cugn.xarray import group_norm

    x = field
    if chunked:
        pytest.importorskip("dask.array")
        x = field.chunk({"time": 2, "band": 4, "x": 3})
    labels = [0, 1, 1, 0, 2, 1]
    weight = xr.DataArray(np.linspace(1, 2, 6), dims="band")
    mask = xr.DataArray(np.random.default_rng(1).random((8, 3)) < 0.7, dims=("x", "time"))
    y = group_norm(
        x, field.kind, weight, np.arange(6.0), channel_dim="band", batch_dim="time", where=mask, activation="relu"
    )
    wanted = cugn.group_norm(
        field.values,
        labels,
        weight.values,
        np.arange(6.0),
        channel_axis=2,
        where=mask.values.T[:, None, None, :],
        activation="relu",
    )
    assert (y.chunks == x.chunks) if chunked else (type(y.data) is np.ndarray)
    np.testing.assert_allclose(y, wanted, rtol=4e-7, atol=4e-7)
    assert (y.name, y.attrs, y.dims) == (field.name, field.attrs, field.dims)
    xr.testing.assert_identical(y.coords.to_dataset(), field.coords.to_dataset())


def test_batch_dims(field: Any) -> None:
    from cugn.xarray import batch_norm, group_norm

    y = group_norm(field, 3, channel_dim="band", batch_dim=("x", "time"))
    np.testing.assert_array_equal(y, cugn.group_norm(field.values, 3, channel_axis=2, batch_axis=(3, 0)))
    y = group_norm(field, 3, channel_dim="band")
    np.testing.assert_array_equal(y, cugn.group_norm(field.values, 3, channel_axis=2, batch_axis=None))
    y = batch_norm(field, channel_dim="band")
    np.testing.assert_array_equal(y, cugn.batch_norm(field.values, channel_axis=2))


def test_errors(field: Any) -> None:
    from cugn.xarray import batch_norm, group_norm

    with pytest.raises(TypeError, match=r"x is a ndarray: it must be an xarray\.DataArray"):
        batch_norm(field.values, channel_dim="band")
    with pytest.raises(ValueError, match="'level' is none of them"):
        group_norm(field, 2, channel_dim="level")
    with pytest.raises(ValueError, match="'level' is none of them"):
        group_norm(field, 2, channel_dim="band", batch_dim="level")
    with pytest.raises(ValueError, match="weight has the dimensions"):
        group_norm(field, 2, field[0, 0, :, 0].rename(band="x"), channel_dim="band")
    with pytest.raises(ValueError, match="where has the dimensions"):
        group_norm(field, 2, channel_dim="band", where=xr.DataArray(np.ones(2, bool), dims="level"))
