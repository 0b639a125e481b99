r"""
A loud channel squashes a quiet one
===================================

Put a channel with values in -100 ... 100 and one in -0.1 ... 0.1 into one group. The loud one determines the variance,
and the quiet one comes out a thousand times smaller: for the next layer it has all but gone. `cugn.diagnostics` says
so, and proposes groups of similar scale.
"""

import matplotlib.pyplot as plt
import numpy as np
from gallery_style import BATCH, GROUP
from skimage import data

import cugn
from cugn.diagnostics import diagnose, suggest_groups

pictures = [getattr(data, name)()[::2, ::2] / 127.5 - 1.0 for name in ("brick", "grass", "gravel", "camera")]
x = np.stack([s * picture / picture.std() for s, picture in zip((50, 0.05, 50, 0.05), pictures, strict=True)])[None]

found = diagnose(x, 2)
print(found)

# %%
# Neighbours in a group, the default of every library, against labels by scale:

labels = suggest_groups(x, 2)
print("suggested labels:", labels)
print(diagnose(x, labels))

# %%
# The pictures show the normalized channels on one and the same grey scale from -2 to 2.

mixed, by_scale = cugn.group_norm(x, 2)[0], cugn.group_norm(x, labels)[0]
fig, panels = plt.subplots(2, 4, figsize=(9, 5.6), gridspec_kw={"hspace": 0.12})
for row, y, title in ((panels[0], mixed, "groups (0, 1) and (2, 3)"), (panels[1], by_scale, "groups by scale")):
    for c, ax in enumerate(row):
        ax.imshow(y[c], vmin=-2, vmax=2)
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"std {y[c].std():.2g}", loc="right", fontsize=10, weight="normal")
        ax.spines[:].set_visible(True)
        ax.spines[:].set(color=BATCH if y[c].std() < 0.1 else GROUP, linewidth=2)
    row[0].set_ylabel(title, weight="bold")
plt.show()

# %%
# ``plot()`` of the diagnosis, before and after. The dashed line is the formula for two channels whose standard
# deviations are 1000 times apart, :math:`\sqrt{2} \cdot 10^{-3}`.

fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for ax, groups, title in ((axes[0], 2, "groups (0, 1) and (2, 3)"), (axes[1], labels, "groups by scale")):
    diagnose(x, groups).plot(ax)
    ax.axhline(np.sqrt(2) * 1e-3, ls="--", lw=1, color="black")
    ax.set_title(title)
plt.show()
