"""
Training with small batches
===========================

The noise of batch norm's statistics enters the forward pass and the gradients. A small convolutional network, written
by hand in NumPy (``examples/train_digits.py``: every layer forward and backward), learns scikit-learn's handwritten
digits, each seen under its own exposure. Every run sees the same number of images, with a learning rate proportional
to the batch size.
"""

import matplotlib.pyplot as plt
import numpy as np
import train_digits
from gallery_style import BATCH, GROUP, NONE

batches = (2, 4, 8, 16, 32)
accuracies = train_digits.experiment(("group", "batch", "none"), batches, seeds=3, epochs=3)
print(train_digits.table(accuracies))

# %%
# Group norm's accuracy hardly moves between batches of 2 and of 32. Batch norm's falls at 2, where half of what a
# sample is normalized with is the other sample.

fig, (top, ax) = plt.subplots(2, 1, figsize=(7.2, 5), height_ratios=(1, 6))
digits = train_digits.load_data(0).test_images[:14, :, :, 0]
top.imshow(np.sqrt(np.hstack(list(digits))), cmap="gray_r", vmin=0, vmax=np.sqrt(8))
top.set_axis_off()
for norm, label, colour in (("group", "group norm", GROUP), ("batch", "batch norm", BATCH), ("none", "no norm", NONE)):
    values = 100 * np.array([accuracies[norm, batch] for batch in batches])
    ax.fill_between(batches, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.2, lw=0)
    ax.plot(batches, values.mean(axis=1), "o-", color=colour, label=label)
ax.set_xscale("log", base=2)
ax.set_xticks(batches, [str(batch) for batch in batches])
ax.set_xlabel("images in a batch")
ax.set_ylabel("test accuracy (%)")
ax.grid(axis="y")
ax.legend(ncols=3)
plt.show()
