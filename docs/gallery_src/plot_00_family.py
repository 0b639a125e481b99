"""
One family: who shares a mean and a variance
============================================

Each panel is the same array of 4 samples (rows) and 12 channels (columns); every cell stands for all positions of one
channel of one sample. Cells of one colour are normalized with the same mean and variance. The drawing is not made by
hand: it is read off `cugn` itself, by asking which cells change when one of them does.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

import cugn

N, C, S = 4, 12, 8
x = np.random.default_rng(0).normal(size=(N, C, S))
labels = [0, 1, 2, 0, 1, 2, 2, 1, 0, 2, 1, 0]

norms = {
    "batch_norm(x)": cugn.batch_norm,
    "layer_norm(x)": cugn.layer_norm,
    "instance_norm(x)": cugn.instance_norm,
    "group_norm(x, 3)": lambda x: cugn.group_norm(x, 3),
    "group_norm(x, labels)": lambda x: cugn.group_norm(x, labels),
    "group_norm(x, 3, batch_axis=None)": lambda x: cugn.group_norm(x, 3, batch_axis=None),
}


def sharing(norm):
    """Number each cell by the set of cells whose result changes when it does."""
    sets = {}
    numbers = np.empty((N, C), dtype=int)
    before = norm(x)
    for n, c in np.ndindex(N, C):
        changed = x.copy()
        changed[n, c, 0] += 5
        affected = (norm(changed) != before).any(axis=2)
        numbers[n, c] = sets.setdefault(affected.tobytes(), len(sets))
    return numbers


# %%
# Colours are numbered so that neighbours differ.

palette = ListedColormap(["#0072B2", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7"])
fig, panels = plt.subplots(2, 3, figsize=(9, 3.3))
for axes, (title, norm) in zip(panels.flat, norms.items(), strict=True):
    numbers = sharing(norm)
    colours = numbers % 7 if numbers.max() < 14 else (numbers % C + 3 * (numbers // C)) % 7
    axes.pcolormesh(colours, cmap=palette, vmin=0, vmax=6, edgecolor="white", linewidth=1.5)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, family="monospace", fontsize=9, weight="normal")
panels[0, 0].set_ylabel("samples")
panels[1, 0].set_ylabel("samples")
for axes in panels[1]:
    axes.set_xlabel("channels")
plt.show()
