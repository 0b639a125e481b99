"""Train a small network on handwritten digits with group norm, batch norm and no norm, at several batch sizes.

    python examples/train_digits.py

The network and its training loop are written by hand with NumPy, or with CuPy under ``--device gpu``: one code, in
which ``xp`` is the array library.

The setting: scikit-learn's 8 x 8 digits, each taken under its own exposure (three stops up or down: a factor between
1/8 and 8, drawn once for each image, in the training and in the test set alike). Every run makes the same number of
passes over the data; the learning rate is proportional to the batch size and falls to zero; the split of the data, the
weights and the order depend on the seed alone.

Batch norm estimates the scale of the data from the batch: from 2 images the estimate is mostly noise, and what the
network learns under that noise does not fit the running averages that the test images get. Group norm takes its
statistics from one image and never sees the batch. With ``--exposure 1``, the digits as they come, all alike, two
images tell much more about the others, and batch norm falls by about one point at batch size 2 instead of six.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import cugn

Array = Any  # numpy.ndarray or cupy.ndarray

NORMS = {"group": "group norm", "batch": "batch norm", "none": "no norm"}
BATCH_SIZES = (2, 4, 8, 32)
CLASSES = 10
TRAINED = 1000  # of 1,797 images; the others are the test set
CHANNELS, STRIDES, GROUPS = (8, 16, 32), (1, 2, 2), 4
EPS = 1e-5


class Convolution:
    """3 x 3 convolution of (N, H, W, C) images, padded by one, without a bias."""

    def __init__(self, inputs: int, outputs: int, stride: int, xp: ModuleType, rng: np.random.Generator, dtype: Any):
        kernel = rng.normal(0.0, math.sqrt(2.0 / (9 * inputs)), (9 * inputs, outputs))  # He et al. 2015
        self.xp, self.stride = xp, stride
        self.parameters = [xp.asarray(kernel, dtype=dtype)]
        self.gradients: list[Array] = []

    def _windows(self, shape: tuple[int, ...], dtype: Any) -> tuple[Array, list[Array]]:
        """Zeros for a padded image, and the nine shifted views of it that meet the nine elements of the kernel."""
        samples, height, width, channels = shape
        padded = self.xp.zeros((samples, height + 2, width + 2, channels), dtype=dtype)
        step = self.stride
        return padded, [padded[:, i : i + height : step, j : j + width : step] for i in range(3) for j in range(3)]

    def forward(self, x: Array, training: bool) -> Array:
        padded, windows = self._windows(x.shape, x.dtype)
        padded[:, 1:-1, 1:-1] = x
        patches = self.xp.concatenate(windows, axis=-1)
        self.shape, self.patches = x.shape, patches.reshape(-1, patches.shape[-1])
        return (self.patches @ self.parameters[0]).reshape(*patches.shape[:-1], -1)

    def backward(self, dy: Array) -> Array:
        flat = dy.reshape(-1, dy.shape[-1])
        self.gradients = [self.patches.T @ flat]
        dpatches = (flat @ self.parameters[0].T).reshape(*dy.shape[:-1], -1)
        dpadded, windows = self._windows(self.shape, dy.dtype)
        for window, part in zip(windows, self.xp.split(dpatches, 9, axis=-1), strict=True):
            window += part
        return dpadded[:, 1:-1, 1:-1]


class Normalization:
    """Group norm, batch norm or none, then a scale and a shift of each channel (none: the shift alone), then relu."""

    momentum = 0.1  # share of the newest batch in batch norm's running statistics

    def __init__(self, norm: str, channels: int, xp: ModuleType, dtype: Any):
        weight, bias = xp.ones(channels, dtype=dtype), xp.zeros(channels, dtype=dtype)
        self.norm, self.channels, self.xp = norm, channels, xp
        self.parameters = [bias] if norm == "none" else [weight, bias]
        self.gradients: list[Array] = []
        self.running_mean, self.running_var = xp.zeros(channels), xp.ones(channels)

    def forward(self, x: Array, training: bool) -> Array:
        self.x = x
        if self.norm == "none":
            y = x + self.parameters[0]
        elif self.norm == "group":
            y, *self.statistics = cugn.group_norm_forward(x, GROUPS, *self.parameters, eps=EPS, channel_axis=-1)
        elif training:
            y, *self.statistics = cugn.batch_norm_forward(x, *self.parameters, eps=EPS, channel_axis=-1)
            self._run(*self.statistics, x.size // self.channels)
        else:
            running = (self.running_mean, 1 / self.xp.sqrt(self.running_var + EPS))
            y = cugn.normalize(x, *running, self.channels, *self.parameters, channel_axis=-1, batch_axis=None)
        self.y = self.xp.maximum(y, 0)
        return self.y

    def _run(self, mean: Array, rstd: Array, values: int) -> None:
        """Move batch norm's running statistics towards those of a batch, its variance unbiased."""
        var = (1 / rstd**2 - EPS) * values / (values - 1)
        self.running_mean += self.momentum * (mean - self.running_mean)
        self.running_var += self.momentum * (var - self.running_var)

    def backward(self, dy: Array) -> Array:
        dy = dy * (self.y > 0)
        if self.norm == "none":
            self.gradients = [dy.sum(axis=(0, 1, 2))]
            return dy
        mean, rstd = self.statistics
        known = {"mean": mean, "rstd": rstd, "channel_axis": -1}
        if self.norm == "group":
            dx, *self.gradients = cugn.group_norm_backward(dy, self.x, GROUPS, *self.parameters, **known)
        else:
            dx, *self.gradients = cugn.batch_norm_backward(dy, self.x, *self.parameters, **known)
        return dx


