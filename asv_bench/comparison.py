"""Group norm by each library: operation -> library -> a function that prepares a problem and returns the call to time.

A prepared call holds its data already and returns the library's own arrays, computed to the end. Every library is used
in its fastest correct form; what that is stands with each function. Nothing here imports a library before it is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import ml_dtypes
import numpy as np

Array = Any
Call = Callable[[], tuple[Array, ...]]
EPS = 1e-5


class Unsupported(Exception):
    """What a library has no function for, or not for this dtype or layout."""


@dataclass(frozen=True)
class Problem:
    """One group norm, by its shape as channels-first; the same values for every library and layout."""

    shape: tuple[int, ...]
    groups: int
    dtype: str
    layout: str
    """"channels_first" or "channels_last"."""

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    @property
    def channel_axis(self) -> int:
        return 1 if self.layout == "channels_first" else -1

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    @property
    def positions(self) -> int:
        return math.prod(self.shape[2:])

    def _drawn(self, seed: int) -> np.ndarray:
        """N(0, 1) in the layout's memory order; a long sequence that repeats, as drawing 400 MB takes seconds."""
        values = np.random.default_rng(seed).standard_normal(min(math.prod(self.shape), 1_000_003), dtype=np.float32)
        array = np.resize(values.astype(self.numpy_dtype), self.shape)
        return array if self.channel_axis == 1 else np.ascontiguousarray(np.moveaxis(array, 1, -1))

    @cached_property
    def x(self) -> np.ndarray:
        return self._drawn(1)

    @cached_property
    def dy(self) -> np.ndarray:
        return self._drawn(2)

    @cached_property
    def weight(self) -> np.ndarray:
        return np.random.default_rng(3).uniform(0.5, 2, self.shape[1]).astype(self.numpy_dtype)

    @cached_property
    def bias(self) -> np.ndarray:
        return np.random.default_rng(4).uniform(-1, 1, self.shape[1]).astype(self.numpy_dtype)


def copy_forward(problem: Problem) -> Call:
    """One thread's ``np.copyto``: what reading x and writing y costs at least."""
    x, out = problem.x, np.zeros_like(problem.x)
    return lambda: np.copyto(out, x) or (out,)


