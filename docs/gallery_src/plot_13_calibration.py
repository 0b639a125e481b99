r"""
Calibration without a calibration lamp
======================================

A detector that is read out through several amplifiers sees :math:`g_a x + o_a`: each amplifier has a gain and an
offset, and both drift from exposure to exposure. If the scene has the same statistics under each of them, its mean and
variance are the calibration: group norm over the pixels of one amplifier of one exposure divides gain and offset out.
The scene is the Hubble deep field, cut into the stripes of eight amplifiers.
"""

import matplotlib.pyplot as plt
import numpy as np
from gallery_style import BATCH, GROUP
from skimage import data

import cugn

sky = data.hubble_deep_field().mean(axis=2)[:832, :992]
sky = np.log1p(sky)  # a few bright galaxies would otherwise be most of the variance
exposures, amplifiers = 6, 8
rng = np.random.default_rng(0)
gains = rng.lognormal(0, 0.4, (exposures, amplifiers))
offsets = rng.normal(0, 1.5, (exposures, amplifiers))

stripes = np.stack(np.split(sky, amplifiers, axis=1))  # (C, H, W): an amplifier is a channel
x = gains[:, :, None, None] * stripes + offsets[:, :, None, None]

calibrated = {
    "as read": x,
    "batch_norm: one calibration for all exposures": cugn.batch_norm(x),
    "instance_norm: each amplifier of each exposure": cugn.instance_norm(x, eps=0),
}

fig, rows = plt.subplots(3, 2, figsize=(9, 10.5))
for row, (name, y) in zip(rows, calibrated.items(), strict=True):
    whole = np.concatenate(y[0], axis=1), np.concatenate(y[3], axis=1)
    low, high = np.percentile(np.stack(whole), (2, 99.5))
    for ax, picture, exposure in zip(row, whole, (0, 3), strict=True):
        ax.imshow(picture, vmin=low, vmax=high, cmap="inferno")
        ax.set(xticks=[], yticks=[], xlabel=f"exposure {exposure}")
    row[0].set_title(name)
plt.show()

# %%
# What is left of gain and offset: the standard deviation over the exposures of each stripe's own scale and level.
# Batch norm keeps the drift; per exposure it is gone to rounding, whatever its size.

drifts = np.linspace(0, 1, 6)
left = {"batch": [], "instance": []}
for drift in drifts:
    drifting = np.exp(drift * np.log(gains))[:, :, None, None] * (stripes - stripes.mean(axis=(1, 2), keepdims=True))
    for name, y in (("batch", cugn.batch_norm(drifting, eps=0)), ("instance", cugn.instance_norm(drifting, eps=0))):
        scale = y.std(axis=(2, 3))
        left[name].append((scale.std(axis=0) / scale.mean(axis=0)).mean())
g = np.exp(drifts[:, None, None] * np.log(gains))
formula = (g.std(axis=1) / g.mean(axis=1)).mean(axis=1)

fig, ax = plt.subplots(figsize=(7.2, 3.2))
ax.plot(0.4 * drifts, formula, color=BATCH, lw=1.2, label="std(g) / mean(g)")
ax.plot(0.4 * drifts, left["batch"], "o", color=BATCH, label="batch_norm")
ax.plot(0.4 * drifts, left["instance"], "s", color=GROUP, label=f"instance_norm: below {max(left['instance']):.0e}")
ax.set_xlabel("drift of the gains (standard deviation of log g)")
ax.set_ylabel("drift that is left")
ax.grid(True)
ax.legend()
plt.show()