class Classifier:
    """Mean over the positions of the image, then one linear layer."""

    def __init__(self, inputs: int, outputs: int, xp: ModuleType, rng: np.random.Generator, dtype: Any):
        weight = rng.normal(0.0, math.sqrt(1.0 / inputs), (inputs, outputs))
        self.xp = xp
        self.parameters = [xp.asarray(weight, dtype=dtype), xp.zeros(outputs, dtype=dtype)]
        self.gradients: list[Array] = []

    def forward(self, x: Array, training: bool) -> Array:
        self.shape, self.features = x.shape, x.mean(axis=(1, 2))
        return self.features @ self.parameters[0] + self.parameters[1]

    def backward(self, dy: Array) -> Array:
        self.gradients = [self.features.T @ dy, dy.sum(axis=0)]
        dfeatures = dy @ self.parameters[0].T / (self.shape[1] * self.shape[2])
        return self.xp.broadcast_to(dfeatures[:, None, None, :], self.shape)


class Network:
    """Three convolutions to images of 8 x 8, 4 x 4 and 2 x 2, each normalized and rectified, then the classifier.

    Parameters
    ----------
    norm : {"group", "batch", "none"}
    xp : module
        numpy or cupy.
    seed : int
        Of the initial weights.
    dtype : dtype
        Of the weights; that of the images must be the same.
    """

    def __init__(self, norm: str, xp: ModuleType = np, seed: int = 0, dtype: Any = np.float32):
        rng = np.random.default_rng(seed)
        self.xp = xp
        self.layers: list[Any] = []
        for inputs, outputs, stride in zip((1, *CHANNELS[:-1]), CHANNELS, STRIDES, strict=True):
            self.layers.append(Convolution(inputs, outputs, stride, xp, rng, dtype))
            self.layers.append(Normalization(norm, outputs, xp, dtype))
        self.layers.append(Classifier(CHANNELS[-1], CLASSES, xp, rng, dtype))
        self.velocities = [[xp.zeros_like(p) for p in layer.parameters] for layer in self.layers]

    def logits(self, images: Array, training: bool) -> Array:
        for layer in self.layers:
            images = layer.forward(images, training)
        return images

    def loss_and_gradients(self, images: Array, labels: Array) -> Array:
        """Mean cross-entropy of a batch; its gradients are left in ``gradients`` of each layer."""
        xp = self.xp
        scores = self.logits(images, training=True)
        scores = scores - scores.max(axis=1, keepdims=True)
        log_p = scores - xp.log(xp.exp(scores).sum(axis=1, keepdims=True))
        true_class = (xp.arange(len(labels)), labels)
        dy = xp.exp(log_p)
        dy[true_class] -= 1
        dy /= len(labels)
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return -log_p[true_class].mean()

    def step(self, rate: float, momentum: float = 0.9) -> None:
        """One step of gradient descent with momentum."""
        for layer, velocities in zip(self.layers, self.velocities, strict=True):
            for parameter, gradient, velocity in zip(layer.parameters, layer.gradients, velocities, strict=True):
                velocity *= momentum
                velocity -= rate * gradient
                parameter += velocity

    def accuracy(self, images: Array, labels: Array) -> float:
        return float((self.logits(images, training=False).argmax(axis=1) == labels).mean())


