"""The counters of the emulator on cases that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import simt

pytestmark = pytest.mark.skipif(simt.missing_tools() is not None, reason=str(simt.missing_tools()))


def run(code, *args, grid=1, block=32, options=(), **launch):
    kernel = simt.RawModule(code=code, options=options).get_function("k")
    kernel((grid,), (block,), args, **launch)
    return kernel.last


def ones(n, dtype=np.float32):
    return simt.Array(np.ones(n, dtype))


def fresh(n, dtype=np.float32):
    return simt.Array(shape=n, dtype=dtype)


COPY = """
extern "C" __global__ void k(const TYPE* x, TYPE* y, int stride, int offset) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i * stride + offset];
}"""


@pytest.mark.parametrize(
    ("type_", "size"), [("unsigned char", 1), ("unsigned short", 2), ("float", 4), ("double", 8), ("float4", 16)]
)
def test_contiguous_copy(type_, size):
    launch = run(
        COPY,
        ones(64 * size, np.uint8),
        fresh(64 * size, np.uint8),
        np.int32(1),
        np.int32(0),
        grid=2,
        options=(f"-DTYPE={type_}",),
    )
    x, y = launch.buffers["x"], launch.buffers["y"]
    assert x.read == y.write
    assert x.write == y.read == simt.Flow()
    # two warps, each asking for 32 elements
    assert x.read == simt.Flow(
        requests=2,
        bytes=64 * size,
        useful=64 * size,
        sectors=2 * size,
        unique=64 * size,
        wide=64 * size if size == 16 else 0,
        widest=size,
        narrowest=size,
    )
    assert x.read.efficiency == 1
    assert (x.size, launch.accesses, launch.barriers, launch.atomics) == (64 * size, 128, 0, 0)


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (4, 16), (8, 32), (100, 32)])
def test_strided_loads(stride, sectors):
    read = run(COPY, ones(3200), fresh(32), np.int32(stride), np.int32(0), options=("-DTYPE=float",)).buffers["x"].read
    assert (read.requests, read.bytes, read.unique, read.sectors) == (1, 128, 128, sectors)
    assert read.efficiency == 4 / sectors


def test_shifted_load_touches_one_more_sector():
    read = run(COPY, ones(64), fresh(32), np.int32(1), np.int32(1), options=("-DTYPE=float",)).buffers["x"].read
    assert (read.sectors, read.efficiency) == (5, 0.8)


def test_broadcast_is_useful_once():
    launch = run(COPY, ones(1), fresh(128), np.int32(0), np.int32(0), block=128, options=("-DTYPE=float",))
    read = launch.buffers["x"].read
    assert (read.requests, read.bytes, read.useful, read.sectors, read.unique) == (4, 512, 16, 4, 4)


def test_backward_and_scattered_lanes_are_one_request():
    code = """
    extern "C" __global__ void k(const float* x, float* y) { y[threadIdx.x * 7 % 32] = x[31 - threadIdx.x]; }"""
    launch = run(code, ones(32), fresh(32))
    assert (launch.read.requests, launch.read.sectors) == (1, 4)
    assert (launch.write.requests, launch.write.sectors) == (1, 4)


def test_reading_twice_counts_twice_but_is_unique_once():
    code = """
    extern "C" __global__ void k(const float* x, float* y) {
      float v = x[threadIdx.x];
      __syncthreads();
      y[threadIdx.x] = v + x[threadIdx.x];
    }"""
    launch = run(code, ones(64), fresh(64), block=64)
    assert (launch.read.bytes, launch.read.unique, launch.barriers) == (512, 256, 1)


def test_loops_of_different_length_are_put_together_by_iteration():
    # lane t makes t + 1 loads; iteration i has 32 - i lanes
    code = """
    extern "C" __global__ void k(const float* x, float* y) {
      float v = 0;
      for (int i = 0; i <= threadIdx.x; i++) v += x[32 * i + threadIdx.x];
      y[threadIdx.x] = v;
    }"""
    launch = run(code, ones(1024), fresh(32))
    assert launch.read.requests == 32
    assert launch.read.bytes == 4 * sum(range(1, 33))
    assert launch.read.sectors == sum(4 - i // 8 for i in range(32))


def test_buffers_are_told_apart():
    code = """
    extern "C" __global__ void k(const float* x, const double* w, float* __restrict__ y, unsigned* n) {
      y[threadIdx.x] = x[threadIdx.x] + (float)w[threadIdx.x / 8];
      if (threadIdx.x == 0) atomicAdd(n, 1u);
    }"""
    launch = run(code, ones(64), ones(8, np.float64), fresh(64), ones(1, np.uint32), block=64)
    assert {k: (b.read.bytes, b.write.bytes, b.size) for k, b in launch.buffers.items()} == {
        "x": (256, 0, 256),
        "w": (512, 0, 64),
        "y": (0, 256, 256),
        "n": (0, 4, 4),
    }
    assert launch.buffers["w"].read.unique == 64
    assert (launch.read.bytes, launch.write.bytes, launch.atomics) == (768, 260, 1)
    assert (launch.read.widest, launch.read.narrowest) == (8, 4)


def test_in_place_reads_and_writes_are_told_apart():
    x = ones(64)
    launch = run(COPY, x, x, np.int32(1), np.int32(0), block=64, options=("-DTYPE=float",))
    assert (launch.buffers["x"].read.bytes, launch.buffers["x"].write.bytes) == (256, 0)
    assert (launch.buffers["y"].read.bytes, launch.buffers["y"].write.bytes) == (0, 256)


def test_underaligned_vectors_are_narrow():
    # what the device's compiler would make of it, too
    code = """
    struct alignas(4) Quad { float v[4]; };
    extern "C" __global__ void k(const Quad* x, Quad* y) { y[threadIdx.x] = x[threadIdx.x]; }"""
    launch = run(code, ones(128), fresh(128))
    assert (launch.read.widest, launch.write.widest) == (4, 4)
    assert (launch.read.bytes, launch.write.bytes) == (512, 512)


SHARED = """
extern "C" __global__ void k(const TYPE* x, int stride) {
  extern __shared__ float4 raw[];
  TYPE* s = reinterpret_cast<TYPE*>(raw);
  s[threadIdx.x * stride] = x[0];
}"""


@pytest.mark.parametrize(
    ("type_", "stride", "requests", "wavefronts"),
    [
        ("float", 0, 1, 1),  # the same word
        ("float", 1, 1, 1),
        ("float", 2, 1, 2),
        ("float", 8, 1, 8),
        ("float", 32, 1, 32),
        ("float", 33, 1, 1),
        ("short", 1, 1, 1),  # two lanes a word
        ("double", 1, 2, 2),  # half a warp at a time
        ("double", 2, 2, 4),
        ("float4", 1, 4, 4),  # a quarter at a time
        ("float4", 2, 4, 8),
        ("float4", 9, 4, 4),
    ],
)
def test_bank_conflicts(type_, stride, requests, wavefronts):
    # stride 0 would be a race: one lane only
    launch = run(
        SHARED,
        ones(16, np.uint8),
        np.int32(stride),
        block=1 if stride == 0 else 32,
        options=(f"-DTYPE={type_}",),
        shared_mem=32 << 10,
    )
    assert (launch.shared_requests, launch.shared_wavefronts) == (requests, wavefronts)
    assert launch.bank_conflicts == wavefronts / requests


def test_broadcast_from_shared_memory_has_no_conflict():
    code = """
    extern "C" __global__ void k(float* y) {
      __shared__ float s[32];
      s[threadIdx.x] = threadIdx.x;
      __syncthreads();
      y[threadIdx.x] = s[5];
    }"""
    launch = run(code, fresh(32))
    assert (launch.shared_requests, launch.shared_wavefronts, launch.barriers) == (2, 2, 1)


def test_collectives_are_counted_by_warp_and_barriers_by_block():
    code = """
    extern "C" __global__ void k(float* y) {
      float v = threadIdx.x;
      for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
      __syncthreads();
      __syncthreads();
      __threadfence();
      y[blockIdx.x * blockDim.x + threadIdx.x] = v;
    }"""
    launch = run(code, fresh(192), grid=3, block=64)
    assert (launch.collectives, launch.barriers, launch.fences) == (3 * 2 * 5, 3 * 2, 192)


def test_counters_do_not_depend_on_the_order():
    code = """
    extern "C" __global__ void k(const float* x, float* y, int n) {
      __shared__ float s[128];
      for (int i = blockIdx.x * 128 + threadIdx.x; i < n; i += gridDim.x * 128) {
        s[threadIdx.x] = x[i];
        __syncwarp();
        y[i] = s[threadIdx.x ^ 1];
        __syncwarp();
      }
    }"""

    def record(**settings):
        with simt.using(**settings):
            launch = run(code, ones(1024), fresh(1024), np.int32(1024), grid=3, block=128)
        return {k: (b.read, b.write) for k, b in launch.buffers.items()}, launch.shared_wavefronts, launch.accesses

    assert record() == record(seed=1) == record(seed=2, preempt=100)


def test_launches_are_recorded():
    code = """
    extern "C" __global__ void k(float* y, int n, float a) { if (threadIdx.x < n) y[threadIdx.x] = a; }"""
    with simt.recorded() as outer:
        with simt.recorded() as inner:
            run(code, fresh(8), np.int32(8), np.float32(2))
        with simt.using(mode="fast"):
            run(code, fresh(8), np.int32(5), np.float32(3), grid=1, block=64, shared_mem=16)
    assert len(inner) == 1
    assert [launch.kernel for launch in outer] == ["k", "k"]
    assert [launch.mode for launch in outer] == ["check", "fast"]
    assert outer[1].scalars == {"n": 5, "a": 3}
    assert (outer[1].grid, outer[1].block, outer[1].shared_mem) == ((1, 1, 1), (64, 1, 1), 16)
    assert outer[1].accesses == 0  # fast mode sees none


def test_a_launch_with_faults_is_recorded_too():
    with simt.recorded() as launches, pytest.raises(simt.SimtFault):
        run('extern "C" __global__ void k(float* y) { y[threadIdx.x] = 1; }', fresh(31))
    assert [fault.kind for fault in launches[0].faults] == ["out-of-bounds"]
