r"""
Texture without contrast
========================

Instance norm washes the contrast and the brightness of each picture out of its features, and keeps what they have in
common from place to place: the texture. The features here are the responses of a bank of oriented filters, and the
statistics their correlations, the Gram matrix :math:`\hat x \hat x^T / S` that style transfer is made of.
"""

import matplotlib.pyplot as plt
import numpy as np
from gallery_style import BATCH, INSTANCE
from scipy import ndimage
from skimage import data
from skimage.filters import gabor_kernel

import cugn

bank = [gabor_kernel(f, theta=t).real for f in (0.12, 0.25) for t in np.arange(4) * np.pi / 4]


def features(picture):
    """Channels of the picture: the filters' responses, and the picture itself."""
    return np.stack([ndimage.convolve(picture, kernel, mode="reflect") for kernel in bank] + [picture])


# %%
# Three materials; of each, four patches under lamps of different strength, with haze and noise.

rng = np.random.default_rng(0)
materials = ("brick", "grass", "gravel")
patches, contrasts = [], []
for material in materials:
    picture = getattr(data, material)().astype(np.float64)
    for corner in ((0, 0), (0, 256), (256, 0), (256, 256)):
        patch = picture[corner[0] : corner[0] + 128, corner[1] : corner[1] + 128]
        contrasts.append(rng.uniform(0.1, 1))
        patches.append(contrasts[-1] * patch + rng.uniform(0, 100))
x = np.stack([features(patch) for patch in patches])


def gram(y):
    """Products of the channels averaged over positions, (N, C, C)."""
    flat = y.reshape(*y.shape[:2], -1)
    return flat @ flat.transpose(0, 2, 1) / flat.shape[2]


def distances(y):
    g = gram(y).reshape(len(y), -1)
    return np.linalg.norm(g[:, None] - g[None], axis=2)


of_batch, of_instance = distances(cugn.batch_norm(x)), distances(cugn.instance_norm(x))

# %%
# Distances between the patches' Gram matrices. After instance norm, patches of one material are close together and the
# blocks stand out; after batch norm the lamp decides.

fig = plt.figure(figsize=(9, 6))
top, bottom = fig.subfigures(2, 1, height_ratios=(1, 2.4))
for ax, patch in zip(top.subplots(1, 12), patches, strict=True):
    ax.imshow(patch, vmin=0, vmax=255)
    ax.set_axis_off()
for ax, matrix, title in zip(
    bottom.subplots(1, 2), (of_batch, of_instance), ("batch norm", "instance norm"), strict=True
):
    ax.imshow(matrix, cmap="viridis")
    ax.set_xticks([1.5, 5.5, 9.5], materials)
    ax.set_yticks([1.5, 5.5, 9.5], materials, rotation=90, va="center")
    for edge in (3.5, 7.5):
        ax.axhline(edge, color="white", lw=1)
        ax.axvline(edge, color="white", lw=1)
    ax.set_title(f"{title}: distance of Gram matrices")
plt.show()


def nearest_is_alike(matrix):
    nearest = (matrix + np.diag(np.full(len(matrix), np.inf))).argmin(axis=1)
    return np.mean(nearest // 4 == np.arange(len(matrix)) // 4)


for name, matrix in (("batch norm", of_batch), ("instance norm", of_instance)):
    print(f"{name}: the nearest patch is of the same material in {100 * nearest_is_alike(matrix):.0f} % of the cases")

# %%
# The formula: a patch at contrast s has a Gram matrix :math:`s^2` times as large, if nothing divides it out.

s = np.geomspace(0.05, 2, 9)
same = np.stack([features(c * patches[0]) for c in s])
size = {"none": np.linalg.norm(gram(same - same.mean(axis=(2, 3), keepdims=True)), axis=(1, 2))}
size["instance"] = np.linalg.norm(gram(cugn.instance_norm(same, eps=0)), axis=(1, 2))

fig, ax = plt.subplots(figsize=(7.2, 3.2))
reference = size["none"][np.argmin(abs(s - 1))] / s[np.argmin(abs(s - 1))] ** 2
ax.loglog(s, reference * s**2, color=BATCH, lw=1.2, label=r"$\propto s^2$")
ax.loglog(s, size["none"], "o", color=BATCH, label="not normalized")
ax.loglog(s, size["instance"], "s", color=INSTANCE, label="instance norm")
ax.set_xlabel("contrast s of the patch")
ax.set_ylabel("norm of the Gram matrix")
ax.grid(True)
ax.legend()
plt.show()