class Data(NamedTuple):
    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array


def load_data(seed: int, exposure: float = 8.0, xp: ModuleType = np) -> Data:
    """A random split into 1,000 digits to train on and 797 to test on, each under its own exposure."""
    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng([seed, 0])
    order = rng.permutation(len(labels))
    factors = exposure ** rng.uniform(-1, 1, len(labels))
    images = (pixels[order] / 16 * factors[:, None]).reshape(-1, 8, 8, 1).astype(np.float32)
    images, labels = xp.asarray(images), xp.asarray(labels[order])
    return Data(images[:TRAINED], labels[:TRAINED], images[TRAINED:], labels[TRAINED:])


def train(
    norm: str,
    batch: int,
    seed: int,
    data: Data,
    *,
    epochs: int,
    rate: float,
    xp: ModuleType = np,
    after_step: Callable[[], object] = lambda: None,
) -> Network:
    """A network trained with ``rate * batch / 32`` as the first learning rate, which falls linearly to zero."""
    network = Network(norm, xp, seed)
    rng = np.random.default_rng([seed, 1])
    batches = len(data.train_labels) // batch
    for epoch in range(epochs):
        order = xp.asarray(rng.permutation(len(data.train_labels)))
        for i in range(batches):
            chosen = order[i * batch : (i + 1) * batch]
            network.loss_and_gradients(data.train_images[chosen], data.train_labels[chosen])
            network.step(rate * batch / 32 * (1 - (epoch * batches + i) / (epochs * batches)))
            after_step()
    return network


