"""Kernel text to functions: a module for each kernel and its options, built by NVRTC on first use, for each device."""

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

OF_ELEMENTS = frozenset({"x_dtype", "y_dtype", "activation", "vector_channels", "double"})
GRADIENT = OF_ELEMENTS | {"masked", "tangent"}

KERNELS: dict[str, tuple[str, frozenset[str]]] = {
    "forward": ("forward", OF_ELEMENTS | {"masked", "labelled"}),
    "moments": ("forward", frozenset({"x_dtype", "masked", "double"})),
    "merge_moments": ("forward", frozenset({"double"})),
    "merge_labels": ("forward", frozenset({"double"})),
    "apply_statistics": ("forward", OF_ELEMENTS),
    "backward": ("backward", GRADIENT | {"single", "labelled"}),
    "backward_sums": ("backward", GRADIENT - {"y_dtype", "vector_channels"}),
    "merge_backward": ("backward", frozenset({"tangent", "double"})),
    "backward_apply": ("backward", GRADIENT),
    "parameter_gradients": ("backward", frozenset()),
    "second_sums": ("double_backward", GRADIENT - {"y_dtype", "vector_channels", "tangent"}),
    "merge_second": ("double_backward", frozenset({"activation", "double"})),
    "second_apply": ("double_backward", GRADIENT - {"tangent"}),
    "copy_elements": ("copy", frozenset()),
    "convert_elements": ("copy", frozenset()),
}
"""File of each kernel, and the options that it depends on. NVRTC takes 0.1 to 1.3 s for one of them, a third of what it
takes for the file, and the first call of a kind needs one or three."""

ACTIVATIONS = {None: "IDENTITY", "relu": "RELU", "silu": "SILU", "gelu": "GELU", "gelu_tanh": "GELU_TANH"}

FLAGS = ("--std=c++17", "--fmad=false", "-default-device")
"""No contraction: a vector's body and its scalar edge give the same bits, and every fma is written out."""


class Specialisation(NamedTuple):
    """One module: a kernel under the options that it depends on; the others are as here."""

    kernel: str
    x_dtype: str = "float32"
    y_dtype: str = "float32"
    activation: str | None = None
    masked: bool = False
    vector_channels: int = 1
    """Channels that an aligned 16-byte vector of the output lies in at most: 1, 2, or 16 for any number."""
    single: bool = False
    """Whether a channel of a sample has one element."""
    labelled: bool = False
    """Whether groups are labels, of channels of one element: a box then holds whole samples."""
    tangent: bool = False
    """Whether weight and bias have tangents: the jvp."""
    double: bool = False
    """Arithmetic in float64: for float64 arrays or weights, for moments, and for the double backward."""

    @property
    def file(self) -> str:
        """File that the kernel stands in."""
        return KERNELS[self.kernel][0]

    @classmethod
    def of(cls, kernel: str, **given: Any) -> Specialisation:
        """Module of a kernel in a call of these options."""
        _, used = KERNELS[kernel]
        return cls(kernel, **{name: value for name, value in given.items() if name in used})


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
        f"-DKERNEL_{s.kernel.upper()}",
        f"-DX_DTYPE={s.x_dtype.upper()}",
        f"-DY_DTYPE={s.y_dtype.upper()}",
        f"-DREAL_IS_DOUBLE={int(s.double)}",
        f"-DACTIVATION={ACTIVATIONS[s.activation]}",
        f"-DMASKED={int(s.masked)}",
        f"-DVECTOR_CHANNELS={s.vector_channels}",
        f"-DSINGLE={int(s.single)}",
        f"-DLABELLED={int(s.labelled)}",
        f"-DTANGENT={int(s.tangent)}",
    )


def specialisations() -> list[Specialisation]:
    """Every module that the engine can build."""
    pairs = [(x, x) for x in FLOATS] + [(x, y) for x in INTEGERS for y in FLOATS]
    vectors = ((1, False, False), (2, False, False), (16, False, False), (16, True, False), (16, True, True))
    flags = list(product(pairs, ACTIVATIONS, (False, True), vectors, (False, True), (False, True)))
    found: dict[Specialisation, None] = {}
    for (kernel, (file, _)), ((x, y), activation, masked, (channels, single, labelled), tangent, double) in product(
        KERNELS.items(), flags
    ):
        if file in ("backward", "double_backward") and x != y:
            continue
        if not double and (file == "double_backward" or "float64" in (x, y)):
            continue
        given: dict[str, Any] = {"x_dtype": x, "y_dtype": y, "activation": activation, "masked": masked}
        given |= {"vector_channels": channels, "single": single, "labelled": labelled}
        given |= {"tangent": tangent, "double": double}
        found[Specialisation.of(kernel, **given)] = None
    return list(found)


_lock = threading.Lock()
_kernels: dict[tuple[int, Specialisation], Any] = {}


def kernel(specialisation: Specialisation, shared_bytes: int) -> Any:
    """The kernel for the current device, allowed to use `shared_bytes` of dynamic shared memory."""
    import cupy

    device = cupy.cuda.runtime.getDevice()
    key = (device, specialisation)
    function = _kernels.get(key)
    if function is None:
        with _lock:  # threads that want the same one wait for it
            function = _kernels.get(key)
            if function is None:
                function = _kernels[key] = _built(specialisation)
    if shared_bytes > 48 << 10 and function.max_dynamic_shared_size_bytes < shared_bytes:
        function.max_dynamic_shared_size_bytes = device_properties(device).shared_per_block
    return function


def _built(specialisation: Specialisation) -> Any:
    import cupy

    try:
        module = cupy.RawModule(code=source(specialisation.file), options=options(specialisation))
        return module.get_function(specialisation.kernel)
    except (ImportError, OSError, RuntimeError) as error:
        if "nvrtc" not in str(error).lower():
            raise
        raise RuntimeError(
            "the CUDA kernels are compiled by NVRTC, which CuPy could not load: install CUDA's NVRTC library, "
            "or CuPy with it (pip install 'cugn[cuda13]' or 'cugn[cuda12]' and nvidia-cuda-nvrtc)"
        ) from error


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
