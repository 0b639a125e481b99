r"""
From layer norm to instance norm
================================

With one group, group norm is layer norm; with as many groups as channels it is instance norm. Between them lies a
family. The squared difference at both ends is exactly zero, since it is the same computation.
"""

import matplotlib.pyplot as plt
import numpy as np
from gallery_style import GROUP, INSTANCE, LAYER
from skimage import data

import cugn

photograph = np.moveaxis(data.astronaut(), -1, 0)[None].astype(np.float64)
# Sixteen channels as a first layer of a network sees them: each colour's pixels, shifted differences, squares.
shifts = [(0, 1), (1, 0), (0, 4), (4, 0)]
channels = [photograph] + [photograph - np.roll(photograph, shift, axis=(2, 3)) for shift in shifts]
x = np.concatenate([*channels, photograph.mean(axis=1, keepdims=True)], axis=1)
C = x.shape[1]
divisors = [G for G in range(1, C + 1) if C % G == 0]

of_layer, of_instance = cugn.layer_norm(x), cugn.instance_norm(x)
to_layer = [np.sum((cugn.group_norm(x, G) - of_layer) ** 2) / x.size for G in divisors]
to_instance = [np.sum((cugn.group_norm(x, G) - of_instance) ** 2) / x.size for G in divisors]
assert to_layer[0] == 0.0
assert to_instance[-1] == 0.0
print(f"G = 1: {to_layer[0]}, G = {C}: {to_instance[-1]}")

# %%
# The channel of vertical edges under each of them: among all channels it is faint, by itself it has unit variance.

fig = plt.figure(figsize=(9, 5.4))
top, bottom = fig.subfigures(2, 1, height_ratios=(1.15, 1))
for ax, G in zip(top.subplots(1, len(divisors)), divisors, strict=True):
    ax.imshow(cugn.group_norm(x, G)[0, 4], vmin=-2, vmax=2)
    ax.set_axis_off()
    ax.set_title(f"G = {G}" + {1: " (layer norm)", C: " (instance norm)"}.get(G, ""), fontsize=9)
ax = bottom.subplots()
ax.plot(divisors, to_layer, "o-", color=LAYER, label="mean squared difference to layer norm")
ax.plot(divisors, to_instance, "s-", color=INSTANCE, label="to instance norm")
ax.plot([1, C], [0, 0], "o", ms=13, mfc="none", mec=GROUP, mew=2, label="exactly 0")
ax.set_xscale("log", base=2)
ax.set_xticks(divisors, [str(G) for G in divisors])
ax.minorticks_off()
ax.set_xlabel("number of groups G")
ax.grid(axis="y")
ax.legend()
plt.show()
