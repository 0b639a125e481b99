"""
Cells and genes
===============

In single-cell sequencing each cell is caught with a yield of its own: its counts are all scaled by a factor that says
nothing about the cell. A table of cells × genes has samples and channels but no positions (S = 1), so that a group
is a set of genes, and group norm asks how much of a gene there is *in comparison with the other genes of its group, in
this cell*. The table: 700 blood cells × 765 genes, the PBMC sample that scanpy ships.
"""

import matplotlib.pyplot as plt
import numpy as np
import scanpy
from gallery_style import BATCH, GROUP, NONE

import cugn
from cugn.diagnostics import diagnose, suggest_groups

cells = scanpy.datasets.pbmc68k_reduced()
scaled = np.expm1(cells.raw.X.toarray())  # stored as log(1 + counts * factor of the cell)
unit = np.where(scaled > 0, scaled, np.inf).min(axis=1, keepdims=True)
counts = np.round(scaled / unit)
print(f"{counts.shape[0]} cells, {counts.shape[1]} genes, counts up to {counts.max():.0f}")

# %%
# Genes differ in abundance by orders of magnitude: in one group, a few would speak for all others. The square root,
# which makes the variance of counts nearly constant, helps; two groups of genes of similar scale do the rest.

x = np.sqrt(counts)
labels = suggest_groups(x, 2)
for values, groups, name in (
    (counts, 1, "counts, one group"),
    (x, 1, "roots, one group"),
    (x, labels, "roots, two groups"),
):
    found = diagnose(values, groups, threshold=0.2)
    print(f"{name}: {len(found.squashed)} of {x.shape[1]} genes squashed below 0.2")
print(diagnose(x, labels))

# %%
# Now catch every cell with another yield, from a quarter to four times. Group norm per cell divides it out; batch norm
# per gene, the usual standardization, keeps it.

rng = np.random.default_rng(0)
yields = 4.0 ** rng.uniform(-1, 1, (len(x), 1))
caught = np.sqrt(yields) * x
by_cell = {"true": cugn.group_norm(x, labels, eps=0), "caught": cugn.group_norm(caught, labels, eps=0)}
by_gene = {"true": cugn.batch_norm(x), "caught": cugn.batch_norm(caught)}
print(f"largest change by the yields, normalized per cell: {np.abs(by_cell['caught'] - by_cell['true']).max():.1e}")
print(f"largest change by the yields, normalized per gene: {np.abs(by_gene['caught'] - by_gene['true']).max():.1e}")

# %%
# The first two principal components of the cells, coloured by type: monocytes, B cells, T and NK cells come apart per
# cell under any yield. Per gene the yields smear the clusters out.


def components(y):
    centred = y - y.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    return u[:, :2] * s[:2] * np.sign(u[0, :2])


kinds = {
    "CD14+ monocytes": (["CD14+ Monocyte"], BATCH),
    "dendritic": (["Dendritic"], "#E69F00"),
    "B": (["CD19+ B"], GROUP),
    "T, NK": ([k for k in cells.obs.bulk_labels.unique() if k.startswith(("CD4+", "CD8+", "CD56+"))], "#009E73"),
    "CD34+": (["CD34+"], NONE),
}
fig, panels = plt.subplots(2, 2, figsize=(8.4, 7))
for row, pair, title in ((panels[0], by_gene, "per gene (batch norm)"), (panels[1], by_cell, "per cell (group norm)")):
    for ax, (state, y) in zip(row, pair.items(), strict=True):
        where = components(y)
        for kind, (names, colour) in kinds.items():
            chosen = cells.obs.bulk_labels.isin(names).to_numpy()
            ax.plot(*where[chosen].T, ".", color=colour, ms=4, alpha=0.7, label=kind)
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{title}, {'as counted' if state == 'true' else 'random yields'}", fontsize=10)
panels[0, 0].legend(fontsize=8, markerscale=2)
plt.show()
