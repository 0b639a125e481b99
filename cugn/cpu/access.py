"""Reading a geometry's words in a kernel."""

from __future__ import annotations

from .compile import inner
from .memory import load_i64
from .words import ARRAY_WORDS, ARRAYS


@inner
def word(geometry: int, name: int) -> int:
    """A word of the geometry."""
    return load_i64(geometry, name)


@inner
def array_word(geometry: int, array: int, name: int) -> int:
    """A word about one of the large arrays."""
    return load_i64(geometry, ARRAYS + array * ARRAY_WORDS + name)
