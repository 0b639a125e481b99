"""Group normalization and its family (layer, instance, batch norm) for NumPy, CuPy, Dask and array-API arrays."""

from . import diagnostics
from ._version import __version__
from .family import (
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    instance_norm,
    instance_norm_backward,
    instance_norm_forward,
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
)
from .functional import (
    backward_apply,
    backward_sums,
    group_norm,
    group_norm_backward,
    group_norm_double_backward,
    group_norm_forward,
    group_norm_jvp,
    moments,
    normalize,
)
from .moments import Moments
from .results import BackwardSums, GroupNormDoubleGrads, GroupNormForward, GroupNormGrads
from .threads import get_num_threads, set_num_threads
from .warm import warmup

__all__ = [
    "BackwardSums",
    "GroupNormDoubleGrads",
    "GroupNormForward",
    "GroupNormGrads",
    "Moments",
    "__version__",
    "backward_apply",
    "backward_sums",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "diagnostics",
    "get_num_threads",
    "group_norm",
    "group_norm_backward",
    "group_norm_double_backward",
    "group_norm_forward",
    "group_norm_jvp",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "moments",
    "normalize",
    "set_num_threads",
    "warmup",
]