def experiment(
    norms: Iterable[str] = tuple(NORMS),
    batch_sizes: Iterable[int] = BATCH_SIZES,
    seeds: int = 5,
    *,
    epochs: int = 6,
    rate: float = 0.1,
    exposure: float = 8.0,
    xp: ModuleType = np,
    progress: bool = False,
) -> dict[tuple[str, int], np.ndarray]:
    """Accuracy on the test set after training, for each norm and batch size: an array of one value a seed."""
    norms, batch_sizes = tuple(norms), tuple(batch_sizes)
    accuracies: dict[tuple[str, int], list[float]] = {(norm, batch): [] for norm in norms for batch in batch_sizes}
    steps = seeds * epochs * sum(TRAINED // batch for _, batch in accuracies)
    # The matrices are small: a second thread of BLAS gains nothing, and costs ten times as much where cores are busy.
    with (
        threadpool_limits(1, user_api="blas"),
        tqdm(total=steps, unit=" steps", unit_scale=True, disable=not progress) as bar,
    ):
        for seed in range(seeds):
            data = load_data(seed, exposure, xp)
            for norm, batch in accuracies:
                bar.set_description(f"{NORMS[norm]}, batch {batch:2d}, seed {seed}", refresh=False)
                network = train(norm, batch, seed, data, epochs=epochs, rate=rate, xp=xp, after_step=bar.update)
                accuracies[norm, batch].append(network.accuracy(data.test_images, data.test_labels))
    return {key: np.array(values) for key, values in accuracies.items()}


def table(accuracies: dict[tuple[str, int], np.ndarray]) -> str:
    """Mean and standard deviation over the seeds, and how far the mean moves between the batch sizes."""
    norms = list(dict.fromkeys(norm for norm, _ in accuracies))
    batches = sorted({batch for _, batch in accuracies})
    lines = ["test accuracy, % " + "".join(f"{f'batch {batch}':>13s}" for batch in batches) + "    spread"]
    for norm in norms:
        percent = [100 * accuracies[norm, batch] for batch in batches]
        cells = "".join(f"{values.mean():8.1f} ±{values.std():3.1f}" for values in percent)
        lines.append(f"{NORMS[norm]:17s}{cells}{np.ptp([values.mean() for values in percent]):10.1f}")
    return "\n".join(lines)


def figure(accuracies: dict[tuple[str, int], np.ndarray], data: Data, path: Path, caption: str) -> None:
    """Accuracy against batch size, with the range over the seeds as a band, under a strip of the images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"group": "#0072B2", "batch": "#D55E00", "none": "#777777"}  # Okabe and Ito: also for the colour-blind
    shown = 12
    fig = plt.figure(figsize=(7.2, 5.2), layout="constrained")
    strip, main = fig.subfigures(2, 1, height_ratios=(1, 6))
    for image, axes in zip(data.test_images[:shown], strip.subplots(1, shown), strict=True):
        pixels = image if isinstance(image, np.ndarray) else image.get()
        axes.imshow(np.sqrt(pixels[..., 0]), cmap="gray_r", vmin=0, vmax=math.sqrt(8))  # as a screen does
        axes.set(xticks=[], yticks=[])
    axes = main.subplots()
    batches = sorted({batch for _, batch in accuracies})
    for norm in dict.fromkeys(norm for norm, _ in accuracies):
        values = 100 * np.stack([accuracies[norm, batch] for batch in batches])
        axes.fill_between(batches, values.min(axis=1), values.max(axis=1), color=colors[norm], alpha=0.18, linewidth=0)
        axes.plot(batches, values.mean(axis=1), "o-", color=colors[norm], linewidth=2)
        axes.annotate(
            NORMS[norm],
            (batches[-1], values[-1].mean()),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=colors[norm],
            weight="bold",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_xlim(batches[0] * 0.9, batches[-1] * 1.9)
    axes.set_xlabel("images in a batch")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("Group norm does not see the batch size; batch norm does", loc="left", weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    main.supxlabel(caption, fontsize=8, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("out/digits.png"), help="the figure (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="NumPy or CuPy (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the training images (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each setting (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate at batch size 32 (default: %(default)s)")
    parser.add_argument(
        "--exposure", type=float, default=8.0, help="images darker or brighter by up to this factor (default: 8)"
    )
    options = parser.parse_args(arguments)
    if options.device == "gpu":
        import cupy as xp
    else:
        xp = np
    start = time.perf_counter()
    accuracies = experiment(
        seeds=options.seeds,
        epochs=options.epochs,
        rate=options.rate,
        exposure=options.exposure,
        xp=xp,
        progress=True,
    )
    print(table(accuracies))
    caption = (
        f"{options.epochs} passes over {TRAINED:,} digits, learning rate {options.rate:g} x batch / 32, exposure up to "
        f"{options.exposure:g} times darker or brighter;\nline: mean of {options.seeds} seeds, band: their range"
    )
    figure(accuracies, load_data(0, options.exposure, xp), options.output, caption)
    print(f"{options.output} saved, {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
