"""Promise: the device computes what the emulator does, to the bit: what CI shows on the emulator holds there."""

from __future__ import annotations

import pytest
from cuda_on_cpu import to_device, to_host
from libraries import Library

from . import bits


@pytest.mark.parametrize("name", bits.names())
def test_bits(name: str) -> None:
    case, dtype, last = bits.names()[name]
    found = bits.digests(Library("cupy", to_device, to_host), case, dtype, last)
    assert found == bits.recorded()[name]