def copy_backward(problem: Problem) -> Call:
    """One thread's ``np.add(x, dy)``; of float32 in the same bytes for 16-bit types, whose addition NumPy emulates."""
    x, dy = problem.x.reshape(-1), problem.dy.reshape(-1)
    if x.itemsize == 2:
        x, dy = (array[: x.size // 2 * 2].view(np.float32) for array in (x, dy))
    out = np.zeros_like(x)
    return lambda: (np.add(x, dy, out=out),)


def cugn_forward(problem: Problem, fresh: bool = False) -> Call:
    """The public function, its result written into ``out`` or freshly allocated."""
    import cugn

    arguments = (problem.x, problem.groups, problem.weight, problem.bias)
    options = {"eps": EPS, "channel_axis": problem.channel_axis, "out": None if fresh else np.zeros_like(problem.x)}
    return lambda: (cugn.group_norm(*arguments, **options),)


def cugn_backward(problem: Problem, fresh: bool = False) -> Call:
    """The public function with the forward's statistics, as in training."""
    import cugn

    arguments = (problem.x, problem.groups, problem.weight, problem.bias)
    options: dict[str, Any] = {"channel_axis": problem.channel_axis}
    _, mean, rstd = cugn.group_norm_forward(*arguments, eps=EPS, **options)
    options |= {"mean": mean, "rstd": rstd, "out": None if fresh else np.zeros_like(problem.x)}
    return lambda: tuple(cugn.group_norm_backward(problem.dy, *arguments, **options))


def _torch(problem: Problem, array: np.ndarray) -> Array:
    """A tensor of shape (N, C, ...) over the same memory; torch then takes the strides as its channels-last format."""
    import torch

    if problem.dtype == "bfloat16":
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor.movedim(problem.channel_axis, 1) if array.ndim > 1 else tensor


def _is_layer_norm(problem: Problem) -> bool:
    return problem.groups == problem.positions == 1


def torch_forward(problem: Problem) -> Call:
    """``torch.nn.functional.group_norm`` in inference mode: nothing is recorded for a backward.

    One group without positions is a layer norm, for which torch has kernels of its own.
    """
    import torch

    x, weight, bias = (_torch(problem, array) for array in (problem.x, problem.weight, problem.bias))
    norm, of = torch.nn.functional.group_norm, problem.groups
    if _is_layer_norm(problem):
        norm, of = torch.nn.functional.layer_norm, problem.shape[1:]

    def call() -> tuple[Array]:
        with torch.inference_mode():
            return (norm(x, of, weight, bias, EPS),)

    return call


def torch_backward(problem: Problem) -> Call:
    """The kernel that autograd ends in, called directly: autograd's own time is not counted."""
    import torch

    x, dy, weight, bias = (_torch(problem, a) for a in (problem.x, problem.dy, problem.weight, problem.bias))
    sizes = (problem.shape[0], problem.shape[1], problem.positions, problem.groups)
    aten = torch.ops.aten
    with torch.inference_mode():
        if _is_layer_norm(problem):
            of = problem.shape[1:]
            _, mean, rstd = aten.native_layer_norm(x, of, weight, bias, EPS)
            backward = partial(aten.native_layer_norm_backward, dy, x, of, mean, rstd, weight, bias)
        else:
            _, mean, rstd = aten.native_group_norm(x, weight, bias, *sizes, EPS)
            backward = partial(aten.native_group_norm_backward, dy, x, mean, rstd, weight, *sizes)

    def call() -> tuple[Array, ...]:
        with torch.inference_mode():
            return tuple(backward([True, True, True]))

    return call


def _jax_group_norm(problem: Problem) -> Callable[..., Array]:
    """Group norm as flax has it by default: E[x^2] - E[x]^2 in float32 at least, its fastest form."""
    import jax
    import jax.numpy as jnp

    if problem.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    n = problem.shape[0]
    last = problem.layout == "channels_last"
    grouped = (n, problem.positions, problem.groups, -1) if last else (n, problem.groups, -1, problem.positions)
    per_channel = (1, 1, problem.groups, -1) if last else (1, problem.groups, -1, 1)
    axes = (1, 3) if last else (2, 3)
    at_least = jnp.float64 if problem.dtype == "float64" else jnp.float32

    def group_norm(x: Array, weight: Array, bias: Array) -> Array:
        v = x.reshape(grouped).astype(at_least)
        mean = v.mean(axes, keepdims=True)
        var = jnp.maximum((v * v).mean(axes, keepdims=True) - mean * mean, 0)
        scale = jax.lax.rsqrt(var + EPS) * weight.reshape(per_channel).astype(at_least)
        y = (v - mean) * scale + bias.reshape(per_channel).astype(at_least)
        return y.reshape(x.shape).astype(x.dtype)

    return group_norm


def jax_forward(problem: Problem) -> Call:
    """Compiled by ``jax.jit``, waited for."""
    import jax

    group_norm = jax.jit(_jax_group_norm(problem))
    x, weight, bias = (jax.numpy.asarray(a) for a in (problem.x, problem.weight, problem.bias))
    return lambda: (group_norm(x, weight, bias).block_until_ready(),)


def jax_backward(problem: Problem) -> Call:
    """The pullback that ``jax.vjp`` returns, compiled: what the forward saved is at hand, as in training."""
    import jax

    group_norm = _jax_group_norm(problem)
    x, dy, weight, bias = (jax.numpy.asarray(a) for a in (problem.x, problem.dy, problem.weight, problem.bias))
    _, pullback = jax.jit(lambda *arrays: jax.vjp(group_norm, *arrays))(x, weight, bias)
    apply = jax.jit(lambda pullback, dy: pullback(dy))
    return lambda: tuple(jax.block_until_ready(apply(pullback, dy)))


def onnxruntime_forward(problem: Problem) -> Call:
    """The GroupNormalization node of opset 21, input and output bound to memory that stays."""
    if problem.layout == "channels_last":
        raise Unsupported("ONNX has channels-first only")
    if problem.dtype == "bfloat16":
        raise Unsupported("no bfloat16 from NumPy")
    import onnx
    import onnxruntime

    kind = onnx.helper.np_dtype_to_tensor_dtype(problem.numpy_dtype)
    shapes = {"x": problem.x.shape, "weight": problem.weight.shape, "bias": problem.bias.shape}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("GroupNormalization", [*shapes], ["y"], num_groups=problem.groups, epsilon=EPS)],
        "group_norm",
        [onnx.helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()],
        [onnx.helper.make_tensor_value_info("y", kind, problem.x.shape)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own exception types are not public
        raise Unsupported(str(error).partition("\n")[0]) from error
    binding = session.io_binding()
    for name in shapes:
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(getattr(problem, name)))
    y = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(problem.x))
    binding.bind_ortvalue_output("y", y)
    return lambda: session.run_with_iobinding(binding) or (y,)


def onnxruntime_backward(problem: Problem) -> Call:
    raise Unsupported("no gradients")


TABLE: dict[str, dict[str, Callable[[Problem], Call]]] = {
    "forward": {
        "copy": copy_forward,
        "cugn": cugn_forward,
        "cugn fresh": partial(cugn_forward, fresh=True),
        "torch": torch_forward,
        "jax": jax_forward,
        "onnxruntime": onnxruntime_forward,
    },
    "backward": {
        "copy": copy_backward,
        "cugn": cugn_backward,
        "cugn fresh": partial(cugn_backward, fresh=True),
        "torch": torch_backward,
        "jax": jax_backward,
        "onnxruntime": onnxruntime_backward,
    },
}
PEERS = ("torch", "jax", "onnxruntime")


def as_numpy(problem: Problem, result: Array) -> np.ndarray:
    """A result as a NumPy array; those of x's size as channels-first, whatever their memory order."""
    module = type(result).__module__.partition(".")[0]
    if module == "torch":  # which shows channels-last arrays as channels-first already
        return result.float().numpy() if problem.dtype == "bfloat16" else result.numpy()
    array = result.numpy() if module == "onnxruntime" else np.asarray(result)
    return np.moveaxis(array, problem.channel_axis, 1) if array.ndim > 1 else array
