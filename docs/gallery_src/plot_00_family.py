"""
One family: who shares a mean and a variance
============================================

Each panel is the same array of 4 samples (rows) and 12 channels (columns); every cell stands for all positions of one
channel of one sample. Cells of one colour are normalized with the same mean and variance. The drawing is not made by
hand: it is read off `cugn` itself, by asking which cells change when one of them does.
"""

import matplotlib.pyplot as plt
import numpy as np

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
# Each set gets a colour of its own.

fig, panels = plt.subplots(3, 2, figsize=(6.4, 4.9))
for axes, (title, norm) in zip(panels.flat, norms.items(), strict=True):
    numbers = sharing(norm)
    sets = numbers.max() + 1
    shuffled = np.random.default_rng(4).permutation(sets)
    axes.pcolormesh(shuffled[numbers], cmap="turbo", vmin=-0.05 * sets, vmax=sets, edgecolor="white", linewidth=1.5)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, family="monospace", fontsize=9.5, weight="normal")
for axes in panels[:, 0]:
    axes.set_ylabel("samples")
for axes in panels[-1]:
    axes.set_xlabel("channels")
plt.show()
