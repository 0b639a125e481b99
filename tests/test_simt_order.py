"""Correct kernels raise nothing, whatever the order of threads, warps and blocks, and compute what they should."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import simt

pytestmark = pytest.mark.skipif(simt.missing_tools() is not None, reason=str(simt.missing_tools()))

ORDERS = [
    pytest.param({"mode": "check"}, id="in-order"),
    *(pytest.param({"mode": "check", "seed": seed}, id=f"seed-{seed}") for seed in (1, 2, 3)),
    pytest.param({"mode": "check", "seed": 4, "preempt": 300}, id="preempted"),
    pytest.param({"mode": "fast"}, id="fast"),
    pytest.param({"mode": "fast", "seed": 5}, id="fast-seed-5"),
    pytest.param({"mode": "fast", "contract": True}, id="fast-contract"),
]


@pytest.fixture(params=ORDERS)
def order(request):
    with simt.using(**request.param):
        yield


def run(code, *args, grid=1, block=64, **launch):
    kernel = simt.RawModule(code=code).get_function("k")
    grid, block = (grid if isinstance(grid, tuple) else (grid,)), (block if isinstance(block, tuple) else (block,))
    kernel(grid, block, args, **launch)
    return kernel.last


def counted(n):
    return simt.Array(np.arange(n, dtype=np.float32))


def fresh(n, dtype=np.float32):
    return simt.Array(shape=n, dtype=dtype)


@pytest.mark.usefixtures("order")
def test_block_reduction_by_shuffles():
    code = """
    extern "C" __global__ void k(const float* x, float* y, int n) {
      __shared__ float part[32];
      const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
      for (int round = 0; round < 3; round++) {
        float v = 0;
        for (int i = threadIdx.x; i < n; i += blockDim.x) v += x[i];
        for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
        __syncthreads();
        if (lane == 0) part[warp] = v;
        __syncthreads();
        v = lane < warps ? part[lane] : 0;
        for (int o = 16; o; o >>= 1) v += __shfl_down_sync(0xffffffffu, v, o);
        if (threadIdx.x == 0) y[round] = v;
      }
    }"""
    y = fresh(3)
    run(code, counted(777), y, np.int32(777), block=256)
    assert (y.host == 777 * 776 / 2).all()


@pytest.mark.usefixtures("order")
def test_warp_synchronous_shared_memory():
    code = """
    extern "C" __global__ void k(float* y) {
      __shared__ float s[2][32];
      float* mine = s[threadIdx.x >> 5];
      const int lane = threadIdx.x & 31;
      mine[lane] = threadIdx.x;
      __syncwarp();
      for (int o = 16; o; o >>= 1) {
        const float v = lane < o ? mine[lane + o] : 0;
        __syncwarp();
        if (lane < o) mine[lane] += v;
        __syncwarp();
      }
      y[threadIdx.x] = mine[0];
    }"""
    y = fresh(64)
    run(code, y)
    assert (y.host[:32] == sum(range(32))).all()
    assert (y.host[32:] == sum(range(32, 64))).all()


@pytest.mark.usefixtures("order")
def test_parts_of_a_warp_on_their_own():
    # Eight lanes a group, each with its mask, in a loop whose length differs from group to group.
    code = """
    extern "C" __global__ void k(float* y) {
      __shared__ float s[64];
      const unsigned mask = 0xffu << (threadIdx.x & 24);
      for (int i = 0; i <= (threadIdx.x >> 3); i++) {
        s[threadIdx.x] = threadIdx.x + i;
        __syncwarp(mask);
        float v = s[threadIdx.x ^ 1] + __shfl_xor_sync(mask, 1.0f, 4);
        for (int o = 4; o; o >>= 1) v += __shfl_xor_sync(mask, v, o, 8);
        y[threadIdx.x] = v;
        __syncwarp(mask);
      }
    }"""
    y = fresh(64)
    run(code, y)
    group = np.arange(64) // 8
    assert (y.host == 8 * (8 * group + group + 1) + 28).all()


@pytest.mark.usefixtures("order")
def test_double_buffer_with_one_barrier_a_step():
    code = """
    extern "C" __global__ void k(float* y) {
      __shared__ float s[2][64];
      s[0][threadIdx.x] = threadIdx.x;
      for (int i = 0; i < 5; i++) {
        __syncthreads();
        s[1 - i % 2][threadIdx.x] = s[i % 2][(threadIdx.x + 1) % 64];
      }
      y[threadIdx.x] = s[1][threadIdx.x];
    }"""
    y = fresh(64)
    run(code, y)
    assert (y.host == (np.arange(64) + 5) % 64).all()


# Four ways to let the last block sum up, all of them in order.
PARTIAL = "for (int i = threadIdx.x; i < 100; i += blockDim.x) partial[blockIdx.x * 100 + i] = blockIdx.x + i;"
TOTAL = """
      if (last) {
        float sum = 0;
        for (int i = threadIdx.x; i < 100 * gridDim.x; i += blockDim.x) sum += partial[i];
        for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
        if (threadIdx.x == 0) y[0] = sum;
        if (threadIdx.x == 0) *ticket = 0;
      }"""
LAST_BLOCK = {
    "one thread fences for its block": """
      __syncthreads();
      if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(ticket, 1u) == gridDim.x - 1;
        __threadfence();
      }
      __syncthreads();""",
    "each writer and each reader fences": """
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == gridDim.x - 1;
      __syncthreads();
      if (last) __threadfence();""",
    "within a warp": """
      __syncwarp();
      if (threadIdx.x == 0) {
        __threadfence();
        last = atomicInc(ticket, gridDim.x) == gridDim.x - 1;
        __threadfence();
      }
      __syncwarp();""",
    "writers fence within a warp": """
      __threadfence();
      __syncwarp();
      if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == gridDim.x - 1;
      __syncwarp();
      __threadfence();""",
}


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("how", LAST_BLOCK)
def test_last_block_sums_up(how):
    code = f"""
    extern "C" __global__ void k(float* partial, unsigned* ticket, float* y) {{
      __shared__ bool last;
      {PARTIAL}{LAST_BLOCK[how]}{TOTAL}
    }}"""
    ticket, y = simt.Array(np.zeros(1, np.uint32)), fresh(1)
    for _ in range(2):  # the last block sets the ticket back for the next launch
        run(code, fresh(700), ticket, y, grid=7, block=32)
        assert y.host[0] == 700 * 3 + 7 * 4950
        assert ticket.host[0] == 0


@pytest.mark.usefixtures("order")
def test_tickets_in_two_levels():
    # The last block of each group adds up the group, the last of those adds up the groups: what the first level
    # released reaches the last block through the second.
    code = """
    __device__ bool last_of(unsigned* ticket, unsigned n) {
      __shared__ bool last;
      __syncthreads();
      if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(ticket, 1u) == n - 1;
        __threadfence();
      }
      __syncthreads();
      return last;
    }
    extern "C" __global__ void k(float* partial, float* group, unsigned* tickets, float* y) {
      const int g = blockIdx.x / 4;
      if (threadIdx.x == 0) partial[blockIdx.x] = blockIdx.x;
      if (!last_of(tickets + g, 4)) return;
      if (threadIdx.x == 1) group[g] = partial[4 * g] + partial[4 * g + 1] + partial[4 * g + 2] + partial[4 * g + 3];
      if (!last_of(tickets + 3, 3)) return;
      if (threadIdx.x == 2) y[0] = group[0] + group[1] + group[2];
      if (threadIdx.x < 12) y[1 + threadIdx.x] = partial[threadIdx.x];
    }"""
    y = fresh(13)
    run(code, fresh(12), fresh(3), simt.Array(np.zeros(4, np.uint32)), y, grid=12)
    assert y.host.tolist() == [66, *range(12)]


@pytest.mark.usefixtures("order")
def test_atomics():
    code = """
    extern "C" __global__ void k(const int* x, unsigned* counts, int* extremes, double* total, int n) {
      __shared__ unsigned local[8];
      if (threadIdx.x < 8) local[threadIdx.x] = 0;
      __syncthreads();
      const int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i < n) {
        atomicAdd(&local[x[i] % 8], 1);
        atomicMin(&extremes[0], x[i]);
        atomicMax(&extremes[1], x[i]);
        atomicAdd(total, x[i]);
      }
      __syncthreads();
      if (threadIdx.x < 8) atomicAdd(&counts[threadIdx.x], local[threadIdx.x]);
    }"""
    x = np.random.default_rng(0).integers(0, 1000, 300, dtype=np.int32)
    counts, extremes = simt.Array(np.zeros(8, np.uint32)), simt.Array(np.array([1000, -1], np.int32))
    total = simt.Array(np.zeros(1))
    run(code, simt.Array(x), counts, extremes, total, np.int32(300), grid=5)
    assert (counts.host == np.bincount(x % 8, minlength=8)).all()
    assert extremes.host.tolist() == [x.min(), x.max()]
    assert total.host[0] == x.sum()


@pytest.mark.usefixtures("order")
def test_in_place_through_shared_memory():
    code = """
    extern "C" __global__ void k(const float* x, float* y) {
      __shared__ float s[64];
      const int i = blockIdx.x * 64;
      s[threadIdx.x] = x[i + threadIdx.x];
      __syncthreads();
      y[i + threadIdx.x] = s[63 - threadIdx.x];
    }"""
    x = counted(256)
    run(code, x, x, grid=4)
    assert (x.host.reshape(4, 64)[:, ::-1].ravel() == np.arange(256)).all()


@pytest.mark.usefixtures("order")
def test_vectors_with_scalar_ends():
    # The same buffers in 16-byte and in 4-byte pieces, by different threads.
    code = """
    extern "C" __global__ void k(const float* __restrict__ x, float* __restrict__ y, int n) {
      for (int i = threadIdx.x; i < n / 4; i += blockDim.x) {
        float4 v = __ldg(reinterpret_cast<const float4*>(x) + i);
        v.x += 1, v.y += 1, v.z += 1, v.w += 1;
        reinterpret_cast<float4*>(y)[i] = v;
      }
      const int tail = n / 4 * 4 + threadIdx.x;
      if (tail < n) y[tail] = x[tail] + 1;
    }"""
    y = fresh(203)
    run(code, counted(203), y, np.int32(203), block=32)
    assert (y.host == np.arange(203) + 1).all()


@pytest.mark.usefixtures("order")
def test_halves_of_words_by_different_threads():
    code = """
    extern "C" __global__ void k(const unsigned short* x, unsigned short* y) {
      __shared__ unsigned short s[64];
      s[threadIdx.x] = x[threadIdx.x];
      y[threadIdx.x] = s[threadIdx.x];
    }"""
    x = np.arange(64, dtype=np.uint16)
    y = fresh(64, np.uint16)
    run(code, simt.Array(x), y)
    assert (y.host == x).all()


@pytest.mark.usefixtures("order")
def test_warps_that_leave_early():
    code = """
    extern "C" __global__ void k(float* y, int n) {
      const int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i >= n) return;
      float v = i;
      if ((i | 31) < n) v += __shfl_xor_sync(0xffffffffu, v, 1);
      y[i] = v;
    }"""
    y = fresh(100)
    run(code, y, np.int32(100), grid=2)
    i = np.arange(100)
    assert (y.host == np.where(i < 96, i + (i ^ 1), i)).all()


@pytest.mark.usefixtures("order")
def test_static_and_dynamic_shared_memory_side_by_side():
    code = """
    extern __shared__ float4 dynamic[];
    extern "C" __global__ void k(float* y) {
      __shared__ float fixed[64];
      float* s = reinterpret_cast<float*>(dynamic);
      s[threadIdx.x] = threadIdx.x;
      fixed[threadIdx.x] = 100;
      __syncthreads();
      y[threadIdx.x] = s[63 - threadIdx.x] + fixed[threadIdx.x ^ 1];
    }"""
    y = fresh(64)
    run(code, y, shared_mem=256)
    assert (y.host == 163 - np.arange(64)).all()


@pytest.mark.usefixtures("order")
def test_grids_and_blocks_of_three_dimensions():
    code = """
    extern "C" __global__ void k(int* y) {
      const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
      const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
      y[block * blockDim.x * blockDim.y * blockDim.z + thread] = threadIdx.z * 100 + threadIdx.y * 10 + threadIdx.x
        + 1000 * (blockIdx.z * 100 + blockIdx.y * 10 + blockIdx.x);
    }"""
    y = fresh((4, 3, 2, 4, 3, 5), np.int32)
    launch = run(code, y, grid=(2, 3, 4), block=(5, 3, 4))
    bz, by, bx, tz, ty, tx = np.indices(y.shape)
    assert (y.host == tz * 100 + ty * 10 + tx + 1000 * (bz * 100 + by * 10 + bx)).all()
    assert (launch.blocks, launch.threads) == (24, 60)


@pytest.mark.usefixtures("order")
def test_votes_and_counting_barriers():
    code = """
    extern "C" __global__ void k(unsigned* y) {
      const int t = threadIdx.x;
      const unsigned ballot = __ballot_sync(0xffffffffu, t % 3 == 0);
      const int any = __any_sync(0xffffffffu, t == 40), all = __all_sync(0xffffffffu, t < 32);
      const int some = __syncthreads_or(t == 63), every = __syncthreads_and(t < 63), count = __syncthreads_count(t % 2);
      y[t] = t < 32 ? ballot : any | all << 1 | some << 2 | every << 3 | count << 4;
    }"""
    y = fresh(64, np.uint32)
    run(code, y)
    assert (y.host[:32] == sum(1 << i for i in range(0, 32, 3))).all()
    assert (y.host[32:] == (1 | 0 << 1 | 1 << 2 | 0 << 3 | 32 << 4)).all()


@pytest.mark.usefixtures("order")
def test_shuffles():
    code = """
    extern "C" __global__ void k(double* y) {
      const double v = threadIdx.x;
      y[threadIdx.x] = __shfl_sync(0xffffffffu, v, 3, 8) + 100 * __shfl_up_sync(0xffffffffu, v, 1, 8)
        + 10000 * __shfl_down_sync(0xffffffffu, v, 2, 8) + 1000000 * __shfl_xor_sync(0xffffffffu, v, 5);
    }"""
    y = fresh(32, np.float64)
    run(code, y, block=32)
    i = np.arange(32)
    segment = i // 8 * 8
    up, down = np.maximum(i - 1, segment), np.where(i + 2 < segment + 8, i + 2, i)
    assert (y.host == segment + 3 + 100 * up + 10000 * down + 1000000 * (i ^ 5)).all()


def order_of_execution(**settings):
    code = """
    extern "C" __global__ void k(unsigned* next, unsigned* y) {
      y[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(next, 1u);
    }"""
    y = fresh(4 * 128, np.uint32)
    with simt.using(**settings):
        run(code, simt.Array(np.zeros(1, np.uint32)), y, grid=4, block=128)
    return y.host.tolist()


@pytest.mark.parametrize("mode", ["check", "fast"])
def test_a_seed_is_an_order(mode):
    assert order_of_execution(mode=mode) == list(range(512))
    orders = [order_of_execution(mode=mode, seed=seed) for seed in (1, 2, 3)]
    assert orders == [order_of_execution(mode=mode, seed=seed) for seed in (1, 2, 3)]
    assert len({tuple(o) for o in orders}) == 3
    for o in orders:
        assert sorted(o) == list(range(512))
        blocks = [o[i : i + 128] for i in range(0, 512, 128)]
        assert any(min(b) > min(c) for b, c in itertools.pairwise(blocks))  # blocks change places
        assert any(min(b[:32]) > max(b[32:64]) for b in blocks) or any(min(b[64:96]) > max(b[96:]) for b in blocks)


def test_modules_do_not_share_their_shared_memory():
    # g++ gives statics of inline functions one address in the whole process unless told otherwise.
    code = """
    template <int I> __device__ float& cell() { __shared__ float s; return s; }
    extern "C" __global__ void k(float* y) {
      if (threadIdx.x == 0) cell<0>() = VALUE;
      __syncthreads();
      y[threadIdx.x] = cell<0>();
    }"""
    for value in (1, 2):
        y = fresh(64)
        simt.RawModule(code=code, options=(f"-DVALUE={value}",)).get_function("k")((1,), (64,), (y,))
        assert (y.host == value).all()


@pytest.mark.usefixtures("order")
def test_ptx_conversions_of_every_float16():
    code = """
    extern "C" __global__ void k(const unsigned short* h, float* f, unsigned short* back) {
      const int i = blockIdx.x * blockDim.x + threadIdx.x;
      const unsigned short bits = h[i];
      float value;
      asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
      f[i] = value;
      unsigned short result;
      asm volatile("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
      back[i] = result;
    }"""
    bits = np.arange(65536, dtype=np.uint16)
    f, back = fresh(65536), fresh(65536, np.uint16)
    run(code, simt.Array(bits), f, back, grid=256, block=256)
    expected = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(f.host, expected)
    assert (back.host == np.where(np.isnan(expected), 0x7FFF, bits)).all()


def test_ptx_rounds_to_nearest_even():
    code = """
    extern "C" __global__ void k(const float* f, unsigned short* h, int n) {
      const int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i >= n) return;
      const float value = f[i];
      unsigned short result;
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
      h[i] = result;
    }"""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / 2
    values = np.concatenate(
        [middles, np.nextafter(middles, 0), np.nextafter(middles, np.inf), [65519.99, 65520, 1e-30]]
    )
    values = np.concatenate([values, -values]).astype(np.float32)
    h = fresh(values.size, np.uint16)
    with simt.using(mode="fast"):
        run(code, simt.Array(values), h, np.int32(values.size), grid=-(-values.size // 256), block=256)
    with np.errstate(over="ignore"):
        assert (h.host == values.astype(np.float16).view(np.uint16)).all()


@pytest.mark.parametrize("mode", ["check", "fast"])
def test_ptx_conversions_of_float64_flush_nothing(mode):
    code = """
    extern "C" __global__ void k(const float* f, double* wide, const double* d, float* narrow) {
      const int i = threadIdx.x;
      const float value = f[i];
      double result;
      asm("cvt.f64.f32 %0, %1;" : "=d"(result) : "f"(value));
      wide[i] = result;
      const double other = d[i];
      float rounded;
      asm("cvt.rn.f32.f64 %0, %1;" : "=f"(rounded) : "d"(other));
      narrow[i] = rounded;
    }"""
    least = 2.0**-149
    d = np.array([0.0, -0.0, least, 0.5 * least, 0.75 * least, 1.5 * least, 2.5 * least, 1e-40, -1e-40, 2.0**-126])
    d = np.concatenate([d, [np.inf, -np.inf, np.nan, 1 + 2.0**-24, 1 + 3 * 2.0**-24, 3.5e38, 1e300, 1e-300, 1 / 3, 7]])
    with np.errstate(all="ignore"):
        f = d.astype(np.float32)
        wide, narrow = fresh(d.size, np.float64), fresh(d.size)
        with simt.using(mode=mode):
            run(code, simt.Array(f), wide, simt.Array(d), narrow, block=d.size)
        np.testing.assert_array_equal(wide.host, f.astype(np.float64))
        np.testing.assert_array_equal(narrow.host, f)
        assert (np.signbit(narrow.host) == np.signbit(f)).all()


@pytest.mark.parametrize("mode", ["check", "fast"])
def test_subnormals_are_flushed_as_cupy_compiles(mode):
    code = """
    extern "C" __global__ void k(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x] * 0.5f; }"""
    x = simt.Array(np.full(32, 1.5e-38, np.float32))
    for options, flushed in (((), True), (("-ftz=false",), False), (("--ftz=false",), False)):
        y = fresh(32)
        with simt.using(mode=mode):
            simt.RawModule(code=code, options=options).get_function("k")((1,), (32,), (x, y))
        assert (y.host == (0 if flushed else np.float32(0.75e-38))).all()
    assert np.float32(1.5e-38) * np.float32(0.5) > 0  # and the host is as it was
