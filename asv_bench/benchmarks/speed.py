"""Time of forward, backward and their derivatives, with ``out=`` and without, and of the copy to compare with."""

from __future__ import annotations

from typing import Any

import numpy as np

import cugn

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


class Features(GroupNorm):
    """The same array with what a call may have besides; compare with the plain call of the same run."""

    params = (((8, 64, 112, 112), (64, 2048, 7, 7)), (32,), ("float32",), *GroupNorm.params[3:])

    def setup(self, *parameters: Any) -> None:
        super().setup(*parameters)
        rng = np.random.default_rng(1)
        labels = rng.permutation(np.arange(len(self.weight)) % self.groups).tolist()
        spatial = (1 if axis == self.channel_axis % self.x.ndim else n for axis, n in enumerate(self.x.shape))
        masks = {"mask": rng.random(self.x.shape) < 0.8, "spatial mask": rng.random(tuple(spatial)) < 0.8}
        self.features: dict[str, tuple[Any, dict[str, Any]]] = {
            "plain": (self.groups, {}),
            "labels": (labels, {}),
            **{name: (self.groups, {"where": self.xp.asarray(mask)}) for name, mask in masks.items()},
            **{name: (self.groups, {"activation": name}) for name in ("relu", "silu")},
        }
        for name in self.features:
            self.run(name)
        self.wait()

    def run(self, name: str) -> None:
        groups, options = self.features[name]
        options = {**options, "channel_axis": self.channel_axis, "out": self.out}
        cugn.group_norm(self.x, groups, self.weight, self.bias, **options)
        cugn.group_norm_backward(self.dy, self.x, groups, self.weight, self.bias, **options)

    def time_plain(self, *parameters: object) -> None:
        self.run("plain")
        self.wait()

    def time_labels(self, *parameters: object) -> None:
        self.run("labels")
        self.wait()

    def time_mask(self, *parameters: object) -> None:
        self.run("mask")
        self.wait()

    def time_spatial_mask(self, *parameters: object) -> None:
        self.run("spatial mask")
        self.wait()

    def time_relu(self, *parameters: object) -> None:
        self.run("relu")
        self.wait()

    def time_silu(self, *parameters: object) -> None:
        self.run("silu")
        self.wait()


class SecondOrder(GroupNorm):
    """The jvp reads and writes as many arrays as the backward; the double backward one more of each."""

    def setup(self, *parameters: Any) -> None:
        self.draw(*parameters)
        self.jvp(self.out)  # compiles: not the benchmark's time
        self.double_backward()
        self.wait()

    def time_jvp(self, *parameters: object) -> None:
        self.jvp(self.out)
        self.wait()

    def time_double_backward(self, *parameters: object) -> None:
        self.double_backward()
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
