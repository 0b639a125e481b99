"""Time of the forward and the backward, with ``out=`` and with a fresh result, and of the copy to compare with."""

from __future__ import annotations

from .common import GroupNorm


class Forward(GroupNorm):
    def time_forward(self, *parameters: object) -> None:
        self.forward(self.out)
        self.wait()

    def time_forward_fresh(self, *parameters: object) -> None:
        self.forward()
        self.wait()

    def time_copy(self, *parameters: object) -> None:
        self.xp.copyto(self.out, self.x)
        self.wait()


class Backward(GroupNorm):
    def time_backward(self, *parameters: object) -> None:
        self.backward(self.out)
        self.wait()

    def time_backward_fresh(self, *parameters: object) -> None:
        self.backward()
        self.wait()


class CallOverhead(GroupNorm):
    """Arrays so small that the call itself is what takes time."""

    params = (((1, 32, 1),), (8,), *GroupNorm.params[2:])

    def time_forward(self, *parameters: object) -> None:
        self.forward(self.out)
        self.wait()

    def time_forward_and_backward(self, *parameters: object) -> None:
        self.forward(self.out)
        self.backward(self.out)
        self.wait()


class Import:
    """Each in a process of its own; numpy's import is part of cugn's."""

    def timeraw_import_numpy(self) -> str:
        return "import numpy"

    def timeraw_import_cugn(self) -> str:
        return "import cugn"

    def timeraw_import_and_first_call(self) -> str:
        return "import numpy, cugn; cugn.group_norm(numpy.ones((1, 32, 64), numpy.float32), 8)"
