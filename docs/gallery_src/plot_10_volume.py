"""
A volume with a background
==========================

Magnetic resonance images have no unit: each scan has a gain of its own, and three quarters of the voxels are air. Here
is a head (an echo-planar series of 128 × 96 × 24 voxels that nibabel ships with its tests), normalized in its
16-bit integers as they are, with and without a mask of the head.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import nibabel
import numpy as np
from gallery_style import BATCH, GROUP, NONE
from nibabel.testing import data_path
from scipy import ndimage

import cugn

series = np.asanyarray(nibabel.load(Path(data_path) / "example4d.nii.gz").dataobj)
x = np.moveaxis(series, -1, 0)[:, None]  # two scans of one channel: (N, C, X, Y, Z), still int16
print(x.shape, x.dtype)

# The head: the largest connected piece that is brighter than the air, its holes filled.
bright = ndimage.gaussian_filter(x[0, 0].astype(np.float32), 1.5) > 60
pieces, _ = ndimage.label(bright)
head = ndimage.binary_fill_holes(pieces == np.bincount(pieces.flat)[1:].argmax() + 1)
print(f"{100 * head.mean():.0f} % of the voxels are head")

# %%
# ``where=`` broadcasts against x. Only the head enters mean and variance; all voxels are normalized with them.

plain, masked = cugn.group_norm(x, 1), cugn.group_norm(x, 1, where=head)
for name, y in (("without a mask", plain), ("with the mask", masked)):
    print(f"{name}: the head has mean {y[0, 0][head].mean():+.3f}, standard deviation {y[0, 0][head].std():.3f}")

fig = plt.figure(figsize=(9, 6))
top, bottom = fig.subfigures(2, 1, height_ratios=(1.25, 1))
for i, (row, y) in enumerate(zip(top.subplots(2, 6), (plain, masked), strict=True)):
    for ax, k in zip(row, range(2, 24, 4), strict=True):
        ax.imshow(np.where(head, y[0, 0], np.nan)[16:112, :, k].T, origin="lower", vmin=-2.5, vmax=2.5)
        ax.set(xticks=[], yticks=[], facecolor="black")
    row[0].set_ylabel(("no mask", "where=head")[i])
ax = bottom.subplots()
bins = np.linspace(-3, 5, 161)
for y, colour, label in ((plain, BATCH, "no mask"), (masked, GROUP, "where=head")):
    ax.hist(y[0, 0][head], bins, histtype="step", color=colour, lw=2, label=label)
ax.axvline(0, color="black", lw=1)
ax.set_xlabel("normalized intensity of the voxels of the head")
ax.set_ylabel("voxels")
ax.legend()
plt.show()

# %%
# The size of the field of view must not matter: pad the volume with more and more air. Without the mask the head's
# intensities drift, with it they keep their values.

padding = np.arange(0, 65, 8)
means = {"no mask": [], "where=head": []}
for p in padding:
    around = [(0, 0), (0, 0), (p, p), (p, p), (0, 0)]
    wide, inside = np.pad(x[:1], around), np.pad(head, around[2:])
    means["no mask"].append(cugn.group_norm(wide, 1)[0, 0][inside].mean())
    means["where=head"].append(cugn.group_norm(wide, 1, where=inside)[0, 0][inside].mean())

# The formula: a fraction f of head (mean a, variance v) in air of value 0 has the mean f a.
f = head.sum() / ((128 + 2 * padding) * (96 + 2 * padding) * 24)
a, v = x[0, 0][head].mean(), x[0, 0][head].var()
formula = (1 - f) * a / np.sqrt(f * v + f * (1 - f) * a**2)

fig, ax = plt.subplots(figsize=(7.2, 3.2))
ax.plot(padding, formula, color=NONE, lw=1.2, label="formula, air = 0")
ax.plot(padding, means["no mask"], "o", color=BATCH, label="no mask")
ax.plot(padding, means["where=head"], "s", color=GROUP, label="where=head")
ax.set_xlabel("voxels of air added on each side")
ax.set_ylabel("mean of the head")
ax.grid(axis="y")
ax.legend()
plt.show()

# %%
# A volume that does not fit into memory is normalized in slabs: merge their moments, then apply them to each.

slabs = np.array_split(x, 4, axis=4)
inside = np.array_split(head, 4, axis=2)
whole = cugn.moments(slabs[0], 1, where=inside[0])
for slab, part in zip(slabs[1:], inside[1:], strict=True):
    whole = whole.merge(cugn.moments(slab, 1, where=part))
assembled = np.concatenate([cugn.normalize(slab, whole.mean, whole.rstd(1e-5), 1) for slab in slabs], axis=4)
print(f"largest difference to the whole volume at once: {np.abs(assembled - masked).max():.1e}")
