"""Each test of `test_claims.py` fails when the library is broken in the respect that it is about."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_claims
from libraries import LIBRARIES

import cugn
from cugn.diagnostics import diagnose

Replacements = dict[str, Callable[..., Any]]
whole = {name: getattr(cugn, name) for name in cugn.__all__ if callable(getattr(cugn, name))}


def over_the_batch() -> Replacements:
    """Statistics of all samples together."""

    def common(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: function(*args, **{**options, "batch_axis": None})

    names = ("group_norm", "group_norm_forward", "group_norm_backward")
    return {name: common(whole[name]) for name in names}


def of_one_sample() -> Replacements:
    """Batch norm's statistics of the first sample only."""

    def forward(x: Any, *args: Any, **options: Any) -> Any:
        return whole["batch_norm_forward"](x[:1], *args, **options)

    def alone(x: Any, *args: Any, **options: Any) -> Any:
        return np.concatenate([whole["batch_norm"](sample[None], *args, **options) for sample in x])

    return {"batch_norm_forward": forward, "batch_norm": alone}


def of_samples_alone() -> Replacements:
    """Batch norm's gradient sample by sample."""

    def backward(dy: Any, x: Any) -> Any:
        grads = [whole["batch_norm_backward"](dy[n : n + 1], x[n : n + 1]) for n in range(len(x))]
        return grads[0]._replace(dx=np.concatenate([g.dx for g in grads]))

    return {"batch_norm_backward": backward}


