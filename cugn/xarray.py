"""xarray: group and batch norm by the names of dimensions, with coordinates and attributes kept."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import xarray as xr

from . import functional
from .family import batch_norm as _batch_norm

__all__ = ["batch_norm", "group_norm"]


def group_norm(
    x: xr.DataArray,
    groups: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    channel_dim: Hashable,
    batch_dim: Hashable | Iterable[Hashable] | None = None,
    where: xr.DataArray | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> xr.DataArray:
    """Normalize groups of channels of each sample of a labelled array: `cugn.group_norm` by dimension names.

    Parameters
    ----------
    x : xarray.DataArray
        Of NumPy, CuPy or Dask arrays; the latter are normalized lazily.
    groups : int, sequence of int, or DataArray
        As in `cugn.group_norm`. Labels of any kind (names, numbers with gaps) in a DataArray along `channel_dim`, such
        as a coordinate: channels of the same label are a group.
    weight, bias : array or DataArray, optional
        One value for each channel.
    channel_dim : hashable
        Name of the channels' dimension.
    batch_dim : hashable, iterable of hashable or None, optional
        Name or names of the samples' dimensions; None for a single sample. All other dimensions are spatial.
    where : DataArray of bool, optional
        Elements that enter the statistics; its dimensions are some of x's.
    eps, activation
        As in `cugn.group_norm`.

    Returns
    -------
    xarray.DataArray
        Of x's dimensions, coordinates, name and attributes.

    Raises
    ------
    TypeError, ValueError
        As `cugn.group_norm`, and for dimensions that x does not have.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> from cugn.xarray import group_norm
    >>> bands = {"band": ["red", "green", "blue", "near", "short"], "kind": ("band", ["v", "v", "v", "i", "i"])}
    >>> image = xr.DataArray(np.random.default_rng(0).normal(9, 2, (5, 20, 20)), dims=("band", "y", "x"), coords=bands)
    >>> y = group_norm(image, image.kind, channel_dim="band")
    >>> y.groupby("kind").std(...).round(3).values.tolist()
    [1.0, 1.0]
    """
    if isinstance(groups, xr.DataArray):
        labels = _along(groups, channel_dim, "groups")
        groups = np.unique(np.asarray(labels), return_inverse=True)[1]
    options = {"where": where, "eps": eps, "activation": activation}
    return _apply(functional.group_norm, x, (groups,), weight, bias, channel_dim, batch_dim, options)


def batch_norm(
    x: xr.DataArray,
    weight: Any = None,
    bias: Any = None,
    *,
    channel_dim: Hashable,
    where: xr.DataArray | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> xr.DataArray:
    """Normalize each channel over all other dimensions: `cugn.batch_norm` by dimension names.

    Parameters
    ----------
    x, weight, bias, channel_dim, where, eps, activation
        As in `group_norm`.

    Returns
    -------
    xarray.DataArray
        Of x's dimensions, coordinates, name and attributes.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> from cugn.xarray import batch_norm
    >>> x = xr.DataArray(np.random.default_rng(0).normal(9, 2, (4, 50, 3)), dims=("time", "site", "variable"))
    >>> bool(np.allclose(batch_norm(x, channel_dim="variable").mean(("time", "site")), 0))
    True
    """
    options = {"where": where, "eps": eps, "activation": activation}
    return _apply(_batch_norm, x, (), weight, bias, channel_dim, None, options)


def _apply(
    function: Any,
    x: xr.DataArray,
    groups: tuple[Any, ...],
    weight: Any,
    bias: Any,
    channel_dim: Hashable,
    batch_dim: Hashable | Iterable[Hashable] | None,
    options: dict[str, Any],
) -> xr.DataArray:
    """Call a function of arrays on a DataArray's."""
    if not isinstance(x, xr.DataArray):
        raise TypeError(f"x is a {type(x).__name__}: it must be an xarray.DataArray")
    names = () if batch_dim is None else (batch_dim,) if isinstance(batch_dim, str) else tuple(_iterable(batch_dim))
    for name in (channel_dim, *names):
        if name not in x.dims:
            raise ValueError(f"x has the dimensions {x.dims}: {name!r} is none of them")
    where = options.pop("where")
    masks = () if where is None else (where,)
    if where is not None and not set(where.dims) <= set(x.dims):
        raise ValueError(f"where has the dimensions {where.dims}: they must be some of x's, {x.dims}")

    def on_arrays(array: Any, *mask: Any) -> Any:
        return function(
            array,
            *groups,
            _along(weight, channel_dim, "weight"),
            _along(bias, channel_dim, "bias"),
            channel_axis=x.dims.index(channel_dim),
            batch_axis=tuple(x.dims.index(name) for name in names),
            where=mask[0] if mask else None,
            **options,
        )

    result: xr.DataArray = xr.apply_ufunc(on_arrays, x, *masks, dask="allowed", keep_attrs=True, join="exact")
    return result


def _iterable(names: Hashable | Iterable[Hashable]) -> Iterable[Hashable]:
    return names if isinstance(names, Iterable) else (names,)


def _along(values: Any, channel_dim: Hashable, name: str) -> Any:
    """Array of a DataArray along the channels; anything else as it is."""
    if not isinstance(values, xr.DataArray):
        return values
    if values.dims != (channel_dim,):
        raise ValueError(f"{name} has the dimensions {values.dims}: it must have ({channel_dim!r},)")
    return values.data
