"""A bar on standard error for long work: tqdm's if it is installed, else a line for each tenth."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

__all__ = ["Progress"]


class Progress:
    """What is done of a total.

    Parameters
    ----------
    shown : bool
        Whether to show anything.
    total : int
        What will have been done in the end.
    unit : str
        Its unit; "B" is shown with its multiples.
    text : callable, optional
        The total as a text, for the lines without tqdm.
    """

    def __init__(self, shown: bool, total: int, unit: str, text: Callable[[int], str] | None = None) -> None:
        self.shown, self.total, self.done = shown, total, 0
        self.text = text(total) if text is not None else f"{total} {unit}"
        self.bar: Any = None
        if shown:
            with suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=total, unit=unit if unit == "B" else f" {unit}", unit_scale=unit == "B")

    def update(self, count: int) -> None:
        """Add what is done."""
        before, self.done = self.done, self.done + count
        if self.bar is not None:
            self.bar.update(count)
        elif self.shown and 10 * before // self.total < 10 * self.done // self.total:
            print(f"{100 * self.done // self.total:3d} % of {self.text}", file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()
