r"""
Accuracy far from zero
======================

Statistics of values with a large mean are where implementations go wrong. Three ways to normalize float32 values of
mean a and standard deviation 1, and how far the results are from a computation in extended precision:

- moments :math:`E[x^2] - E[x]^2` in float32;
- mean, then deviations from it, in float32;
- `cugn.group_norm`: statistics in float64, the mean in two float32 parts when it is applied.
"""

import matplotlib.pyplot as plt
import numpy as np
from gallery_style import BATCH, GROUP, NONE

import cugn

rng = np.random.default_rng(0)
noise = rng.normal(size=(1, 8, 4096))
eps = np.float32(1e-5)


def one_pass(x):
    x = x.reshape(1, 2, -1)
    mean = x.mean(axis=2, keepdims=True, dtype=np.float32)
    var = np.mean(x * x, axis=2, keepdims=True, dtype=np.float32) - mean * mean
    return ((x - mean) / np.sqrt(np.maximum(var, 0) + eps)).reshape(1, 8, -1)


def two_pass(x):
    x = x.reshape(1, 2, -1)
    mean = x.mean(axis=2, keepdims=True, dtype=np.float32)
    d = x - mean
    var = np.mean(d * d, axis=2, keepdims=True, dtype=np.float32)
    return (d / np.sqrt(var + eps)).reshape(1, 8, -1)


def exact(x):
    x = x.astype(np.longdouble).reshape(1, 2, -1)
    d = x - x.mean(axis=2, keepdims=True)
    return (d / np.sqrt((d * d).mean(axis=2, keepdims=True) + np.longdouble(eps))).reshape(1, 8, -1)


ways = {"E[x²] - E[x]²": one_pass, "mean, then deviations": two_pass, "cugn": lambda x: cugn.group_norm(x, 2, eps=eps)}
means = 10.0 ** np.arange(0, 7, 0.5)
errors = {name: [] for name in ways}
for a in means:
    x = (a + noise).astype(np.float32)
    for name, way in ways.items():
        errors[name].append(float(np.abs(way(x) - exact(x)).max()))

# %%
# The line is :math:`3\,\mathrm{eps(float32)} \max |y|`, the bound that cugn keeps for every finite input.

fig, ax = plt.subplots(figsize=(7.2, 4))
for (name, values), marker, colour in zip(errors.items(), "^os", (BATCH, NONE, GROUP), strict=True):
    ax.loglog(means, values, marker + "-", color=colour, lw=1, label=name)
bound = 3 * np.finfo(np.float32).eps * 4.5
ax.axhline(bound, color=GROUP, lw=1, ls="--")
ax.text(means[-1], bound * 1.4, "bound", color=GROUP, ha="right")
ax.set_xlabel("mean / standard deviation")
ax.set_ylabel("largest error of y (|y| < 4.5)")
ax.grid(True)
ax.legend()
plt.show()
assert max(errors["cugn"]) < bound
