r"""
Small batches give noisy statistics
===================================

Batch norm estimates mean and variance of a channel from the m values that the batch happens to hold. For independent
values of variance :math:`\sigma^2` (normal ones, for the variance) the squared errors are

.. math::

    \mathrm{E}\,(\hat\mu - \mu)^2 = \frac{\sigma^2}{m}, \qquad
    \mathrm{E}\,(\hat v - \sigma^2)^2 = \frac{2 \sigma^4}{m} \left(1 - \frac{1}{2m}\right).

Group norm's m is the number of values in a group of one sample. It is what it is, for every batch.
"""

import matplotlib.pyplot as plt
import numpy as np
from gallery_style import BATCH, GROUP

import cugn

rng = np.random.default_rng(0)
mean, std = 3.0, 2.0
channels, positions, draws = 8, 16, 400
batches = np.array([1, 2, 4, 8, 16, 32, 64])

errors = {"batch": [], "group": []}
for batch in batches:
    x = rng.normal(mean, std, (draws, batch, channels, positions))
    # batch_axis=None, so that a "group" of one channel takes in the samples: batch norm of every draw at once.
    of_batch = cugn.moments(x.transpose(0, 2, 1, 3).reshape(draws, channels, -1), channels)
    of_group = cugn.moments(x, 1, channel_axis=2, batch_axis=(0, 1))
    for name, m in (("batch", of_batch), ("group", of_group)):
        errors[name].append([np.mean((m.mean - mean) ** 2), np.mean((m.var - std**2) ** 2)])
errors = {name: np.array(values) for name, values in errors.items()}

# %%
# `cugn.moments` counts the values: m grows with the batch for batch norm only.

m_batch, m_group = positions * batches, positions * channels
assert (of_batch.count == m_batch[-1]).all()
assert (of_group.count == m_group).all()

fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharex=True)
m = np.geomspace(batches[0], batches[-1], 100) * positions
formulas = [lambda m: std**2 / m, lambda m: 2 * std**4 / m * (1 - 1 / (2 * m))]
for i, (ax, what, formula) in enumerate(zip(axes, ("mean", "variance"), formulas, strict=True)):
    ax.loglog(m / positions, formula(m), "-", color=BATCH, lw=1.2, label="formula, m grows with the batch")
    ax.loglog(batches, errors["batch"][:, i], "o", color=BATCH, label="batch norm, measured")
    ax.axhline(formula(m_group), color=GROUP, lw=1.2, label="formula, m of one group")
    ax.loglog(batches, errors["group"][:, i], "s", color=GROUP, label="group norm, measured")
    ax.set_xlabel("samples in a batch")
    ax.set_title(f"squared error of the {what}")
    ax.set_xscale("log", base=2)
    ax.set_xticks(batches, [str(b) for b in batches])
    ax.grid(True, which="major")
axes[0].legend(fontsize=8)
plt.show()

# %%
# The slope in the double logarithmic plot is -1:

for i, what in enumerate(("mean", "variance")):
    slope = np.polyfit(np.log(m_batch), np.log(errors["batch"][:, i]), 1)[0]
    print(f"batch norm, {what}: squared error ~ m^{slope:.3f}")
