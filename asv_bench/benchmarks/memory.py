"""Peak memory of a process that makes one call; that of the copy is what the arrays alone take."""

from __future__ import annotations

from typing import Any

from .common import GroupNorm


class PeakMemory(GroupNorm):
    """Compare with `peakmem_copy`: the difference is what the call takes besides its arrays."""

    params = (((1, 32, 96, 96, 96),), (8,), *GroupNorm.params[2:-1], ("cpu",))  # it is the host's memory

    def setup(self, *parameters: Any) -> None:
        self.draw(*parameters)  # no call yet: asv takes the peak of this as well

    def peakmem_copy(self, *parameters: object) -> None:
        self.xp.copyto(self.out, self.x)
        self.wait()

    def peakmem_forward(self, *parameters: object) -> None:
        self.forward(self.out)
        self.wait()

    def peakmem_backward(self, *parameters: object) -> None:
        self.backward(self.out)
        self.wait()
