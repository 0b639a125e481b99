"""
A sample does not see its batch
===============================

Group norm takes mean and variance from one sample, so that its result is the same in a batch of 1 or of 100: not
nearly, but to the last bit. Batch norm's result for the very same sample moves with the company it is in.
"""

import matplotlib.pyplot as plt
import numpy as np
from gallery_style import BATCH, GROUP

import cugn

rng = np.random.default_rng(0)
x = (rng.normal(size=(100, 16, 12, 12)) * rng.lognormal(0, 0.5, (100, 1, 1, 1))).astype(np.float32)

sizes = np.array([1, 2, 3, 5, 8, 13, 25, 50, 100])
alone = {"group": cugn.group_norm(x[:1], 4)[0], "batch": cugn.batch_norm(x[:1])[0]}
moved, bits = {"group": [], "batch": []}, {"group": [], "batch": []}
for size in sizes:
    for name, y in (("group", cugn.group_norm(x[:size], 4)[0]), ("batch", cugn.batch_norm(x[:size])[0])):
        moved[name].append(np.sqrt(np.mean((y - alone[name]) ** 2)))
        bits[name].append(np.mean(y.view(np.uint32) != alone[name].view(np.uint32)))

assert bits["group"] == [0.0] * len(sizes)

fig, ax = plt.subplots(figsize=(7.2, 3.6))
ax.plot(sizes, moved["batch"], "o-", color=BATCH, label="batch norm")
ax.plot(sizes, moved["group"], "s-", color=GROUP, label="group norm: exactly 0")
ax.set_xscale("log")
ax.set_xticks(sizes, [str(size) for size in sizes])
ax.minorticks_off()
ax.set_xlabel("samples in the batch")
ax.set_ylabel("rms change of y[0]")
ax.set_title("The first sample of a batch, against the same sample alone")
ax.grid(axis="y")
ax.legend()
plt.show()

# %%
# In other dtypes, memory orders and for any number of threads too; ``tests/test_claims.py`` goes through them.

for name in ("batch", "group"):
    print(f"{name} norm: {100 * bits[name][-1]:.1f} % of the values of y[0] have other bits in the batch of 100")
