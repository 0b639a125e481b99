"""The emulator finds what it promises to find: each kind of fault, planted in a small kernel, named with its line."""

from __future__ import annotations

import numpy as np
import pytest
import simt

pytestmark = pytest.mark.skipif(simt.missing_tools() is not None, reason=str(simt.missing_tools()))


def run(code, *args, grid=1, block=64, name="k", options=(), **launch):
    simt.RawModule(code=code, options=options).get_function(name)((grid,), (block,), args, **launch)


def fault_of(code, *args, **launch):
    """The first fault of a launch, which must have one, at the line marked with `// here`."""
    with pytest.raises(simt.SimtFault) as caught:
        run(code, *args, **launch)
    fault = caught.value.faults[0]
    marked = [i for i, line in enumerate(code.split("\n"), 1) if "// here" in line]
    if marked:
        assert fault.line in marked, str(caught.value)
        assert f"kern.cu:{fault.line}" in str(caught.value)
    assert fault.kind in simt.KINDS
    return fault


def floats(n=64, value=None):
    return simt.Array(shape=n) if value is None else simt.Array(np.full(n, value, np.float32))


# ---------------------------------------------------------------- races


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_missing_barrier_between_write_and_read(seed):
    code = """
    extern "C" __global__ void k(float* y) {
      __shared__ float s[64];
      s[threadIdx.x] = threadIdx.x;  // here: seeds differ in which side comes second
      y[threadIdx.x] = s[63 - threadIdx.x];  // here
    }"""
    with simt.using(seed=seed):
        assert fault_of(code, floats()).kind in {"race-shared", "uninitialised-shared"}


def test_race_is_found_where_values_are_right():
    # The reader comes last in this order, so y is right: only the ordering is missing.
    code = """
    extern "C" __global__ void k(float* y) {
      __shared__ float s;
      if (threadIdx.x == 0) s = 7;
      if (threadIdx.x == 32) y[0] = s;  // here
    }"""
    y = floats()
    assert fault_of(code, y).kind == "race-shared"
    assert y.host[0] == 7


def test_missing_barrier_before_shared_memory_is_written_again():
    code = """
    extern "C" __global__ void k(float* y) {
      __shared__ float s[64];
      s[threadIdx.x] = threadIdx.x;
      __syncthreads();
      y[threadIdx.x] = s[63 - threadIdx.x];  // here
      s[threadIdx.x] = 0;  // here
    }"""
    assert fault_of(code, floats()).kind == "race-shared"


def test_shuffles_order_no_memory():
    code = """
    extern "C" __global__ void k(float* y) {
      __shared__ float s[32];
      s[threadIdx.x] = threadIdx.x;
      float v = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
      y[threadIdx.x] = v + s[threadIdx.x ^ 1];  // here
    }"""
    assert fault_of(code, floats(), block=32).kind == "race-shared"


def test_syncwarp_of_other_lanes_orders_nothing():
    code = """
    extern "C" __global__ void k(float* y) {
      __shared__ float s[32];
      s[threadIdx.x] = threadIdx.x;
      if (threadIdx.x < 16) __syncwarp(0x0000ffffu); else __syncwarp(0xffff0000u);
      y[threadIdx.x] = s[threadIdx.x ^ 16];  // here
    }"""
    assert fault_of(code, floats(), block=32).kind == "race-shared"


def test_syncwarp_does_not_order_other_warps():
    code = """
    extern "C" __global__ void k(float* y) {
      __shared__ float s[64];
      s[threadIdx.x] = threadIdx.x;
      __syncwarp();
      y[threadIdx.x] = s[threadIdx.x ^ 32];  // here
      s[threadIdx.x] = 1;
    }"""
    assert fault_of(code, floats()).kind in {"race-shared", "uninitialised-shared"}


def test_race_in_global_memory():
    code = """
    extern "C" __global__ void k(float* y) {
      y[threadIdx.x / 2] = threadIdx.x;  // here
    }"""
    assert fault_of(code, floats()).kind == "race-global"


def test_race_between_blocks():
    code = """
    extern "C" __global__ void k(float* y) {
      y[threadIdx.x] = blockIdx.x;  // here
    }"""
    fault = fault_of(code, floats(), grid=2)
    assert fault.kind == "race-blocks"
    assert "of block" in fault.message


def test_race_between_overlapping_arguments():
    code = """
    extern "C" __global__ void k(const float* x, float* y) {
      y[threadIdx.x] = x[threadIdx.x + 1];  // here
    }"""
    x = floats(65, 1.0)
    assert fault_of(code, x, x[:64]).kind == "race-global"


