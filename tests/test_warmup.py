"""warmup: afterwards a call of its kind loads and compiles nothing, whatever its sizes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from libraries import subprocess_environment

import cugn

AFTER = """
import itertools
import sys

import numpy as np

import cugn
from cugn.cpu import calls

dtype, layout, activation, labels, masks, operations = sys.argv[1:]
activation, labels, masks = None if activation == "None" else activation, labels == "True", masks == "True"
operations = operations.split(",")
cugn.warmup(dtype, operations, layout, activations=activation, labels=labels, masks=masks)


def refuse(name, *arguments, **options):
    raise AssertionError(f"{name} was not loaded")


loaded, calls.loaded = calls.loaded, refuse
from cugn import engines
from cugn.cpu import helpers

assert engines._recent is not None
assert cugn.get_num_threads() == 1 or helpers.watching.cache_info().currsize
rng = np.random.default_rng(0)
count = 0
shapes = {
    "table": [(1, 40), (3, 64), (200, 96), (5000, 32)],
    "channels_first": [(1, 8, 40), (5, 12, 7, 7), (2, 32, 33, 65), (1, 4, 300, 300), (64, 6, 64)],
    "channels_last": [(1, 40, 8), (5, 7, 7, 12), (2, 33, 65, 32), (1, 300, 300, 4), (64, 64, 6)],
}
shapes["strided"] = shapes["channels_first"]
axis = -1 if layout == "channels_last" else 1
for shape in shapes[layout]:
    C = shape[axis]
    for divisor, labelled, masked in itertools.product((1, 2, C // 8 or 1), (False, True), (False, True)):
        if labelled and not labels or masked and not masks or C % divisor:
            continue
        groups = list(rng.permutation(np.arange(C) % divisor)) if labelled else divisor
        size = 2 if layout == "strided" else 1
        x, dy, u = (
            rng.normal(size=(*shape[:-1], shape[-1] * size)).astype(dtype)[..., ::size] for _ in range(3)
        )
        where = rng.random(shape) < 0.7 if masked else None
        weight = np.ones(C, dtype)
        options = {"channel_axis": axis, "activation": activation}
        G = 1 + max(groups) if labelled else groups
        mean, rstd = np.zeros((len(x), G)), np.ones((len(x), G))
        calls = {
            "forward": lambda: cugn.group_norm(x, groups, weight, where=where, **options),
            "backward": lambda: (
                cugn.group_norm_backward(dy, x, groups, weight, where=where, **options),
                cugn.group_norm_backward(dy, x, groups, weight, mean=mean, rstd=rstd, where=where, **options),
            ),
            "jvp": lambda: cugn.group_norm_jvp(u, x, groups, weight, where=where, **options),
            "double_backward": lambda: cugn.group_norm_double_backward(
                u, dy, x, groups, weight, where=where, **options
            ),
            "moments": lambda: cugn.moments(x, groups, channel_axis=axis, where=where),
            "normalize": lambda: cugn.normalize(x, mean, rstd, groups, weight, **options),
            "backward_sums": lambda: cugn.backward_sums(dy, x, mean, rstd, groups, weight, **options),
            "backward_apply": lambda: cugn.backward_apply(
                dy, x, mean, rstd, mean, rstd, groups, weight, where=where, **options
            ),
        }
        for operation in operations:
            calls[operation]()
            count += 1
print(count)
"""


ALL = "forward,backward,jvp,double_backward,moments,normalize,backward_sums,backward_apply"


@pytest.mark.parametrize(
    ("dtype", "layout", "activation", "labels", "masks", "operations"),
    [
        ("float32", "channels_first", "None", False, False, ALL),
        ("float32", "channels_last", "None", False, False, "backward"),
        ("float32", "table", "None", False, False, "forward,backward"),
        ("float64", "channels_first", "None", True, True, ALL),
        ("float32", "strided", "None", False, False, "forward"),
        ("float64", "table", "silu", True, True, ALL),
        ("float32", "channels_last", "silu", True, True, ALL),
    ],
)
@pytest.mark.rare(when=lambda activation: activation == "silu")
def test_nothing_is_left_to_load(
    dtype: str, layout: str, activation: str, labels: bool, masks: bool, operations: str
) -> None:
    """All operations, sizes from a few elements to some that several threads share."""
    arguments = [dtype, layout, activation, str(labels), str(masks), operations]
    done = subprocess.run(
        [sys.executable, "-c", AFTER, *arguments], env=subprocess_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 10


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("float33",), {}, "dtypes holds 'float33': it must be one of 'float16'"),
        (("float32", "forwards"), {}, "operations holds 'forwards'"),
        (("float32", ("forward", "back")), {}, "operations holds 'back'"),
        (("float32", "forward", "NCHW"), {}, "layouts holds 'NCHW'"),
        ((), {"activations": ("relu", "swish")}, "activations holds 'swish'"),
        (((),), {}, "dtypes is empty"),
    ],
)
def test_names_are_checked_first(arguments: tuple, options: dict, message: str) -> None:
    """A wrong name is an error before anything is compiled."""
    with pytest.raises(ValueError, match=message):
        cugn.warmup(*arguments, **options)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """A bar, or lines, on standard error when asked for; nothing otherwise."""
    cugn.warmup("float32", "forward", "channels_first")
    assert capsys.readouterr().err == ""
    cugn.warmup("float32", ("forward", "moments"), "channels_first", progress=True)
    assert "100" in capsys.readouterr().err


def test_integers_have_a_forward_alone() -> None:
    """What images cannot be asked for is left out, not an error; nothing is loaded twice."""
    cugn.warmup("uint8", ("forward", "backward"), "channels_first")
    assert cugn.warmup("uint8", "forward", "channels_first") == 0
    assert cugn.warmup("uint8", ("backward", "jvp"), "channels_first") == 0
