r"""
The gradient's scale
====================

For a group of variance v, with :math:`\hat x = (x - \mu) / \sqrt{v + \epsilon}` and bars for means over the group,

.. math:: dx = \frac{1}{\sqrt{v + \epsilon}} \left( dy - \overline{dy} - \hat x\, \overline{dy\, \hat x} \right).

The factor in front is the group's own: a large variance damps the gradient, and towards v = 0 it stays at the finite
:math:`1/\sqrt{\epsilon}`. No batch appears in it.
"""

import matplotlib.pyplot as plt
import numpy as np
from gallery_style import BATCH, GROUP

import cugn

rng = np.random.default_rng(0)
dy, z = rng.normal(size=(2, 8, 16, 20, 20))
z = cugn.group_norm(z, 4, eps=0)  # each group has mean 0, variance 1
variances = 10.0 ** np.arange(-12, 9)


def gradient_of_first_sample(backward, v, samples):
    """Norm of dx of sample 0, whose variance is v; all others keep the variance 1."""
    x = z[:samples].copy()
    x[0] *= np.sqrt(v)
    return np.linalg.norm(backward(dy[:samples], x).dx[0])


def group_backward(dy, x):
    return cugn.group_norm_backward(dy, x, 4)


measured = {n: [gradient_of_first_sample(group_backward, v, n) for v in variances] for n in (1, 8)}
of_batch_norm = [gradient_of_first_sample(cugn.batch_norm_backward, v, 8) for v in variances]
assert measured[1] == measured[8]  # to the bit

# %%
# The formula needs the part of dy along x̂, which shrinks by a factor eps/(v + eps) only.

eps = 1e-5
groups = dy[0].reshape(4, -1), z[0].reshape(4, -1)
centred = groups[0] - groups[0].mean(axis=1, keepdims=True)
along = (groups[0] * groups[1]).mean(axis=1, keepdims=True) * groups[1]
v = np.geomspace(variances[0], variances[-1], 300)
across = np.linalg.norm(centred - along)
formula = np.hypot(across, np.linalg.norm(along) * eps / (v + eps)) / np.sqrt(v + eps)

fig, ax = plt.subplots(figsize=(7.2, 4.2))
ax.loglog(v, formula, color=GROUP, lw=1.2, label="formula")
ax.loglog(variances, measured[1], "o", color=GROUP, ms=5, label="group norm, alone")
ax.loglog(variances, measured[8], "s", mfc="none", color=GROUP, ms=10, label="group norm, in a batch of 8")
ax.loglog(variances, of_batch_norm, "^-", color=BATCH, ms=5, lw=1, label="batch norm, in a batch of 8")
ax.axvline(eps, color="black", lw=1, ls=":")
ax.text(eps * 1.6, formula.min() * 2, "v = eps")
ax.annotate(r"$\|dy\| / \sqrt{\mathrm{eps}}$", (v[30], formula[30]), xytext=(0, -22), textcoords="offset points")
ax.annotate(r"$\propto 1 / \sqrt{v}$", (v[230], formula[230]), xytext=(10, 4), textcoords="offset points")
ax.set_xlabel("variance v of the groups of sample 0")
ax.set_ylabel("norm of dx of sample 0")
ax.grid(True)
ax.legend(fontsize=9, loc="lower left")
plt.show()

worst = max(abs(np.interp(np.log(variances), np.log(v), np.log(formula)) - np.log(measured[1])))
print(f"measured and formula agree to {100 * worst:.2g} % (the interpolation between the formula's 300 points)")
