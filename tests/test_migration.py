"""Promise: the migration page's calls give what the calls of the other libraries give, defaults included."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import migration
import numpy as np
import pytest

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (4, 8, 6, 5)).astype(np.float32)
LAST = np.ascontiguousarray(X.transpose(0, 2, 3, 1))
WEIGHT, BIAS, MEAN = RNG.normal(size=(3, 8)).astype(np.float32)
VAR = RNG.uniform(0.5, 2, size=8).astype(np.float32)
# The originals compute in float32: at mean/std = 1.5 some ten roundings of values up to 10.
CLOSE = {"rtol": 0, "atol": 1e-5}


def _imported(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


def _torch(*arrays: np.ndarray) -> list[Any]:
    torch = _imported("torch")
    return [torch.from_numpy(a.copy()) for a in arrays]


def _defaults(function: Any) -> dict[str, Any]:
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


def test_torch_group_norm() -> None:
    """The same arguments and defaults."""
    F = _imported("torch.nn.functional")
    x, w, b = _torch(X, WEIGHT, BIAS)
    np.testing.assert_allclose(migration.torch_group_norm(X, 4, WEIGHT, BIAS), F.group_norm(x, 4, w, b), **CLOSE)
    np.testing.assert_allclose(migration.torch_group_norm(X, 4), F.group_norm(x, 4), **CLOSE)
    assert _defaults(migration.torch_group_norm)["eps"] == _defaults(F.group_norm)["eps"]


def test_torch_layer_norm() -> None:
    """Over the last axis, and over several."""
    F = _imported("torch.nn.functional")
    last, w, b = _torch(LAST, WEIGHT, BIAS)
    ours = migration.torch_layer_norm_last_axis(LAST, WEIGHT, BIAS)
    np.testing.assert_allclose(ours, F.layer_norm(last, (8,), w, b), **CLOSE)
    weight, bias = RNG.normal(size=(2, 6, 5, 8)).astype(np.float32)
    w, b = _torch(weight, bias)
    np.testing.assert_allclose(
        migration.torch_layer_norm(LAST, (6, 5, 8), weight, bias), F.layer_norm(last, (6, 5, 8), w, b), **CLOSE
    )
    np.testing.assert_allclose(migration.torch_layer_norm(LAST, (5, 8)), F.layer_norm(last, (5, 8)), **CLOSE)


def test_torch_instance_norm() -> None:
    """Statistics of the input."""
    F = _imported("torch.nn.functional")
    x, w, b = _torch(X, WEIGHT, BIAS)
    ours = migration.torch_instance_norm(X, WEIGHT, BIAS)
    np.testing.assert_allclose(ours, F.instance_norm(x, weight=w, bias=b), **CLOSE)


@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_torch_batch_norm(momentum: float) -> None:
    """Training, with the running statistics, and inference."""
    F = _imported("torch.nn.functional")
    x, w, b, mean, var = _torch(X, WEIGHT, BIAS, MEAN, VAR)
    wanted = F.batch_norm(x, mean, var, w, b, training=True, momentum=momentum)
    y, new_mean, new_var = migration.torch_batch_norm_training(X, MEAN, VAR, WEIGHT, BIAS, momentum)
    for ours, theirs in ((y, wanted), (new_mean, mean), (new_var, var)):
        np.testing.assert_allclose(ours, theirs, **CLOSE)
    ours = migration.torch_batch_norm_inference(X, MEAN, VAR, WEIGHT, BIAS)
    np.testing.assert_allclose(ours, F.batch_norm(x, *_torch(MEAN, VAR), w, b), **CLOSE)


def test_flax() -> None:
    """Channels last, epsilon 1e-6."""
    linen = _imported("flax.linen")
    assert (linen.GroupNorm().epsilon, linen.LayerNorm().epsilon, linen.InstanceNorm().epsilon) == (1e-6,) * 3
    parameters = {"params": {"scale": WEIGHT, "bias": BIAS}}
    for module, ours in (
        (linen.GroupNorm(num_groups=4), migration.flax_group_norm(LAST, 4, WEIGHT, BIAS)),
        (linen.LayerNorm(), migration.flax_layer_norm(LAST, WEIGHT, BIAS)),
        (linen.InstanceNorm(), migration.flax_instance_norm(LAST, WEIGHT, BIAS)),
    ):
        np.testing.assert_allclose(ours, module.apply(parameters, LAST), **CLOSE)


def test_jax_standardize() -> None:
    """jax's own layer norm without weights."""
    nn = _imported("jax.nn")
    for axis in (-1, 1):
        ours = migration.jax_standardize(X, axis)
        # jax takes E[x^2] - E[x]^2, which loses (mean/std)^2 here up to 1e3 roundings
        np.testing.assert_allclose(ours, nn.standardize(X, axis=axis), rtol=0, atol=1e-4)
    assert _defaults(migration.jax_standardize)["epsilon"] == _defaults(nn.standardize)["epsilon"]