def miscounted() -> Replacements:
    """Moments that count the samples' channels rather than their values."""

    def moments(*args: Any, **options: Any) -> Any:
        m = whole["moments"](*args, **options)
        return m._replace(count=m.count // 99)

    return {"moments": moments}


def trained_by_batch_norm() -> Replacements:
    """Batch norm under the name of group norm."""

    def forward(x: Any, groups: Any, *args: Any, **options: Any) -> Any:
        return whole["batch_norm_forward"](x, *args, **options)

    def backward(dy: Any, x: Any, groups: Any, *args: Any, **options: Any) -> Any:
        return whole["batch_norm_backward"](dy, x, *args, **options)

    return {"group_norm_forward": forward, "group_norm_backward": backward}


def by_threads() -> Replacements:
    """Bits that depend on the number of threads."""

    def norm(x: Any, *args: Any, **options: Any) -> Any:
        return np.nextafter(whole["group_norm"](x, *args, **options), x.dtype.type(cugn.get_num_threads() - 2))

    return {"group_norm": norm}


def of_another_eps() -> Replacements:
    """Layer and instance norm with an eps of their own."""

    def other(name: str) -> Callable[..., Any]:
        return lambda *args, **options: whole[name](*args, **{"eps": 1e-3, **options})

    return {name: other(name) for name in ("layer_norm", "instance_norm")}


def of_equal_groups() -> Replacements:
    """Labels taken for as many equal, contiguous groups."""

    def contiguous(name: str, at: int) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            groups = args[at] if np.ndim(args[at]) == 0 else int(np.max(args[at])) + 1
            return whole[name](*args[:at], groups, *args[at + 1 :], **options)

        return call

    return {"group_norm": contiguous("group_norm", 1), "group_norm_backward": contiguous("group_norm_backward", 2)}


def of_one_group() -> Replacements:
    """All channels in one group, whatever groups are asked for."""
    return {"group_norm": lambda x, groups, *args, **options: whole["group_norm"](x, 1, *args, **options)}


def of_channels() -> Replacements:
    """A group for each channel, whatever groups are asked for."""

    def norm(x: Any, groups: Any, *args: Any, **options: Any) -> Any:
        return whole["group_norm"](x, x.shape[1], *args, **options)

    return {"group_norm": norm}


def weighted_by_place() -> Replacements:
    """A result that depends on the place of a channel."""

    def placed(name: str) -> Callable[..., Any]:
        def call(x: Any, *args: Any, **options: Any) -> Any:
            y = whole[name](x, *args, **options)
            return y + 1e-6 * np.arange(y.shape[1]).reshape(-1, *[1] * (y.ndim - 2))

        return call

    return {name: placed(name) for name in ("group_norm", "batch_norm")}


def without_eps() -> Replacements:
    """A gradient that explodes as the variance vanishes."""

    def backward(*args: Any, **options: Any) -> Any:
        return whole["group_norm_backward"](*args, **{**options, "eps": 1e-300})

    return {"group_norm_backward": backward}


def with_a_large_eps() -> Replacements:
    """A contrast that is not divided out."""

    def norm(*args: Any, **options: Any) -> Any:
        return whole["group_norm"](*args, **{**options, "eps": 1e-3})

    return {"group_norm": norm}


def without_masks() -> Replacements:
    """Statistics of all elements."""

    def norm(*args: Any, **options: Any) -> Any:
        return whole["group_norm"](*args, **{k: v for k, v in options.items() if k != "where"})

    return {"group_norm": norm}


def of_each_tile() -> Replacements:
    """Statistics of each tile instead of those of all."""

    def normalize(x: Any, mean: Any, rstd: Any, groups: Any) -> Any:
        m = whole["moments"](x, groups)
        return whole["normalize"](x, m.mean, m.rstd(), groups)

    return {"normalize": normalize}


def seen_with_contrast() -> Replacements:
    """Instance norm that takes the mean alone."""
    return {"instance_norm": lambda x, **options: x - x.mean(axis=(2, 3), keepdims=True)}


def undiagnosed() -> Replacements:
    """Diagnostics that see nothing."""

    return {"diagnose": lambda x, groups: diagnose(np.ones_like(x) * np.arange(x.shape[-1]), groups)}


ENGINE = test_claims.Engine(LIBRARIES["numpy"]())
FLOAT32 = {"dtype": np.float32}
ERRORS = {"squared_errors": test_claims.squared_errors}
TWO = {"loud_and_quiet": test_claims.loud_and_quiet}
# test, what breaks it, its other arguments (functions are called under the break)
CASES: list[tuple[str, Callable[[], Replacements], dict[str, Any]]] = [
    ("error_of_batch_norms_statistics_falls_as_one_over_m", of_one_sample, ERRORS),
    ("error_of_group_norms_statistics_does_not_move_with_the_batch", over_the_batch, ERRORS),
    ("moments_count_the_values", miscounted, {}),
    ("group_norm_trains_alike_at_small_and_large_batches_and_batch_norm_does_not", trained_by_batch_norm, {}),
    (
        "a_sample_of_a_batch_of_100_and_alone_has_the_same_bits",
        over_the_batch,
        {"layout": "channels first", **FLOAT32, "groups": 4},
    ),
    ("the_number_of_threads_makes_no_difference", by_threads, {"channel_axis": 1}),
    ("layer_and_instance_norm_are_group_norm_with_1_and_c_groups", of_another_eps, FLOAT32),
    ("layer_and_instance_norm_are_the_textbooks", of_another_eps, {}),
    ("layer_and_instance_norm_are_torchs", of_another_eps, {}),
    ("a_quiet_channel_is_squashed_by_a_loud_one_in_its_group", of_equal_groups, TWO),
    ("a_quiet_channel_is_squashed_by_a_loud_one_in_its_group", of_channels, TWO),
    ("diagnostics_name_the_squashed_channel_and_propose_the_grouping_that_frees_it", undiagnosed, TWO),
    ("a_permutation_that_keeps_the_groups_permutes_the_result", weighted_by_place, {"order": test_claims.INSIDE}),
    ("a_permutation_across_groups_changes_the_result", of_one_group, {}),
    ("batch_norm_is_indifferent_to_the_order_of_channels", weighted_by_place, {"order": test_claims.ACROSS}),
    ("permuting_the_labels_along_gives_the_same_bits", of_equal_groups, {"order": test_claims.ACROSS, **FLOAT32}),
    ("the_gradient_follows_the_variance_of_the_group_at_both_ends", without_eps, {}),
    ("the_gradient_of_a_constant_group_is_finite_and_not_zero", without_eps, {}),
    ("the_gradient_of_a_sample_does_not_depend_on_the_batch", over_the_batch, {}),
    ("the_gradient_of_a_sample_does_not_depend_on_the_batch", of_samples_alone, {}),
    ("group_norm_divides_the_contrast_of_each_image_out", with_a_large_eps, FLOAT32),
    ("group_norm_divides_the_contrast_of_each_image_out", over_the_batch, FLOAT32),
    ("batch_norm_leaves_the_spread_of_the_contrasts_behind", of_one_sample, {}),
    ("the_background_of_a_masked_volume_has_no_part_in_the_statistics", without_masks, {}),
    ("tiles_of_a_volume_normalized_with_its_merged_moments_fit_together", of_each_tile, {}),
    ("a_gain_of_its_own_for_each_row_of_a_table_is_divided_out", of_equal_groups, {}),
    ("a_gain_of_its_own_for_each_row_of_a_table_is_divided_out", over_the_batch, {}),
    ("texture_statistics_of_instance_norm_do_not_see_contrast_and_brightness", seen_with_contrast, {}),
]


@pytest.mark.parametrize(
    ("name", "break_it", "arguments"), CASES, ids=[f"{name}-{break_it.__name__}" for name, break_it, _ in CASES]
)
def test_fails_when_broken(
    name: str, break_it: Callable[[], Replacements], arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for function, replacement in break_it().items():
        monkeypatch.setattr(test_claims if hasattr(test_claims, function) else cugn, function, replacement)
    test = getattr(test_claims, f"test_{name}")
    given = {key: value() if callable(value) and key != "dtype" else value for key, value in arguments.items()}
    if "engine" in inspect.signature(test).parameters:
        given["engine"] = ENGINE
    with pytest.raises(AssertionError):
        test(**given)


def test_every_claim_is_broken_once() -> None:
    tests = {name.removeprefix("test_") for name in vars(test_claims) if name.startswith("test_")}
    assert tests == {name for name, _, _ in CASES}