def test_plain_store_races_with_atomic():
    code = """
    extern "C" __global__ void k(unsigned* n) {
      if (threadIdx.x == 32) n[0] = 5;  // here
      else if (threadIdx.x == 0) atomicAdd(n, 1u);  // here
    }"""
    assert fault_of(code, simt.Array(np.zeros(1, np.uint32))).kind == "race-global"


# One line at a time is taken out of "the last block sums up"; the whole is in test_simt_order.py.
LAST_BLOCK = """
extern "C" __global__ void k(float* partial, unsigned* ticket, float* y) {
  __shared__ bool last;
  if (threadIdx.x < 8) partial[blockIdx.x * 8 + threadIdx.x] = 1;
  __syncthreads();  // RELEASE BARRIER
  if (threadIdx.x == 0) {
    __threadfence();  // RELEASE FENCE
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();  // ACQUIRE FENCE
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < 8 * gridDim.x; i++) sum += partial[i];
    y[0] = sum;
  }
}"""


@pytest.mark.parametrize("line", ["RELEASE BARRIER", "RELEASE FENCE", "ACQUIRE FENCE"])
@pytest.mark.parametrize("seed", [0, 5])
def test_last_block_needs_each_of_its_fences(line, seed):
    code = "\n".join("" if line in text else text for text in LAST_BLOCK.split("\n"))
    with simt.using(seed=seed):
        fault = fault_of(code, floats(24), simt.Array(np.zeros(1, np.uint32)), floats(1), grid=3)
    assert fault.kind == "race-blocks"
    assert "sum += partial[i]" in fault.source


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize("offset", [-1, 64, 900])
def test_out_of_bounds(offset):
    code = """
    extern "C" __global__ void k(float* y, int offset) {
      if (threadIdx.x == 0) y[offset] = 1;  // here
    }"""
    fault = fault_of(code, floats(), np.int32(offset))
    assert fault.kind == "out-of-bounds"
    assert f"at byte {4 * offset} of y, which has 256" in fault.message


def test_out_of_bounds_of_a_view():
    # inside the allocation, outside the argument
    code = """
    extern "C" __global__ void k(const float* x, float* y) {
      y[threadIdx.x] = x[threadIdx.x + 1];  // here
    }"""
    assert fault_of(code, floats(128, 1.0)[:64], floats()).kind == "out-of-bounds"


def test_last_bytes_of_a_wide_access_count():
    code = """
    extern "C" __global__ void k(const float4* x, float4* y) {
      y[threadIdx.x] = x[threadIdx.x];  // here
    }"""
    assert fault_of(code, floats(62, 1.0), floats(), block=16).kind == "out-of-bounds"


def test_null_and_wild_pointers():
    code = """
    extern "C" __global__ void k(const float* x, float* y) {
      y[threadIdx.x] = x[threadIdx.x];  // here
    }"""
    assert "null" in fault_of(code, None, floats()).message
    assert "wild" in fault_of(code, np.uint64(1 << 40), floats()).message


def test_too_little_dynamic_shared_memory():
    code = """
    extern "C" __global__ void k(float* y) {
      extern __shared__ float s[];
      s[threadIdx.x] = 1;  // here
      y[threadIdx.x] = s[threadIdx.x];
    }"""
    run(code, floats(), shared_mem=256)
    fault = fault_of(code, floats(), shared_mem=252)
    assert fault.kind == "out-of-bounds"
    assert "the launch gave 252" in fault.message


@pytest.mark.parametrize(("type_", "size"), [("float2", 8), ("float4", 16), ("double", 8), ("short4", 8)])
def test_misaligned(type_, size):
    code = f"""
    extern "C" __global__ void k(const float* x, {type_}* y) {{
      y[threadIdx.x] = *reinterpret_cast<const {type_}*>(x + 1);  // here
    }}"""
    fault = fault_of(code, floats(8, 1.0), simt.Array(np.zeros(32, np.uint8)), block=1)
    assert fault.kind == "misaligned"
    assert f"{size} bytes" in fault.message


def test_misaligned_shared():
    code = """
    extern "C" __global__ void k(float2* y, int offset) {
      __shared__ __align__(16) float s[8];
      s[threadIdx.x] = 1;
      __syncthreads();
      y[threadIdx.x] = *reinterpret_cast<float2*>(s + offset);  // here
    }"""
    assert fault_of(code, floats(16), np.int32(1), block=8).kind == "misaligned"


