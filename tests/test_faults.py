"""Promise: threads, fork, spawn, signals, broken caches, no memory: the right answer or a clear exception, no abort.

Each case is a process of its own with a time limit. One that dies by a signal, hangs or has a wrong answer fails.
Those that compile every kernel anew take minutes together and need CUGN_TESTS=all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from libraries import EVERYTHING, subprocess_environment

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork, signals and resource limits are POSIX")
compiles = pytest.mark.skipif(not EVERYTHING, reason="minutes of compiling: set CUGN_TESTS=all")

# `calls(i)` makes calls of several kinds, small and large, and `right(i)` compares them with what the same calls gave
# when the process was young; the first ones are held against NumPy's own arithmetic.
PRELUDE = """
import os, sys, threading, time
import numpy as np
import cugn

rng = np.random.default_rng(0)
SMALL = rng.normal(3, 2, (2, 8, 5, 7)).astype("f4")
LARGE = rng.normal(3, 2, (4, 32, 120, 110)).astype("f4")     # 6.7 MB: several threads take part
HALF = rng.normal(3, 2, (2, 8, 30, 7)).astype("f2")

def calls(i):
    kind = i % 5
    if kind == 0:
        return cugn.group_norm_forward(SMALL, 4)
    if kind == 1:
        return cugn.group_norm_backward(SMALL, SMALL[::-1], 2)
    if kind == 2:
        return cugn.group_norm_forward(LARGE, 8)
    if kind == 3:
        return cugn.group_norm_backward(LARGE, LARGE[::-1], 8)
    return cugn.group_norm_forward(HALF, [0, 1, 1, 0, 1, 1, 0, 0], activation="silu")

EXPECTED = {}

def learn(kinds=range(5)):
    for i in kinds:
        EXPECTED[i] = calls(i)
    for x, groups, i in ((SMALL, 4, 0), (LARGE, 8, 2)):
        if i in EXPECTED:
            parts = x.astype(float).reshape(len(x), groups, -1)
            hat = (parts - parts.mean(2, keepdims=True)) / np.sqrt(parts.var(2, keepdims=True) + 1e-5)
            assert abs(EXPECTED[i].y - hat.reshape(x.shape)).max() < 1e-5

def right(i):
    for value, wanted in zip(calls(i), EXPECTED[i % 5], strict=True):
        assert np.array_equal(value, wanted), f"wrong answer of call {i}"

def rounds(n):
    for i in range(n):
        right(i)
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of compiled kernels of its own, filled once."""
    folder = tmp_path_factory.mktemp("kernels")
    folder.chmod(0o700)
    run("learn(); rounds(5)", cache=folder, limit=300)
    return folder


def run(
    program: str, *, cache: Path | str, limit: float = 120, status: int = 0, prelude: str = PRELUDE, **variables: str
) -> str:
    """Run a program to its end; its output."""
    environment = subprocess_environment(CUGN_CACHE_DIR=str(cache), PYTHONFAULTHANDLER="1", **variables)
    environment.pop("COVERAGE_PROCESS_START", None)
    process = subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(program) + "\nprint('finished')"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # faulthandler then says where everyone stands
        output, errors = process.communicate()
        pytest.fail(f"hangs:\n{output[-2000:]}\n{errors[-6000:]}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status, f"status {process.returncode}:\n{output[-2000:]}\n{errors[-6000:]}"
    if status == 0:
        assert output.rstrip().endswith("finished"), output
    return output


# ------------------------------------------------------------------------------------------------------------ threads

THREADS = """
    failures = []
    def work(n):
        try:
            rounds(n)
        except BaseException as error:
            failures.append(error)
            raise
    def together(n, count=8):
        helpers = [threading.Thread(target=work, args=(n,)) for _ in range(count)]
        [h.start() for h in helpers]; [h.join() for h in helpers]
        assert not failures, failures
