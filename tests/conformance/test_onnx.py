"""Promise: ONNX's own backend cases of the normalization operators pass, at tolerances a hundred times tighter."""

from __future__ import annotations

import warnings
from typing import Any

import migration
import numpy as np
import oracle
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed (the extra `conformance`)")

OPERATORS = {
    "GroupNormalization": migration.onnx_group_normalization,
    "InstanceNormalization": migration.onnx_instance_normalization,
    "LayerNormalization": migration.onnx_layer_normalization,
    "BatchNormalization": migration.onnx_batch_normalization,
    "MeanVarianceNormalization": migration.onnx_mean_variance_normalization,
}
COUNTS = {
    "GroupNormalization": 2,
    "InstanceNormalization": 2,
    "LayerNormalization": 19,
    "BatchNormalization": 4,
    "MeanVarianceNormalization": 1,
}


def _cases() -> list[Any]:
    """The node cases of one of these operators; their expansions into elementary ones have the same data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        cases = load_model_tests(kind="node")
    single = [c for c in cases if c.model is not None and len(c.model.graph.node) == 1]
    return [c for c in single if c.model.graph.node[0].op_type in OPERATORS]


CASES = _cases()


def test_none_is_left_out() -> None:
    """All cases of each operator are here: none is beyond what cugn can say."""
    found = [case.model.graph.node[0].op_type for case in CASES]
    for operator, count in COUNTS.items():
        assert found.count(operator) >= count, operator


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case: Any) -> None:
    """Every output, of the stated shape and dtype."""
    node = case.model.graph.node[0]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert case.data_sets
    for inputs, outputs in case.data_sets:
        result = OPERATORS[node.op_type](*inputs, **attributes)
        results = result if isinstance(result, tuple) else (result,)
        for value, expected in zip(results, outputs, strict=False):
            assert value.shape == expected.shape
            # ONNX computes the expected values in float32: some ten roundings of values as large as the largest one,
            # where its own tolerance is a relative 1e-3.
            tolerance = 12 * oracle.epsilon(expected.dtype) * max(1, float(np.abs(expected).max()))
            assert tolerance < case.rtol * max(1, float(np.abs(expected).max())) / 100
            np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance)
        assert len(results) >= len(outputs)
        assert results[0].dtype == outputs[0].dtype
