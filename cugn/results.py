"""The named tuples that the functions return."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["BackwardSums", "GroupNormDoubleGrads", "GroupNormForward", "GroupNormGrads"]


class GroupNormForward(NamedTuple):
    """Result of a forward call: the output and the statistics that the backward can take over.

    Attributes
    ----------
    y : array
        Normalized array, of x's shape and dtype (float32 for integer x).
    mean, rstd : array of float64
        Mean and ``1 / sqrt(var + eps)`` of each group, of the batch shape followed by G.
    """

    y: Any
    mean: Any
    rstd: Any


class GroupNormGrads(NamedTuple):
    """Gradients of a scalar loss with respect to the inputs of a forward call.

    Attributes
    ----------
    dx : array
        Gradient with respect to x, of its shape and dtype.
    dweight, dbias : array
        Gradients with respect to weight and bias, shape (C,), in the dtype of the weight (of x without one).
    """

    dx: Any
    dweight: Any
    dbias: Any


class GroupNormDoubleGrads(tuple[Any, Any, Any]):
    """Gradients of the backward pass: the tuple ``(gdy, gx, gweight)``.

    With an activation the result also depends on the bias; that gradient is the attribute `gbias`, beside the tuple
    (as `os.stat_result` carries more than it unpacks to), and zero without an activation.

    Attributes
    ----------
    gdy, gx : array
        Gradients with respect to dy and x, of their shape and dtype.
    gweight, gbias : array
        Gradients with respect to weight and bias, shape (C,).
    """

    gbias: Any

    def __new__(cls, gdy: Any, gx: Any, gweight: Any, gbias: Any) -> GroupNormDoubleGrads:
        self = super().__new__(cls, (gdy, gx, gweight))
        self.gbias = gbias
        return self

    def __getnewargs__(self) -> tuple[Any, Any, Any, Any]:
        """Let pickle and copy carry `gbias` along."""
        return (*self, self.gbias)

    @property
    def gdy(self) -> Any:
        """Gradient with respect to dy."""
        return self[0]

    @property
    def gx(self) -> Any:
        """Gradient with respect to x."""
        return self[1]

    @property
    def gweight(self) -> Any:
        """Gradient with respect to the weight."""
        return self[2]

    def __repr__(self) -> str:
        """Name the fields, as a named tuple does."""
        return f"GroupNormDoubleGrads(gdy={self[0]!r}, gx={self[1]!r}, gweight={self[2]!r})"


class BackwardSums(NamedTuple):
    """The sums that the backward takes over a part of an array; those of parts add up to those of the whole.

    Attributes
    ----------
    sum_wdy, sum_wdy_xhat : array of float64
        Sums over each group of ``weight * dz`` and ``weight * dz * x_hat``, dz being dy times the activation's slope;
        of the batch shape followed by G.
    dweight, dbias : array of float64
        Sums over samples and positions of ``dz * x_hat`` and ``dz``, shape (C,).
    """

    sum_wdy: Any
    sum_wdy_xhat: Any
    dweight: Any
    dbias: Any

    def merge(self, other: BackwardSums) -> BackwardSums:
        """Sums over two disjoint sets of positions of the same samples and channels.

        Parameters
        ----------
        other : BackwardSums
            Of the same shapes and array library.

        Returns
        -------
        BackwardSums
            Of the elements of both.

        Raises
        ------
        TypeError
            If `other` is no BackwardSums.
        ValueError
            If its shapes are others.
        """
        if not isinstance(other, BackwardSums):
            raise TypeError(f"other is a {type(other).__name__}: it must be BackwardSums")
        shapes, wanted = ([field.shape for field in sums] for sums in (other, self))
        if shapes != wanted:
            raise ValueError(f"other has the shapes {shapes}: they must be {wanted}")
        return BackwardSums(*(a + b for a, b in zip(self, other, strict=True)))
