"""CUDA C++ kernels on the CPU: faults found, traffic counted. See README.md."""

from .build import BuildError, missing_tools
from .faults import KINDS, Fault, SimtFault
from .memory import Array
from .module import BufferTraffic, Flow, Kernel, Launch, Limits, RawModule, Settings, raw_kernel, recorded, using

__all__ = [
    "KINDS",
    "Array",
    "BufferTraffic",
    "BuildError",
    "Fault",
    "Flow",
    "Kernel",
    "Launch",
    "Limits",
    "RawModule",
    "Settings",
    "SimtFault",
    "missing_tools",
    "raw_kernel",
    "recorded",
    "using",
]