def test_store_to_const():
    code = """
    extern "C" __global__ void k(const float* x) {
      const_cast<float*>(x)[threadIdx.x] = 1;  // here
    }"""
    assert fault_of(code, floats(64, 1.0)).kind == "const-write"


def test_store_to_a_variable_at_file_scope():
    code = """
    __device__ int counter = 0;
    extern "C" __global__ void k(int* y) {
      y[threadIdx.x] = counter;
      counter = 1;  // here
    }"""
    assert fault_of(code, simt.Array(shape=1, dtype=np.int32), block=1).kind == "wild"


# ---------------------------------------------------------------- values that are not there


def test_uninitialised_shared_memory():
    code = """
    extern "C" __global__ void k(float* y) {
      __shared__ float s[64];
      if (threadIdx.x > 0) s[threadIdx.x] = 1;
      __syncthreads();
      y[threadIdx.x] = s[threadIdx.x];  // here
    }"""
    fault = fault_of(code, floats())
    assert fault.kind == "uninitialised-shared"
    assert fault.thread == (0, 0, 0)


COPY = """
    __device__ void copy(void* to, const void* from) {
      const size_t address = __cvta_generic_to_shared(to);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "l"(address), "l"(from) : "memory");
    }
    extern "C" __global__ void k(const float* x, float* y) {
      __shared__ alignas(16) float s[256];
      copy(s + 4 * threadIdx.x, x + 4 * threadIdx.x);
      WAIT
      BARRIER
      for (int i = threadIdx.x; i < 256; i += 64) y[i] = s[i];
    }"""
WAIT, BARRIER = 'asm volatile("cp.async.wait_all;" : : : "memory");', "__syncthreads();"


def test_asynchronous_copies_arrive():
    x, y = simt.Array(np.arange(256, dtype=np.float32)), floats(256)
    run(COPY.replace("WAIT", WAIT).replace("BARRIER", BARRIER), x, y)
    np.testing.assert_array_equal(y.host, x.host)


def test_asynchronous_copies_that_nobody_waits_for():
    code = COPY.replace("WAIT", "").replace("BARRIER", BARRIER)
    assert fault_of(code, floats(256, 1.0), floats(256)).kind == "uninitialised-shared"


def test_asynchronous_copies_of_others_need_a_barrier():
    code = COPY.replace("WAIT", WAIT).replace("BARRIER", "")
    with pytest.raises(simt.SimtFault) as caught:
        run(code, floats(256, 1.0), floats(256))
    assert {fault.kind for fault in caught.value.faults} <= {"race-shared", "uninitialised-shared"}


def test_shared_memory_of_the_previous_block_is_uninitialised():
    code = """
    extern "C" __global__ void k(float* y) {
      __shared__ float s[64];
      if (blockIdx.x == 0) s[threadIdx.x] = 1;
      __syncthreads();
      y[blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x];  // here
    }"""
    fault = fault_of(code, floats(128), grid=2)
    assert (fault.kind, fault.block) == ("uninitialised-shared", (1, 0, 0))


def test_uninitialised_global_memory():
    code = """
    extern "C" __global__ void k(const float* x, float* y) {
      y[threadIdx.x] = x[threadIdx.x];  // here
    }"""
    assert fault_of(code, floats(), floats()).kind == "uninitialised-global"


def test_partly_uninitialised_vector():
    code = """
    extern "C" __global__ void k(float* x, float4* y) {
      if (threadIdx.x != 13) x[threadIdx.x] = 1;
      __syncthreads();
      if (threadIdx.x < 16) y[threadIdx.x] = reinterpret_cast<float4*>(x)[threadIdx.x];  // here
    }"""
    fault = fault_of(code, floats(), floats())
    assert (fault.kind, fault.thread, fault.count) == ("uninitialised-global", (3, 0, 0), 1)


def test_atomic_on_uninitialised_counter():
    code = """
    extern "C" __global__ void k(unsigned* n) {
      atomicAdd(n, 1u);  // here
    }"""
    assert fault_of(code, simt.Array(shape=1, dtype=np.uint32)).kind == "uninitialised-global"


def test_a_kernel_initialises_for_the_next_one():
    code = """
    extern "C" __global__ void k(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }"""
    x, y, z = floats(64, 1.0), floats(), floats()
    run(code, x, y)
    run(code, y, z)
    fast = floats()
    with simt.using(mode="fast"):
        run(code, z, fast)
    run(code, fast, z)
    assert (z.host == 1).all()