def test_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels last, epsilon 1e-3."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    _imported("torch")
    keras = _imported("keras")
    for layer, ours in (
        (keras.layers.GroupNormalization(groups=4), migration.keras_group_normalization(LAST, 4)),
        (keras.layers.GroupNormalization(groups=-1), migration.keras_group_normalization(LAST, -1)),
        (keras.layers.LayerNormalization(), migration.keras_layer_normalization(LAST)),
    ):
        np.testing.assert_allclose(ours, np.asarray(layer(LAST).detach()), **CLOSE)


def test_chainer() -> None:
    """The definition that chainer computes (the package no longer installs on current NumPy)."""
    grouped = X.astype(float).reshape(4 * 2, -1)
    hat = (grouped - grouped.mean(1, keepdims=True)) / np.sqrt(grouped.var(1, keepdims=True) + 1e-5)
    wanted = hat.reshape(X.shape) * WEIGHT[:, None, None] + BIAS[:, None, None]
    np.testing.assert_allclose(migration.chainer_group_normalization(X, 2, WEIGHT, BIAS), wanted, **CLOSE)


@pytest.mark.parametrize("act", ["", "silu"])
def test_apex(act: str) -> None:
    """Group norm and SiLU in one call, against the two calls in torch."""
    F = _imported("torch.nn.functional")
    x, w, b = _torch(X, WEIGHT, BIAS)
    wanted = F.group_norm(x, 4, w, b)
    wanted = F.silu(wanted) if act else wanted
    np.testing.assert_allclose(migration.apex_group_norm(X, 4, WEIGHT, BIAS, act=act), wanted, **CLOSE)


def _onnx(operator: str, inputs: dict[str, np.ndarray], opset: int, outputs: int = 1, **attributes: Any) -> list[Any]:
    """Results of ONNX Runtime."""
    onnx, runtime = _imported("onnx"), _imported("onnxruntime")
    names = [f"out{i}" for i in range(outputs)]
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node(operator, list(inputs), names, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(k, kind, v.shape) for k, v in inputs.items()],
        [helper.make_tensor_value_info(n, kind, None) for n in names],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)


def test_onnx() -> None:
    """Against ONNX Runtime; ONNX's own cases are in conformance/."""
    three = {"X": X, "scale": WEIGHT, "B": BIAS}
    (y,) = _onnx("GroupNormalization", three, 21, num_groups=4)
    np.testing.assert_allclose(migration.onnx_group_normalization(X, WEIGHT, BIAS, num_groups=4), y, **CLOSE)
    (y,) = _onnx("InstanceNormalization", three, 21)
    np.testing.assert_allclose(migration.onnx_instance_normalization(X, WEIGHT, BIAS), y, **CLOSE)
    (y,) = _onnx("LayerNormalization", {**three, "X": LAST}, 21)
    np.testing.assert_allclose(migration.onnx_layer_normalization(LAST, WEIGHT, BIAS)[0], y, **CLOSE)
    (y,) = _onnx("BatchNormalization", {**three, "mean": MEAN, "var": VAR}, 15)
    np.testing.assert_allclose(migration.onnx_batch_normalization(X, WEIGHT, BIAS, MEAN, VAR)[0], y, **CLOSE)
    (y,) = _onnx("MeanVarianceNormalization", {"X": X}, 13)
    np.testing.assert_allclose(migration.onnx_mean_variance_normalization(X), y, **CLOSE)


def test_scipy_and_sklearn() -> None:
    """z-scores."""
    stats, preprocessing = _imported("scipy.stats"), _imported("sklearn.preprocessing")
    table = X.reshape(4, -1).T.astype(np.float64)
    for axis in (0, 1):
        np.testing.assert_allclose(migration.scipy_zscore(table, axis), stats.zscore(table, axis), rtol=0, atol=1e-13)
    np.testing.assert_allclose(migration.sklearn_scale(table), preprocessing.scale(table), rtol=0, atol=1e-13)


def test_every_call_is_tested() -> None:
    """Each function of the table is named in a test of this file."""
    source = inspect.getsource(inspect.getmodule(test_every_call_is_tested))  # type: ignore[arg-type]
    for name, value in vars(migration).items():
        if inspect.isfunction(value):
            assert f"migration.{name}" in source, name
