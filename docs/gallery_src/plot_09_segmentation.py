"""
Detection and segmentation with one or two images in a batch
============================================================

Detection and segmentation train on large images, of which one or two fit on a device: too few for batch norm. Here a
small network (two convolutions, each normalized, and one logistic unit for each pixel) learns to tell coins from the
background of a photograph (``coins.png``, which scikit-image ships), from crops that each have an exposure of their
own. What it learned is asked about the part of the photograph that it has not seen.
"""

import matplotlib.pyplot as plt
import numpy as np
from gallery_style import BATCH, GROUP
from scipy import ndimage
from skimage import data, filters, segmentation
from train_digits import Convolution, Normalization

photograph = data.coins()
markers = np.where(photograph < 30, 1, np.where(photograph > 150, 2, 0))
coins = ndimage.binary_opening(
    ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(photograph), markers) == 2), iterations=3
)
coins = coins[::2, ::2]
x = ((photograph / 255) ** 2.2).astype(np.float32)[::2, ::2]  # light, not its encoding: an exposure is a factor
SEEN = 115  # columns; the others are the test image
CROP, CHANNELS, CROPS = 32, 8, 640  # every run sees the same number of crops


def network(norm, rng):
    """Layers from one channel to the logit of each pixel."""
    layers = []
    for inputs in (1, CHANNELS):
        layers += [
            Convolution(inputs, CHANNELS, 1, np, rng, np.float32),
            Normalization(norm, CHANNELS, np, np.float32),
        ]
    return [*layers, Convolution(CHANNELS, 1, 1, np, rng, np.float32)]


def predict(layers, image, training=False):
    """Logits of images (N, H, W, 1)."""
    for layer in layers:
        image = layer.forward(image, training)
    return image[..., 0]


def train(norm, batch, seed):
    """A network after stochastic gradient descent with momentum on random crops."""
    rng = np.random.default_rng(seed)
    layers = network(norm, rng)
    velocity = {}
    steps = CROPS // batch
    for step in range(steps):
        corners = zip(rng.integers(0, x.shape[0] - CROP, batch), rng.integers(0, SEEN - CROP, batch), strict=True)
        crops = [(slice(i, i + CROP), slice(j, j + CROP)) for i, j in corners]
        exposure = 2 ** rng.uniform(-2, 2, (batch, 1, 1, 1)).astype(np.float32)
        logits = predict(layers, exposure * np.stack([x[crop] for crop in crops])[..., None], training=True)
        truth = np.stack([coins[crop] for crop in crops])
        gradient = (((1 + np.tanh(logits / 2)) / 2 - truth) / truth.size)[..., None].astype(np.float32)
        for layer in reversed(layers):
            gradient = layer.backward(gradient)
        rate = 0.05 * batch * (1 - step / steps)
        for k, layer in enumerate(layers):
            for i, (value, slope) in enumerate(zip(layer.parameters, layer.gradients, strict=True)):
                velocity[k, i] = 0.9 * velocity.get((k, i), 0) - rate * slope
                value += velocity[k, i]
    return layers


def overlap(found, truth):
    """Intersection over union."""
    return np.sum(found & truth) / np.sum(found | truth)


exposures = 2.0 ** np.arange(-2, 3)
test = (exposures[:, None, None, None] * x[None, :, SEEN:, None]).astype(np.float32)
truth = coins[:, SEEN:]
batches, seeds = (1, 2, 4, 8), 3
scores, masks = {}, {}
for norm in ("group", "batch"):
    for batch in batches:
        for seed in range(seeds):
            found = predict(train(norm, batch, seed), test) > 0
            scores[norm, batch, seed] = [overlap(mask, truth) for mask in found]
            masks[norm, batch] = found
for norm in ("group", "batch"):
    means = [np.mean([scores[norm, batch, seed] for seed in range(seeds)]) for batch in batches]
    print(f"{norm} norm: " + ", ".join(f"{m:.2f} at batch {b}" for m, b in zip(means, batches, strict=True)))

# %%
# Intersection over union of the coins that were found and those that are there, over five exposures of the test image
# and three seeds. Group norm takes its statistics from the image in hand.

fig, ax = plt.subplots()
for norm, colour in (("group", GROUP), ("batch", BATCH)):
    values = np.array([[np.mean(scores[norm, batch, seed]) for seed in range(seeds)] for batch in batches])
    ax.fill_between(batches, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.2, lw=0)
    ax.plot(batches, values.mean(axis=1), "o-", color=colour, label=f"{norm} norm")
ax.set_xscale("log", base=2)
ax.set_xticks(batches, [str(batch) for batch in batches])
ax.set(xlabel="crops in a batch", ylabel="intersection over union", ylim=(0, 1))
ax.grid(axis="y")
ax.legend()
plt.show()

# %%
# What the networks trained with two crops in a batch find in the test image, at three exposures. Detection asks how
# many of the coins are met: by a connected piece that overlaps with one coin by more than half.

pieces, count = ndimage.label(truth)


def detected(mask):
    """Coins that are met by a piece of their own."""
    candidates, _ = ndimage.label(mask)
    met = 0
    for coin in range(1, count + 1):
        labels = np.unique(candidates[pieces == coin])
        met += any(overlap(candidates == label, pieces == coin) > 0.5 for label in labels if label)
    return met


fig, axes = plt.subplots(3, 3, figsize=(5, 7.4))
for row, k in zip(axes, (0, 2, 4), strict=True):
    row[0].imshow(np.clip(test[k, ..., 0], 0, 1) ** (1 / 2.2), vmin=0, vmax=1)
    row[0].set_ylabel(f"exposure {exposures[k]:g}")
    for ax, norm, colour in zip(row[1:], ("group", "batch"), (GROUP, BATCH), strict=True):
        ax.imshow(masks[norm, 2][k], vmin=0, vmax=1)
        ax.contour(truth, [0.5], colors=colour, linewidths=1.5)
        ax.set_xlabel(f"{detected(masks[norm, 2][k])} of {count} coins")
for ax, title in zip(axes[0], ("test image", "group norm", "batch norm"), strict=True):
    ax.set_title(title)
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
plt.show()