# ---------------------------------------------------------------- barriers and masks


def test_barrier_in_divergent_code():
    code = """
    extern "C" __global__ void k(float* y) {
      if (threadIdx.x < 16)
        __syncthreads();  // here
      y[threadIdx.x] = 1;
    }"""
    fault = fault_of(code, floats())
    assert fault.kind == "divergent-barrier"
    assert "16 threads wait" in fault.message
    assert "48 have left" in fault.message


def test_two_different_barriers():
    code = """
    extern "C" __global__ void k(float* y) {
      if (threadIdx.x < 32)
        __syncthreads();  // here
      else
        __syncthreads();  // here
      y[threadIdx.x] = 1;
    }"""
    fault = fault_of(code, floats())
    assert fault.kind == "divergent-barrier"
    assert "line 4" in fault.message
    assert "line 6" in fault.message


def test_early_return_before_a_barrier():
    code = """
    extern "C" __global__ void k(float* y, int n) {
      if (threadIdx.x >= n) return;
      __syncthreads();  // here
      y[threadIdx.x] = 1;
    }"""
    run(code, floats(), np.int32(64))
    assert fault_of(code, floats(), np.int32(40)).kind == "divergent-barrier"


def test_divergent_shuffles():
    code = """
    extern "C" __global__ void k(float* y) {
      float v = threadIdx.x;
      if (threadIdx.x % 32 < 16)
        v = __shfl_xor_sync(0xffffffffu, v, 1);  // here
      else
        v = __shfl_down_sync(0xffffffffu, v, 1);
      y[threadIdx.x] = v;
    }"""
    fault = fault_of(code, floats())
    assert fault.kind == "deadlock"
    assert "__shfl_down_sync in line 7" in fault.message


def test_shuffle_reads_a_lane_outside_its_mask():
    code = """
    extern "C" __global__ void k(float* y) {
      float v = threadIdx.x;
      if (threadIdx.x < 16)
        v += __shfl_xor_sync(0x0000ffffu, v, 16);  // here
      y[threadIdx.x] = v;
    }"""
    assert fault_of(code, floats()).kind == "bad-mask"


def test_caller_outside_its_mask():
    code = """
    extern "C" __global__ void k(float* y) {
      y[threadIdx.x] = __shfl_sync(0x7fffffffu, 1.0f, 0);  // here
    }"""
    fault = fault_of(code, floats(), block=32)
    assert fault.kind == "bad-mask"
    assert fault.thread == (31, 0, 0)


def test_shuffle_reads_a_lane_that_does_not_exist():
    # 40 threads: the second warp has 8 lanes, lane 0 would read lane 16
    code = """
    extern "C" __global__ void k(float* y) {
      float v = 1;
      v += __shfl_xor_sync(0xffffffffu, v, 16);  // here
      y[threadIdx.x] = v;
    }"""
    run(code, floats())
    assert fault_of(code, floats(), block=40).kind == "bad-mask"


def test_loop_without_end():
    code = """
    extern "C" __global__ void k(volatile float* y) {
      while (y[0] == 0) {}  // here
    }"""
    with simt.using(access_limit=10_000):
        assert fault_of(code, floats(1, 0.0), block=1).kind == "runaway"


def test_trap():
    code = """
    extern "C" __global__ void k(float* y) {
      if (threadIdx.x == 5) __trap();  // here
    }"""
    fault = fault_of(code, floats())
    assert (fault.kind, fault.thread) == ("trap", (5, 0, 0))


# ---------------------------------------------------------------- launches and arguments

PARAMETERS = """
struct Shape { int n, c; };
extern "C" __global__ void __launch_bounds__(128) k(float* y, int n, float a, long long big, double d, Shape shape) {
  if (threadIdx.x == 0) { y[0] = n; y[1] = a; y[2] = big; y[3] = d; y[4] = shape.n; y[5] = shape.c; }
}"""
SHAPE = np.array((5, 6), dtype=[("n", np.int32), ("c", np.int32)])
GOOD = (np.int32(1), np.float32(2), np.int64(3), np.float64(4), SHAPE)


