"""The look of the gallery's figures, and the colours of the norms."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt

# Okabe and Ito's palette, which the colour-blind can tell apart.
GROUP, BATCH, LAYER, INSTANCE, NONE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"


def reset(gallery_conf: dict[str, Any] | None = None, fname: str | None = None) -> None:
    """Set the figures' style; sphinx-gallery calls it before each page."""
    plt.rcParams.update(
        {
            "figure.figsize": (7.2, 4.0),
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "savefig.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.titlesize": 11,
            "axes.grid": False,
            "axes.axisbelow": True,
            "grid.color": "#dddddd",
            "legend.frameon": False,
            "lines.linewidth": 2,
            "image.cmap": "gray",
        }
    )
