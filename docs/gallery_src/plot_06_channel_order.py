"""
The order of the channels
=========================

Group norm takes neighbouring channels together, so that their order is part of the model. A permutation that keeps
the groups permutes the result; one that mixes them changes it. Batch norm treats each channel by itself and does not
mind. With labels for groups the order stops to matter: permute them along, and the result is the same to the bit.
"""

import matplotlib.pyplot as plt
import numpy as np
from gallery_style import BATCH, GROUP

import cugn

rng = np.random.default_rng(0)
C, G = 16, 4
x = rng.normal(size=(4, C, 30, 30)) * np.linspace(1, 6, C).reshape(C, 1, 1)
labels = np.arange(C) // (C // G)

inside = np.concatenate([rng.permutation(4) + 4 * g for g in range(G)])
whole = np.concatenate([np.arange(4) + 4 * g for g in rng.permutation(G)])


def swapped(pairs):
    """Exchange this number of pairs of channels between the first and the last two groups."""
    order = np.arange(C)
    order[:pairs], order[C - pairs :] = np.arange(C - pairs, C), np.arange(pairs)
    return order


def change(norm, order):
    """Largest difference between normalizing the permuted channels and permuting the normalized ones."""
    return np.abs(norm(np.take(x, order, axis=1)) - norm(x)[:, order]).max()


# %%
# How far is "normalize, then permute" from "permute, then normalize"?

permutations = {"within groups": inside, "whole groups": whole}
permutations |= {f"{pairs} pair{'s' * (pairs > 1)} across": swapped(pairs) for pairs in (1, 2, 3, 6)}
floor = 1e-17
rows = {
    "group_norm(x, 4)": [change(lambda a: cugn.group_norm(a, G), order) for order in permutations.values()],
    "batch_norm(x)": [change(cugn.batch_norm, order) for order in permutations.values()],
}
with_labels = []
for order in permutations.values():
    along = cugn.group_norm(np.take(x, order, axis=1), labels[order])
    with_labels.append(np.abs(along - cugn.group_norm(x, labels)[:, order]).max())
rows["group_norm(x, labels), labels permuted along"] = with_labels
for name, values in rows.items():
    print(f"{name:46s}", *(f"{value:9.1e}" for value in values))

fig, ax = plt.subplots(figsize=(8, 3.6))
position = np.arange(len(permutations))
styles = (("s", GROUP, -0.12), ("o", BATCH, 0.0), ("D", "#009E73", 0.12))
for (name, values), (marker, colour, offset) in zip(rows.items(), styles, strict=True):
    ax.vlines(position + offset, floor, np.maximum(values, floor), color=colour, lw=1.5)
    ax.plot(position + offset, np.maximum(values, floor), marker, color=colour, label=name)
ax.axhspan(floor / 3, 1e-14, color="#eeeeee", zorder=0)
ax.text(-0.3, 3e-14, "rounding; on the ground: exactly 0", va="bottom", fontsize=9, color="#555555")
ax.set_yscale("log")
ax.set_ylim(floor / 3, 1e9)  # room for the legend
ax.set_xticks(position, list(permutations))
ax.set_ylabel("largest change of y")
ax.legend(fontsize=9, loc="upper left", ncols=1)
plt.show()
