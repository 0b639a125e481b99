"""The examples' gradients: the residual block's, and those that autograd takes through cugn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import residual_block


def test_residual_blocks_gradients_are_those_of_finite_differences():
    block = residual_block.ResidualBlock(8, groups=2, dtype=np.float64)
    x = np.random.default_rng(0).normal(size=(2, 8, 6, 5))
    errors = residual_block.gradient_errors(block, x)
    assert set(errors) == {"x", "weight1", "bias1", "kernel1", "weight2", "bias2", "kernel2"}
    # Truncation step^2 = 1e-10 times third derivatives of order 1; rounding 1e-16 / step = 1e-11.
    assert max(errors.values()) < 1e-8


def test_residual_block_is_torchs():
    torch = pytest.importorskip("torch")
    block = residual_block.ResidualBlock(8, groups=2)
    x = np.random.default_rng(0).normal(size=(2, 8, 6, 5)).astype(np.float32)
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    y, saved = block.forward(x)
    dx, gradients = block.backward(dy, saved)
    tx = torch.from_numpy(x).requires_grad_()
    p = {name: torch.from_numpy(values.copy()).requires_grad_() for name, values in block.parameters.items()}
    ty = tx
    for half in (1, 2):
        z = torch.nn.functional.group_norm(ty, 2, p[f"weight{half}"], p[f"bias{half}"])
        ty = torch.nn.functional.conv2d(
            torch.nn.functional.silu(z), p[f"kernel{half}"].transpose(0, 1), padding=1
        )  # torch keeps the outputs first
    ty = tx + ty
    ty.backward(torch.from_numpy(dy))
    # float32 products of 72 terms in two layers: some tens of eps relative to the largest.
    for ours, theirs in [(y, ty.detach()), (dx, tx.grad)] + [(gradients[n], p[n].grad) for n in p]:
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5 * np.abs(ours).max())


@pytest.mark.rare(when=lambda groups, activation: groups != 2 and activation is not None)
@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
@pytest.mark.parametrize("groups", [2, [0, 1, 1, 2]], ids=["equal", "labels"])
def test_autograd_differentiates_twice_in_both_modes(groups, activation):
    pytest.importorskip("autograd", reason="the bridge is to HIPS autograd")
    import autograd.numpy as anp
    from autograd import grad, make_jvp
    from autograd.test_util import check_grads
    from autograd_bridge import group_norm

    rng = np.random.default_rng(0)
    x, weight, bias = rng.normal(size=(2, 4, 5)), rng.normal(size=4), rng.normal(size=4)

    def normalized(x, weight, bias):
        return group_norm(x, weight, bias, groups, activation=activation)

    check_grads(normalized, modes=["rev"], order=2)(x, weight, bias)
    check_grads(normalized, modes=["fwd"], order=1)(x, weight, bias)

    def penalty(x, weight, bias):  # a gradient inside a loss
        return anp.sum(anp.sin(grad(lambda x: anp.sum(normalized(x, weight, bias) ** 3))(x)))

    check_grads(penalty, modes=["rev"], order=1)(x, weight, bias)
    y, ty = make_jvp(lambda w: normalized(x, w, bias))(weight)(np.ones(4))
    assert y.shape == ty.shape == x.shape


def test_autograd_fits_under_a_gradient_penalty():
    pytest.importorskip("autograd", reason="the bridge is to HIPS autograd")
    from autograd_bridge import fit

    losses = fit(steps=20)
    assert losses[-1] < 0.8 * losses[0]
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