def test_arguments_arrive():
    y = floats(6)
    run(PARAMETERS, y, *GOOD)
    assert y.host.tolist() == [1, 2, 3, 4, 5, 6]
    run(PARAMETERS, y, *GOOD[:2], 7, 8.0, SHAPE)  # CuPy passes Python's int and float as 8 bytes
    assert y.host.tolist() == [1, 2, 7, 8, 5, 6]


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, 1, "n: Python int, which CuPy passes as int64"),
        (1, np.int64(1), "n: int64"),
        (1, np.float32(1), "n: float32"),
        (2, 2.0, "a: Python float, which CuPy passes as float64"),
        (2, np.int32(2), "a: int32"),
        (3, np.int32(3), "big: int32"),
        (4, np.float32(4), "d: float32"),
        (5, np.int64(5), "shape: int64"),
        (0, np.zeros(6, np.float32), "y: ndarray given for a pointer"),
        (0, np.float32(0), "y: float32 given for a pointer"),
        (2, "2", "a: str given for a value"),
    ],
)
def test_wrong_argument(position, value, message):
    arguments = [floats(6), *GOOD]
    arguments[position] = value
    fault = fault_of(PARAMETERS, *arguments)
    assert fault.kind == "argument"
    assert message in fault.message


def test_wrong_number_of_arguments():
    assert "5 arguments given, the kernel takes 6" in fault_of(PARAMETERS, floats(6), *GOOD[:-1]).message
    assert "7 arguments given, the kernel takes 6" in fault_of(PARAMETERS, floats(6), *GOOD, 1).message


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"block": 129}, "__launch_bounds__ says 128"),
        ({"block": 1025}, "at most 1024 threads"),
        ({"block": 0}, "at most 1024 threads"),
        ({"grid": 0}, "at least 1"),
        ({"grid": 2**31}, "at most"),
        ({"shared_mem": (48 << 10) + 1}, "max_dynamic_shared_size_bytes is 49152"),
    ],
)
def test_launch_that_a_device_refuses(launch, message):
    fault = fault_of(PARAMETERS, floats(6), *GOOD, **launch)
    assert fault.kind == "launch"
    assert message in fault.message


def test_more_shared_memory_has_to_be_asked_for():
    kernel = simt.RawModule(code=PARAMETERS).get_function("k")
    kernel.max_dynamic_shared_size_bytes = 227 << 10
    kernel((1,), (32,), (floats(6), *GOOD), shared_mem=227 << 10)
    with pytest.raises(simt.SimtFault, match="the device has 232448"):
        kernel.max_dynamic_shared_size_bytes = (227 << 10) + 1


def test_fast_mode_finds_stores_beside_an_allocation():
    code = """
    extern "C" __global__ void k(float* y) { y[threadIdx.x + 1] = 1; }"""
    with simt.using(mode="fast"):
        assert fault_of(code, floats()).kind == "guard"


def test_faults_are_collected_and_counted():
    code = """
    extern "C" __global__ void k(const float* x, const float* w, float* y) {
      y[threadIdx.x] = x[threadIdx.x]
        + w[threadIdx.x];
    }"""
    with pytest.raises(simt.SimtFault) as caught:
        run(code, floats(), floats(), floats())
    assert [(f.line, f.count) for f in caught.value.faults] == [(3, 64), (4, 64)]


def test_inlined_functions_name_their_caller():
    code = """
    __device__ __forceinline__ float get(const float* x) {
      return x[threadIdx.x];  // here
    }
    extern "C" __global__ void k(const float* x, float* y) {
      y[threadIdx.x] = get(x);
    }"""
    assert "in get, called from kern.cu:6" in fault_of(code, floats(), floats()).message


def test_line_directives_name_the_file():
    code = """
#line 10 "box.cuh"
    extern "C" __global__ void k(const float* x, float* y) {
      y[threadIdx.x] = x[threadIdx.x];
    }"""
    with pytest.raises(simt.SimtFault, match=r"box\.cuh:11"):
        run(code, floats(), floats())


def test_what_the_compiler_says_is_shown():
    with pytest.raises(simt.BuildError, match="undeclared_thing"):
        run('extern "C" __global__ void k(float* y) { y[0] = undeclared_thing; }', floats())


def test_unknown_kernel():
    with pytest.raises(AttributeError, match="no kernel 'other'"):
        run('extern "C" __global__ void k(float* y) { y[0] = 1; }', floats(), name="other")


def test_launch_bounds_are_expressions():
    code = """
    #define BOUNDS __launch_bounds__(WIDE || 3 >= 2 ? 64 : 32, (2 > 1) ? 3 : 2)
    extern "C" __global__ void BOUNDS k(float* y) { y[threadIdx.x] = 1; }"""
    run(code, floats(64), options=("-DWIDE=0",))
    assert "__launch_bounds__ says 64" in fault_of(code, floats(96), block=96, options=("-DWIDE=0",)).message
