"""The digits example: its gradients are right, its runs are comparable, and it ends with a table and a figure."""

import numpy as np
import pytest
import train_digits


@pytest.mark.parametrize("norm", train_digits.NORMS)
def test_gradients_against_finite_differences(norm):
    network = train_digits.Network(norm, seed=3, dtype=np.float64)
    rng = np.random.default_rng(0)
    images, labels = rng.uniform(0, 1, (3, 8, 8, 1)), rng.integers(0, 10, 3)
    network.loss_and_gradients(images, labels)
    gradients = [gradient.copy() for layer in network.layers for gradient in layer.gradients]
    parameters = [parameter for layer in network.layers for parameter in layer.parameters]
    assert [g.shape for g in gradients] == [p.shape for p in parameters]
    step = 1e-6
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = rng.normal(size=parameter.shape)
        losses = []
        for sign in (1, -1):
            parameter += sign * step * direction
            losses.append(network.loss_and_gradients(images, labels))
            parameter -= sign * step * direction
        # Truncation is step^2 = 1e-12 of third derivatives; rounding of the losses, 1e-16 / step, is 1e-10.
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx((direction * gradient).sum(), rel=1e-5, abs=1e-8)


def test_batch_norm_predicts_with_running_statistics():
    """At prediction an image is classified the same alone and among others, whichever norm."""
    data = train_digits.load_data(0)
    for norm in train_digits.NORMS:
        network = train_digits.train(norm, 32, 0, data, epochs=1, rate=0.1)
        together = network.logits(data.test_images[:5], training=False)
        alone = network.logits(data.test_images[4:5], training=False)
        # Matrix products may be split otherwise for other numbers of rows: some eps(float32) of sums of order 10.
        np.testing.assert_allclose(alone, together[4:5], atol=1e-4)


def test_same_seed_same_run():
    runs = [train_digits.experiment(["group"], [8], 1, epochs=1)["group", 8] for _ in range(2)]
    assert runs[0] == runs[1]


def test_exposure_is_each_images_own():
    plain, exposed = train_digits.load_data(1, exposure=1.0), train_digits.load_data(1, exposure=8.0)
    np.testing.assert_array_equal(plain.test_labels, exposed.test_labels)
    factors = exposed.test_images.max(axis=(1, 2, 3)) / plain.test_images.max(axis=(1, 2, 3))
    assert 1 / 8 <= factors.min() < 1 / 7  # 797 draws: each end of the range is reached to 13 % but once in e^27
    assert 7 < factors.max() <= 8 + 1e-5
    assert plain.train_images.max() == 1
    assert len(plain.train_images) == 1000
    assert len(plain.test_images) == 797


def test_command_prints_the_table_and_saves_the_figure(tmp_path, capsys):
    figure = tmp_path / "new" / "digits.png"
    train_digits.main(["--output", str(figure), "--seeds", "1", "--epochs", "1"])
    printed = capsys.readouterr().out
    for name in train_digits.NORMS.values():
        assert name in printed
    assert str(figure) in printed
    assert figure.read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in printed.splitlines() if line.split()[1:2] == ["norm"]]
    accuracies = [float(cell) for row in rows for cell in row[2:10:2]]
    assert len(accuracies) == 12
    assert min(accuracies) > 30  # 10 is chance: one pass over the digits teaches every network something
    assert max(accuracies) > 80
