"""Kernel text to functions: one module for each set of options, built by NVRTC on first use, kept for each device."""

from __future__ import annotations

import threading
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ..plan import FLOATS, INTEGERS
from .config import Device

__all__ = ["KERNELS", "Specialisation", "device_properties", "kernel", "options", "source", "specialisations"]

FOLDER = Path(__file__).parent / "kernels"

HEADERS = ("types.cuh", "box.cuh", "activation.cuh", "moments.cuh")
"""In front of every kernel file: NVRTC then needs no include path, and CuPy's cache key covers them."""

KERNELS = {
    "forward": ("forward", "moments", "merge_moments", "merge_labels", "apply_statistics"),
    "backward": (
        *("backward", "backward_sums", "merge_backward", "backward_apply"),
        "parameter_gradients",
    ),
    "double_backward": ("second_sums", "merge_second", "second_apply"),
    "copy": ("copy_elements", "convert_elements"),
}
"""Kernels of each file."""

ACTIVATIONS = {None: "IDENTITY", "relu": "RELU", "silu": "SILU", "gelu": "GELU", "gelu_tanh": "GELU_TANH"}

FLAGS = ("--std=c++17", "--fmad=false", "-default-device")
"""No contraction: a vector's body and its scalar edge give the same bits, and every fma is written out."""


class Specialisation(NamedTuple):
    """One module: a kernel file under one set of options."""

    file: str
    x_dtype: str
    y_dtype: str
    activation: str | None = None
    masked: bool = False
    vector_channels: int = 16
    """Channels that an aligned 16-byte vector of the output lies in at most: 1, 2, or 16 for any number."""
    tangent: bool = False
    """Whether weight and bias have tangents: the jvp, and the double backward."""
    double: bool = False
    """Arithmetic in float64: for float64 arrays or weights, and for moments."""


@lru_cache(maxsize=8)
def source(file: str) -> str:
    """Text of one module: the headers, then the file, with the lines of each under its own name."""
    names = (*HEADERS, f"{file}.cu")
    return "\n".join(f'#line 1 "{name}"\n{(FOLDER / name).read_text(encoding="utf-8")}' for name in names)


def options(specialisation: Specialisation) -> tuple[str, ...]:
    """NVRTC options of a module."""
    s = specialisation
    return (
        *FLAGS,
        f"-DX_DTYPE={s.x_dtype.upper()}",
        f"-DY_DTYPE={s.y_dtype.upper()}",
        f"-DREAL_IS_DOUBLE={int(s.double)}",
        f"-DACTIVATION={ACTIVATIONS[s.activation]}",
        f"-DMASKED={int(s.masked)}",
        f"-DVECTOR_CHANNELS={s.vector_channels}",
        f"-DTANGENT={int(s.tangent)}",
    )


def specialisations() -> list[Specialisation]:
    """Every module that the engine can build."""
    found = [Specialisation("copy", "float32", "float32")]
    pairs = [(x, x) for x in FLOATS] + [(x, y) for x in INTEGERS for y in FLOATS]
    flags = list(product((False, True), (1, 2, 16), (False, True)))
    for (x, y), activation, (masked, channels, double) in product(pairs, ACTIVATIONS, flags):
        if double or "float64" not in (x, y):
            found.append(Specialisation("forward", x, y, activation, masked, channels, False, double))
            if x == y:
                found += [
                    Specialisation("backward", x, y, activation, masked, channels, tangent, double)
                    for tangent in (False, True)
                ]
                if double:
                    found.append(Specialisation("double_backward", x, y, activation, masked, channels, True, True))
    return found


_lock = threading.Lock()
_kernels: dict[tuple[int, Specialisation, str], Any] = {}


def kernel(specialisation: Specialisation, name: str, shared_bytes: int) -> Any:
    """The kernel for the current device, allowed to use `shared_bytes` of dynamic shared memory."""
    import cupy

    device = cupy.cuda.runtime.getDevice()
    key = (device, specialisation, name)
    function = _kernels.get(key)
    if function is None:
        with _lock:
            try:
                module = cupy.RawModule(code=source(specialisation.file), options=options(specialisation))
                function = module.get_function(name)
            except (ImportError, OSError, RuntimeError) as error:
                if "nvrtc" not in str(error).lower():
                    raise
                raise RuntimeError(
                    "the CUDA kernels are compiled by NVRTC, which CuPy could not load: install CUDA's NVRTC library, "
                    "or CuPy with it (pip install 'cugn[cuda13]' or 'cugn[cuda12]' and nvidia-cuda-nvrtc)"
                ) from error
            _kernels[key] = function
    if shared_bytes > 48 << 10 and function.max_dynamic_shared_size_bytes < shared_bytes:
        function.max_dynamic_shared_size_bytes = device_properties(device).shared_per_block
    return function


@lru_cache(maxsize=64)
def device_properties(device: int) -> Device:
    """What config.py asks about a device."""
    import cupy

    try:
        attributes = cupy.cuda.Device(device).attributes
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(
            f"no CUDA device {device}: is there a GPU, and a driver new enough for this CuPy?"
        ) from error
    return Device(shared_per_block=int(attributes["MaxSharedMemoryPerBlockOptin"]))