"""


def program(*parts: str) -> str:
    """Parts without their common indentation."""
    return "\n".join(textwrap.dedent(part) for part in parts)


@pytest.mark.parametrize("count", ["1", "2", "7"])
def test_threads(kernels: Path, count: str) -> None:
    """Eight Python threads at once, under 1, 2 and 7 threads a call."""
    run(program(THREADS, "learn(); together(20)"), cache=kernels, CUGN_NUM_THREADS=count)


@compiles
def test_first_calls_in_threads(tmp_path: Path) -> None:
    """Eight threads make the first calls of a process, which compile."""
    tmp_path.chmod(0o700)
    run(
        program(
            THREADS,
            """
            results = []
            start = threading.Barrier(8)
            def first():
                start.wait()
                results.append([calls(i) for i in (0, 1)])
            helpers = [threading.Thread(target=first) for _ in range(8)]
            [h.start() for h in helpers]; [h.join() for h in helpers]
            learn((0, 1))
            assert len(results) == 8
            for pair in results:
                for i, result in enumerate(pair):
                    for value, wanted in zip(result, EXPECTED[i], strict=True):
                        assert np.array_equal(value, wanted)
            """,
        ),
        cache=tmp_path,
        limit=300,
    )


def test_nested_pools(kernels: Path) -> None:
    """Pools inside pools, and calls from a callback."""
    run(
        """
        from concurrent.futures import ThreadPoolExecutor
        learn()
        def outer(i):
            right(i)
            with ThreadPoolExecutor(3) as inner:
                list(inner.map(right, range(i, i + 6)))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(outer, range(12)))
            done = pool.submit(right, 2)
            done.add_done_callback(lambda _: right(3))
            done.result()
        """,
        cache=kernels,
    )


def test_dask_threads(kernels: Path) -> None:
    """Chunks in Dask's threads."""
    pytest.importorskip("dask", reason="dask is not installed")
    run(
        """
        import dask.array as da
        learn()
        x = da.from_array(np.concatenate([LARGE] * 4), chunks=(4, 32, 120, 110))
        y = x.map_blocks(lambda block: cugn.group_norm(block, 8), dtype="f4", meta=LARGE[:0])
        for _ in range(3):
            assert np.array_equal(y.compute(scheduler="threads", num_workers=4), np.concatenate([EXPECTED[2].y] * 4))
        """,
        cache=kernels,
    )


def test_beside_the_callers_own_numba(kernels: Path) -> None:
    """A caller's parallel Numba loop runs before, after and beside."""
    run(
        program(
            THREADS,
            """
            import numba
            @numba.njit(parallel=True)
            def total(a):
                s = 0.0
                for i in numba.prange(a.size):
                    s += a[i]
                return s
            ones = np.ones(10**6)
            assert total(ones) == 10**6
            learn()
            stop = []
            def spin():
                while not stop:
                    assert total(ones) == 10**6
            own = threading.Thread(target=spin)
            own.start()
            together(10, 4)
            stop.append(1); own.join()
            assert total(ones) == 10**6
            """,
        ),
        cache=kernels,
    )


def test_no_more_threads_to_be_had(kernels: Path) -> None:
    """Where the system refuses a thread, the calling thread does all the work."""
    run(
        """
        def refuse(self):
            raise RuntimeError("can't start new thread")
        threading.Thread.start = refuse
        learn(); rounds(10)
        """,
        cache=kernels,
        CUGN_NUM_THREADS="8",
    )


def test_without_openmp(kernels: Path) -> None:
    """Numba's own thread layers (libgomp, TBB, its work queue) cannot be loaded: none of them is needed."""
    run(
        program(
            THREADS,
            """
            for layer in ("omppool", "tbbpool", "workqueue"):
                sys.modules[f"numba.np.ufunc.{layer}"] = None
            learn(); together(5)
            """,
        ),
        cache=kernels,
        CUGN_NUM_THREADS="4",
    )


# --------------------------------------------------------------------------------------------------- other processes


@pytest.mark.parametrize("when", ["before the first call", "after", "again and again"])
def test_fork(kernels: Path, when: str) -> None:
    """Parent and child both call, before and after fork, and the child's child too."""
    first = "" if when == "before the first call" else "learn(); rounds(5)"
    run(
        program(
            first,
            f"""
            def child(depth):
                learn(); rounds(5)
                if depth:
                    forked(depth - 1)
            def forked(depth):
                pid = os.fork()
                if pid == 0:
                    status = 1
                    try:
                        child(depth)
                        status = 0
                    finally:
                        os._exit(status)
                assert os.waitpid(pid, 0)[1] == 0, "child failed"
            for _ in range({3 if when == "again and again" else 1}):
                forked(2)
                learn(); rounds(5)
            """,
        ),
        cache=kernels,
    )


