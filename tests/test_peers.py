"""The comparison with other libraries times the same computation in all of them, and reports what it measured."""

import importlib.util
import json

import comparison
import numpy as np
import peers
import pytest

SMALL = {(2, 32, 9, 7): 4, (8, 64): 8, (1, 16, 5, 6, 7): 4}
# Of the largest element. Peers sum 16-bit types in float32 and round twice; ONNX has eps in float32 (1e-5 to 3e-8).
TOLERANCE = {"float32": 1e-5, "float64": 1e-6, "float16": 4e-3, "bfloat16": 3e-2}


@pytest.mark.parametrize("library", comparison.PEERS)
@pytest.mark.parametrize("layout", peers.LAYOUTS)
@pytest.mark.parametrize("dtype", peers.DTYPES)
@pytest.mark.parametrize("operation", comparison.TABLE)
def test_peers_compute_the_same(operation, dtype, layout, library):
    if not importlib.util.find_spec(library):
        pytest.skip(f"{library} is not installed")
    for shape, groups in SMALL.items() if dtype == "float32" else [*SMALL.items()][:1]:
        problem = comparison.Problem(shape, groups, dtype, layout)
        ours = comparison.TABLE[operation]["cugn"](problem)()
        try:
            theirs = comparison.TABLE[operation][library](problem)()
        except comparison.Unsupported as reason:
            pytest.skip(f"{library}: {reason}")
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            our, their = (comparison.as_numpy(problem, array).astype(float) for array in (our, their))
            np.testing.assert_allclose(their, our, rtol=0, atol=TOLERANCE[dtype] * np.abs(our).max())


@pytest.mark.parametrize("operation", comparison.TABLE)
def test_out_and_fresh_are_the_same_bits(operation):
    problem = comparison.Problem((2, 32, 9, 7), 4, "float32", "channels_last")
    table = comparison.TABLE[operation]
    for kept, fresh in zip(table["cugn"](problem)(), table["cugn fresh"](problem)(), strict=True):
        np.testing.assert_array_equal(kept, fresh)
    call = table["cugn"](problem)
    assert call()[0] is call()[0]


def test_layouts_hold_the_same_values():
    first, last = (comparison.Problem((2, 32, 9, 7), 4, "float16", layout) for layout in peers.LAYOUTS)
    np.testing.assert_array_equal(first.x, np.moveaxis(last.x, -1, 1))
    assert last.x.flags.c_contiguous


def row(seconds, **changes):
    case = {"name": "n", "operation": "forward", "shape": (2, 3), "groups": 1, "dtype": "float32"}
    return {**case, "layout": "channels_first", "nbytes": 24, "seconds": seconds, **changes}


def test_ratios_take_the_best_peer():
    seconds = {"copy": 1.0, "cugn": 2.0, "cugn fresh": 4.0, "torch": 8.0, "jax": 6.0}
    assert peers.ratios(row(seconds)) == {"peer / cugn": 3.0, "peer / fresh": 1.5, "cugn / copy": 2.0}


def test_summary_has_geometric_means_and_the_worst_case():
    seconds = {"copy": 1.0, "cugn": 1.0, "cugn fresh": 1.0}
    rows = [row({**seconds, "torch": 2.0}), row({**seconds, "torch": 8.0}, name="slow")]
    rows.append(row({**seconds, "torch": 0.5}, operation="backward", name="worst", nbytes=2**25))
    lines = peers.summary(rows).splitlines()
    assert lines[2] == "| forward | float32 | 2 | 4.00 | 2.00 | 4.00 | 2.00 | - |"
    assert lines[3] == "| backward | float32 | 1 | 0.50 | 0.50 | 0.50 | 0.50 | 1.00 |"
    assert lines[4].startswith("| both | all | 3 | 2.00 | 0.50 |")
    assert lines[-1] == "Worst case: backward of worst (2, 3) G=1, float32, channels_first."


def test_a_library_that_computes_something_else_is_found():
    case = peers.cases(("tiny",), ("float32",), ("channels_first",))[0]
    assert not peers.others(case, {"cugn": [[1.0, 2.0]], "torch": [[1.0, 2.00001]]})
    assert peers.others(case, {"cugn": [[1.0, 2.0]], "torch": [[1.0, 2.1]]}) == {"torch": pytest.approx(0.05)}
    assert np.isnan(peers.others(case, {"cugn": [[1.0, 2.0]], "torch": [[1.0, float("nan")]]})["torch"])


class Answering(peers.Library):
    def __init__(self, name, value):
        self.name, self.value = name, value

    def ask(self, **question):
        return {"seconds": 1e-3, "sample": [[1.0, self.value]]}


def test_a_library_that_computes_something_else_is_told_and_left_out(capsys):
    case = peers.cases(("tiny",), ("float32",), ("channels_first",))[0]
    libraries = [Answering("copy", 0.0), Answering("cugn", 2.0), Answering("torch", 2.1), Answering("jax", 2.0)]
    assert set(peers.measure(case, libraries)) == {"copy", "cugn", "jax"}
    assert "left out: torch differs from cugn by 0.05" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"cugn fresh differs from cugn by 0\.05"):
        peers.measure(case, [*libraries, Answering("cugn fresh", 2.1)])


def test_a_failing_library_is_told_not_left_out():
    case = peers.cases(("tiny",), ("float32",), ("channels_first",))[0]
    library = peers.Library("cugn")
    try:
        with pytest.raises(RuntimeError, match="cugn: KeyError: 'sideward'"):
            library.ask(case={**peers.asdict(case), "operation": "sideward"})
    finally:
        library.close()


def test_run_saves_what_it_prints(tmp_path, capsys):
    output = tmp_path / "new" / "peers"
    chosen = ["--shapes", "tiny", "--dtypes", "float32", "--layouts", "channels_first", "--output", str(output)]
    has_torch = importlib.util.find_spec("torch") is not None
    peers.main([*chosen, "--peers", *(["torch"] if has_torch else [])])
    printed = capsys.readouterr().out
    saved = json.loads(output.with_suffix(".json").read_text())
    assert [case["operation"] for case in saved["cases"]] == ["forward", "backward"]
    wanted = {"copy", "cugn", "cugn fresh"} | ({"torch"} if has_torch else set())
    for case in saved["cases"]:
        assert set(case["seconds"]) == wanted
        assert all(1e-8 < seconds < 1 for seconds in case["seconds"].values())
        assert peers.line(case, ("torch",) if has_torch else ()) in printed
    assert saved["machine"]["numpy"] == np.__version__
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
