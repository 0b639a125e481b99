"""Promise: torch's own sample, reference and error inputs (OpInfo) of the norms pass, at tighter tolerances."""

from __future__ import annotations

import warnings
from typing import Any

import migration
import numpy as np
import oracle
import pytest

import cugn

pytest.importorskip("expecttest", reason="expecttest is not installed (torch's own test suite needs it)")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from torch.testing._internal.common_methods_invocations import op_db

OPERATORS = ("group_norm", "instance_norm", "layer_norm", "batch_norm")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
INFO = {name: next(op for op in op_db if op.name == f"nn.functional.{name}") for name in OPERATORS}
AT_LEAST = {"group_norm": 21, "instance_norm": 9, "layer_norm": 6, "batch_norm": 12}


def _samples(name: str, dtype: Any) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return [*INFO[name].sample_inputs("cpu", dtype), *INFO[name].reference_inputs("cpu", dtype)]


def _double(a: Any) -> Any:
    return a.detach().double() if isinstance(a, torch.Tensor) else a


def _numpy(a: Any) -> Any:
    return a.detach().numpy() if isinstance(a, torch.Tensor) else a


def _of_any_eps(x: np.ndarray, groups: int, weight: Any, bias: Any, eps: float, batch_axis: Any = 0) -> np.ndarray:
    """Group norm under an eps that may be negative, which only a caller who takes the statistics himself may have."""
    if eps >= 0:
        return cugn.group_norm(x, groups, weight, bias, eps=eps, batch_axis=batch_axis)
    m = cugn.moments(x, groups, batch_axis=batch_axis)
    with np.errstate(invalid="ignore"):
        rstd = 1 / np.sqrt(m.var + eps)
    return cugn.normalize(x, m.mean, rstd, groups, weight, bias, batch_axis=batch_axis)


def group_norm(x: np.ndarray, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> np.ndarray:
    """torch.nn.functional.group_norm."""
    return _of_any_eps(x, groups, weight, bias, eps)


def layer_norm(x: np.ndarray, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> np.ndarray:
    """torch.nn.functional.layer_norm."""
    if eps >= 0:
        return migration.torch_layer_norm(x, shape, weight, bias, eps)
    channels = int(np.prod(shape))
    flat = [None if v is None else v.reshape(channels) for v in (weight, bias)]
    return _of_any_eps(x.reshape(-1, channels), 1, *flat, eps).reshape(x.shape)


def instance_norm(
    x: np.ndarray,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> np.ndarray:
    """torch.nn.functional.instance_norm."""
    assert use_input_stats
    return migration.torch_instance_norm(x, weight, bias, eps)


def batch_norm(
    x: np.ndarray,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> np.ndarray:
    """torch.nn.functional.batch_norm."""
    if x.ndim == 1:  # torch takes an empty vector, which has no axis of channels
        return cugn.batch_norm(x, channel_axis=0, batch_axis=None, eps=eps)
    if training:
        return cugn.batch_norm(x, weight, bias, eps=eps)
    return migration.torch_batch_norm_inference(x, running_mean, running_var, weight, bias, eps)


CALLS = {"group_norm": group_norm, "instance_norm": instance_norm, "layer_norm": layer_norm, "batch_norm": batch_norm}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_samples(name: str, dtype: str) -> None:
    """Sample and reference inputs: y is torch's float64 result, to a few roundings (torch allows 1e-5)."""
    samples = _samples(name, DTYPES[dtype])
    assert len(samples) >= 2 * AT_LEAST[name]
    for sample in samples:
        args, kwargs = [_double(a) for a in sample.args], {k: _double(v) for k, v in sample.kwargs.items()}
        expected = INFO[name].op(_double(sample.input).clone(), *args, **kwargs).numpy()
        y = CALLS[name](
            _numpy(sample.input), *map(_numpy, sample.args), **{k: _numpy(v) for k, v in sample.kwargs.items()}
        )
        assert y.dtype == dtype
        assert y.shape == expected.shape
        # 4 roundings of the largest value; in float64 torch's own count too, of which M = 125 and more are summed
        finite = np.abs(expected[np.isfinite(expected)])
        largest = max(1.0, float(finite.max())) if finite.size else 1.0
        tolerance = (4 if dtype == "float32" else 64) * oracle.epsilon(dtype) * largest
        np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", ["group_norm", "instance_norm", "layer_norm", "batch_norm"])
def test_gradients_of_samples(name: str) -> None:
    """The backward of every sample with finite results is torch's autograd, in float64."""
    count = 0
    for sample in _samples(name, torch.float64):
        kwargs = dict(sample.kwargs)
        if sample.input.ndim < 2 or kwargs.get("eps", 1) < 0 or (name == "batch_norm" and not kwargs.get("training")):
            continue
        weight, bias = (
            (sample.args[1:3] if name != "batch_norm" else sample.args[2:4]) if len(sample.args) > 2 else (None, None)
        )
        weight, bias = kwargs.get("weight", weight), kwargs.get("bias", bias)
        if name == "layer_norm" and len(sample.args[0]) > 1:
            continue  # weights of an element: the samples with one axis have the same arithmetic
        leaves = [v for v in (sample.input, weight, bias) if v is not None]
        leaves = [v.detach().clone().requires_grad_() for v in leaves]
        x, w, b = (*leaves, None, None)[:3] if bias is None or weight is not None else (leaves[0], None, leaves[1])
        eps = kwargs.get("eps", 1e-5)
        axes = {}
        if name == "group_norm":
            y = torch.nn.functional.group_norm(x, sample.args[0], w, b, eps)
        elif name == "instance_norm":
            y = torch.nn.functional.instance_norm(x, None, None, w, b, eps=eps)
        elif name == "layer_norm":
            y = torch.nn.functional.layer_norm(x, sample.args[0], w, b, eps)
            axes = {"channel_axis": -1, "batch_axis": tuple(range(x.ndim - 1))}
        else:
            y = torch.nn.functional.batch_norm(x, None, None, w, b, True, 0.1, eps)
        dy = torch.rand_like(y)
        wanted = torch.autograd.grad(y, [v for v in (x, w, b) if v is not None], dy)
        groups = [sample.args[0]] if name == "group_norm" else []
        result = getattr(cugn, f"{name}_backward")(
            _numpy(dy), _numpy(x), *groups, _numpy(w), _numpy(b), eps=eps, **axes
        )
        given = [d for d, v in zip(result, (x, w, b), strict=True) if v is not None]
        for value, expected in zip(given, wanted, strict=True):
            size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
            # one element a group: torch's dx is a difference of values of 1/sqrt(eps), ours is zero
            np.testing.assert_allclose(value, expected.numpy(), rtol=0, atol=1e-12 * size * eps**-0.5)
        count += 1
    assert count >= 4


@pytest.mark.parametrize("name", OPERATORS)
def test_error_inputs(name: str) -> None:
    """What is an error for torch is a ValueError here."""
    errors = list(INFO[name].error_inputs("cpu")) if INFO[name].error_inputs_func else []
    assert len(errors) == (2 if name == "group_norm" else 0)
    for error in errors:
        sample = error.sample_input
        with pytest.raises(ValueError, match=r"axes|divide"):
            CALLS[name](_numpy(sample.input), *map(_numpy, sample.args), **sample.kwargs)