def test_fork_while_others_call(kernels: Path) -> None:
    """Forking while other threads are inside calls."""
    run(
        program(
            THREADS,
            """
            learn()
            stop = []
            def busy():
                while not stop:
                    rounds(5)
            helpers = [threading.Thread(target=busy) for _ in range(3)]
            [h.start() for h in helpers]
            for _ in range(10):
                pid = os.fork()
                if pid == 0:
                    status = 1
                    try:
                        rounds(5)
                        status = 0
                    finally:
                        os._exit(status)
                assert os.waitpid(pid, 0)[1] == 0, "child failed"
            stop.append(1); [h.join() for h in helpers]
            """,
        ),
        cache=kernels,
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("pool", ["multiprocessing", "concurrent.futures"])
def test_process_pools(kernels: Path, tmp_path: Path, pool: str, method: str) -> None:
    """Pools of processes, after calls in the parent."""
    script = PRELUDE + program(
        f"""
        def job(i):
            if not EXPECTED:
                learn()
            right(i)
            return float(calls(2)[0].sum())

        if __name__ == "__main__":
            import multiprocessing
            learn()
            context = multiprocessing.get_context({method!r})
            if {pool!r} == "multiprocessing":
                with context.Pool(2) as pool:
                    results = pool.map(job, range(8))
            else:
                from concurrent.futures import ProcessPoolExecutor
                with ProcessPoolExecutor(2, mp_context=context) as pool:
                    results = list(pool.map(job, range(8)))
            assert set(results) == {{float(EXPECTED[2][0].sum())}}
            rounds(5)
        """
    )
    path = tmp_path / "pool.py"
    path.write_text(script)
    run(f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')" if method == "fork" else f"""
        import subprocess
        subprocess.run([sys.executable, {str(path)!r}], check=True, timeout=100)
        """, cache=kernels, prelude="import sys\n")  # fmt: skip


def test_the_choice_of_the_start_method_stays_the_callers(kernels: Path) -> None:
    """No call fixes how multiprocessing starts processes."""
    run("learn(); import multiprocessing; multiprocessing.set_start_method('spawn')", cache=kernels)


# ------------------------------------------------------------------------------------------------------------- caches


@compiles
@pytest.mark.parametrize("place", ["/dev/null/kernels", "/proc/kernels", ""])
def test_cache_that_cannot_be_written(place: str, tmp_path: Path) -> None:
    """No folder for kernels: compiled anew; HOME that is no folder either."""
    home = tmp_path / "file"
    home.write_text("")
    run("learn((0, 1)); right(0)", cache=place, limit=300, HOME=str(home), XDG_CACHE_HOME=str(home))


@compiles
@pytest.mark.parametrize("damage", ["empty", "truncated", "noise", "folders"])
def test_corrupted_cache(kernels: Path, tmp_path: Path, damage: str) -> None:
    """Entries that are empty, cut off, noise, or folders: compiled anew."""
    tmp_path.chmod(0o700)
    entries = [p for p in kernels.iterdir() if p.is_file()]
    assert entries, "the cache is empty"
    for entry in entries:
        data = entry.read_bytes()
        copy = tmp_path / entry.name
        if damage == "folders":
            copy.mkdir()
        else:
            copy.write_bytes(
                {"empty": b"", "truncated": data[: len(data) // 2], "noise": os.urandom(len(data))}[damage]
            )
    run("learn((0, 1)); right(0)", cache=tmp_path, limit=300)


@compiles
def test_processes_that_fill_one_cache(tmp_path: Path) -> None:
    """Four processes compile into the same empty folder at once."""
    tmp_path.chmod(0o700)
    environment = subprocess_environment(CUGN_CACHE_DIR=str(tmp_path))
    command = [sys.executable, "-c", PRELUDE + "learn((0,)); right(0)"]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    run("learn((0,)); right(0)", cache=tmp_path)


def test_kernels_come_from_the_cache(kernels: Path) -> None:
    """A second process compiles nothing: the folder keeps its entries, and the call is quick."""
    before = {p.name: p.stat().st_mtime_ns for p in kernels.iterdir()}
    run("learn(); rounds(5)", cache=kernels)
    assert {p.name: p.stat().st_mtime_ns for p in kernels.iterdir()} == before


# ---------------------------------------------------------------------------------------------------------- processors


@compiles
@pytest.mark.parametrize(
    "variables",
    [{"CUGN_F16C": "0"}, {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}, {"NUMBA_CPU_NAME": "haswell"}],
    ids=["no F16C", "SSE2 alone", "AVX2"],
)
def test_lesser_processors(tmp_path: Path, variables: dict[str, str]) -> None:
    """Without F16C, and without any vectors beyond SSE2: the same values to the dtype's rounding."""
    import platform

    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the features named are those of x86")
    tmp_path.chmod(0o700)
    run(
        """
        import ml_dtypes
        learn((0, 1, 4))
        for dtype in ("f2", ml_dtypes.bfloat16):
            values = np.arange(65536, dtype="u2").view(dtype)
            finite = values[np.isfinite(values.astype("f4"))].reshape(1, 1, -1)
            y = cugn.normalize(finite, np.zeros(1), np.ones(1), 1)   # every value comes back as it was
            assert np.array_equal(y.astype("f4"), finite.astype("f4"))
            y = cugn.group_norm(finite[..., :60000] * 0 + finite[..., 5000:5001], 1)
            assert not y.astype("f4").any()
        """,
        cache=tmp_path,
        limit=400,
        **variables,
    )


# ----------------------------------------------------------------------------------------------- signals and interrupts


def test_keyboard_interrupt(kernels: Path) -> None:
    """Ctrl-C at any moment of a call arrives as KeyboardInterrupt, and later calls are right."""
    run(
        """
        import random, signal
        learn()
        def interrupt(*_):
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, interrupt)
        random.seed(0)
        caught = 0
        end = time.monotonic() + 6
        while time.monotonic() < end:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 5e-3))
                i = 0
                while True:
                    right(i)
                    i += 1
            except KeyboardInterrupt:
                caught += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        assert caught > 30, caught
        rounds(20)
        """,
        cache=kernels,
    )


def test_interrupt_while_compiling(tmp_path: Path) -> None:
    """Ctrl-C during the first call, which compiles, leaves a process whose next calls are right."""
    tmp_path.chmod(0o700)
    run(
        """
        import signal
        import numba, cugn.cpu.compile
        def interrupt(*_):
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, interrupt)
        caught = 0
        for delay in (0.05, 0.3, 0.8, 1.5):
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                calls(0)
            except KeyboardInterrupt:
                caught += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        assert caught
        learn((0, 1)); right(0); right(1)
        """,
        cache=tmp_path,
        limit=300,
    )


@pytest.mark.parametrize(
    "module",
    ["cugn.cpu.geometry", "llvmlite.binding", "numba.core.types", "numba.core.datamodel"],
)
def test_interrupt_while_importing(kernels: Path, module: str) -> None:
    """Ctrl-C during the first call's imports leaves a process whose next calls are right."""
    run(
        f"""
        class Interrupt:
            done = False
            def find_spec(self, name, path=None, target=None):
                if name == {module!r} and not self.done:
                    Interrupt.done = True
                    os.kill(os.getpid(), 2)
        sys.meta_path.insert(0, Interrupt())
        try:
            calls(0)
        except KeyboardInterrupt:
            pass
        assert Interrupt.done
        learn(); rounds(5)
        """,
        cache=kernels,
    )


def test_numba_is_imported_beside_the_main_thread(kernels: Path) -> None:
    """Python keeps parts of an import of Numba that Ctrl-C breaks off, and they cannot be imported again."""
    run(
        """
        seen = []
        class Watch:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("numba", "llvmlite"):
                    seen.append(name)
                    assert threading.current_thread() is not threading.main_thread(), name
        sys.meta_path.insert(0, Watch())
        learn(); rounds(5)
        assert "numba.core.types" in seen
        """,
        cache=kernels,
    )


def test_a_storm_of_signals(kernels: Path) -> None:
    """Handlers that run ten thousand times a second change nothing."""
    run(
        """
        import signal
        count = [0]
        def handler(*_):
            count[0] += 1
        signal.signal(signal.SIGALRM, handler)
        learn()
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        rounds(50)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert count[0] > 10
        """,
        cache=kernels,
    )


def test_termination(kernels: Path) -> None:
    """SIGTERM ends the process at once, with its own status."""
    run(
        """
        import signal
        learn()
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        while True:
            rounds(5)
        """,
        cache=kernels,
        status=-signal.SIGTERM,
    )


@pytest.mark.parametrize("how", ["", "sys.exit(0)", "raise SystemExit"])
def test_the_end_of_the_interpreter(kernels: Path, how: str) -> None:
    """The process ends while daemon threads are inside calls, with a call in an exit handler."""
    run(
        program(
            """
            import atexit
            learn()
            atexit.register(lambda: (right(2), right(0), print("finished")))
            def busy():
                while True:
                    rounds(5)
            for _ in range(3):
                threading.Thread(target=busy, daemon=True).start()
            time.sleep(0.3)
            """,
            how,
        ),
        cache=kernels,
    )


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("threads", ["1", "2"])
def test_no_memory(kernels: Path, threads: str) -> None:
    """A result that does not fit is a MemoryError; what fits is computed, before and after."""
    run(
        """
        import resource
        learn(); rounds(10)
        cugn.batch_norm(LARGE.transpose(0, 2, 3, 1)[:, ::2], channel_axis=-1)    # compiled beforehand
        x = np.ones((8, 16, 4000, 250), "f4")                      # 512 MB
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        # results of 512 and 256 MB; an ended thread's arena, 64 MB that malloc gives back when it likes, is room too
        resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20),) * 2)
        for call in (
            lambda: cugn.group_norm(x, 4),
            lambda: cugn.group_norm_backward(x, x, 4),
            lambda: cugn.batch_norm(x.transpose(0, 2, 3, 1)[:, ::2], channel_axis=-1),
        ):
            try:
                call()
            except MemoryError:
                pass
            else:
                raise AssertionError("there was memory after all")
            right(0); right(1)
        assert cugn.group_norm(x, 4, out=x) is x                   # needs none
        assert not x.any()
        rounds(5)
        """,
        cache=kernels,
        CUGN_NUM_THREADS=threads,
    )


@pytest.mark.parametrize("limit", [60, 120, 200, 220, 240, 260])
def test_no_memory_to_start_with(kernels: Path, limit: int) -> None:
    """Too little memory to import Numba: an exception, or the right answer; no abort."""
    run(
        f"""
        import resource
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ({limit} << 20),) * 2)
        try:
            learn((0,))
        except (MemoryError, ImportError, OSError) as error:
            print(type(error))
        else:
            right(0)
        """,
        cache=kernels,
    )


@pytest.mark.parametrize("room", [1, 32])
def test_no_memory_to_compile(kernels: Path, room: int) -> None:
    """Too little memory to compile a kernel: a MemoryError, or the right answer; no abort."""
    run(
        f"""
        import resource
        learn()
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ({room} << 20), resource.RLIM_INFINITY))
        try:
            y = cugn.group_norm(SMALL.astype("f8"), 4)
        except MemoryError:
            pass
        else:
            assert abs(y - EXPECTED[0].y).max() < 1e-5
        right(0); right(1)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        assert abs(cugn.group_norm(SMALL.astype("f8"), 4) - EXPECTED[0].y).max() < 1e-5
        rounds(5)
        """,
        cache=kernels,
    )


@pytest.mark.parametrize("calls", ["small", pytest.param("shapes", marks=compiles), "large"])
def test_soak(kernels: Path, calls: str) -> None:
    """Calls from 8 threads, checked one by one: memory grows by less than 5 MB after the first tenth.

    CUGN_SOAK_CALLS is their number: 20,000, and 1,000,000 in the long profile.
    """
    number = int(os.environ.get("CUGN_SOAK_CALLS", "20000"))
    number = {"small": number, "shapes": number // 4, "large": number // 100}[calls]
    run(
        f"""
        import gc, resource
        learn()
        NUMBER, KIND = {number}, {calls!r}
        shapes = [(n, c, s) for n in (1, 2, 3) for c in (2, 4, 6) for s in range(1, 200)]
        failures, done = [], [0] * 8
        def one(i):
            if KIND == "small":
                right(i % 2)
            elif KIND == "large":
                right(2 + i % 2)
            else:
                y = cugn.group_norm(np.ones(shapes[i % len(shapes)], "f4"), 2)
                assert not y.any()
        def work(k, number):
            try:
                for i in range(number // 8):
                    one(i)
            except BaseException as error:
                failures.append(error)
                raise
        def together(number):
            helpers = [threading.Thread(target=work, args=(k, number)) for k in range(8)]
            [h.start() for h in helpers]; [h.join() for h in helpers]
            assert not failures, failures
            gc.collect()
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
        # the plans of all shapes, and each thread's own arena of malloc, belong to the start
        first = together(max(NUMBER // 10, 2 * 8 * len(shapes) if KIND == "shapes" else 400))
        grown = together(NUMBER) - first
        print(f"grown by {{grown:.2f}} MB")
        assert grown < 5, grown
        """,
        cache=kernels,
        limit=60 + number / 100,
        # what malloc keeps of freed results of 7 MB, up to one a thread, is no leak: they go back to the system
        MALLOC_MMAP_THRESHOLD_=str(1 << 20),
    )
