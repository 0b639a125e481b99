r"""
Each photograph has its own contrast
====================================

The same picture at five exposures, :math:`s_n x` with :math:`s_n` from 0.1 to 2. Group norm takes the scale of each
picture from the picture, so that :math:`s_n` divides out exactly. Batch norm divides all of them by one average scale,
which fits none: what is left is the spread :math:`\mathrm{std}(s)/\mathrm{mean}(s)`.
"""

import matplotlib.pyplot as plt
import numpy as np
from gallery_style import BATCH, GROUP
from skimage import data

import cugn

photograph = np.moveaxis(data.chelsea(), -1, 0).astype(np.float64)
contrasts = np.array([0.1, 0.3, 0.6, 1.0, 2.0])
x = contrasts.reshape(-1, 1, 1, 1) * photograph
of_batch, of_group = cugn.batch_norm(x, eps=0), cugn.group_norm(x, 1, eps=0)

fig, rows = plt.subplots(3, 5, figsize=(9, 4.3))
for row, pictures, title in zip(
    rows, (x / 255, of_batch / 4 + 0.5, of_group / 4 + 0.5), ("as taken", "batch norm", "group norm"), strict=True
):
    for ax, picture in zip(row, pictures, strict=True):
        ax.imshow(np.clip(np.moveaxis(picture, 0, -1), 0, 1))
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    row[0].set_ylabel(title)
for ax, s in zip(rows[0], contrasts, strict=True):
    ax.set_title(f"s = {s:g}", fontsize=10, weight="normal", loc="center")
plt.show()

# %%
# What is left of the contrast, measured on the pictures and from the formula, for exposures of more and more spread:

spreads = np.linspace(0, 2, 9)
left = {"batch": [], "group": []}
expected = []
for spread in spreads:
    s = np.exp(spread * np.linspace(-1, 1, 5))
    scaled = s.reshape(-1, 1, 1, 1) * (photograph - photograph.mean(axis=(1, 2), keepdims=True))
    expected.append(s.std() / s.mean())
    for name, y in (("batch", cugn.batch_norm(scaled, eps=0)), ("group", cugn.group_norm(scaled, 1, eps=0))):
        std = y.std(axis=(1, 2, 3))
        left[name].append(std.std() / std.mean())

fig, ax = plt.subplots(figsize=(7.2, 3.4))
ax.plot(expected, expected, "-", color=BATCH, lw=1.2, label="std(s) / mean(s)")
ax.plot(expected, left["batch"], "o", color=BATCH, label="batch norm, measured")
ax.plot(expected, left["group"], "s", color=GROUP, label=f"group norm: at most {max(left['group']):.0e}")
ax.set_xlabel("std(s) / mean(s) of the exposures")
ax.set_ylabel("the same of what comes out")
ax.grid(True)
ax.legend()
plt.show()
