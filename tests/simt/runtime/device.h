// What a kernel sees: the CUDA C++ built-ins, for g++ on a CPU. Included in front of every kernel (-include).
//
// Nothing of NVIDIA's headers is needed: the vector types, built-in variables, barriers, shuffles, atomics and intrinsics
// that memory-bound kernels use are defined here. Whatever has to know about other threads is a call into runtime.cpp.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>
#include <utility>

// ---- function and variable qualifiers
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
// g++ decides: inlining everything that a kernel asks for doubles the time of a build.
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// One OS thread runs all CUDA threads of a block in turn, so a thread_local variable is shared by exactly one block at a
// time. In block scope it implies static, and `extern __shared__ T s[]` parses as well.
#define __shared__ thread_local

// NVRTC takes `__shared__ alignas(16) float s[8]`, g++ only in the other order, or with its own attribute.
#define alignas(n) __attribute__((aligned(n)))

#define SIMT_INLINE __attribute__((always_inline)) inline

// ---- vector types: same sizes and alignments as CUDA's
#define SIMT_VECTOR(type, name, align2, align4)                                                                   \
  struct name##1 { type x; };                                                                                     \
  struct alignas(align2) name##2 { type x, y; };                                                                  \
  struct name##3 { type x, y, z; };                                                                               \
  struct alignas(align4) name##4 { type x, y, z, w; };                                                            \
  SIMT_INLINE name##1 make_##name##1(type x) { return {x}; }                                                      \
  SIMT_INLINE name##2 make_##name##2(type x, type y) { return {x, y}; }                                           \
  SIMT_INLINE name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                                \
  SIMT_INLINE name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SIMT_VECTOR(signed char, char, 2, 4)
SIMT_VECTOR(unsigned char, uchar, 2, 4)
SIMT_VECTOR(short, short, 4, 8)
SIMT_VECTOR(unsigned short, ushort, 4, 8)
SIMT_VECTOR(int, int, 8, 16)
SIMT_VECTOR(unsigned int, uint, 8, 16)
SIMT_VECTOR(float, float, 8, 16)
SIMT_VECTOR(long long, longlong, 16, 16)
SIMT_VECTOR(unsigned long long, ulonglong, 16, 16)
SIMT_VECTOR(double, double, 16, 16)
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ---- the runtime's side (runtime.cpp)
namespace simt {
enum Collective : int {
  SYNCTHREADS = 1, SYNCTHREADS_OR, SYNCTHREADS_AND, SYNCTHREADS_COUNT,
  SYNCWARP, SHFL_XOR, SHFL_DOWN, SHFL_UP, SHFL_IDX, BALLOT, ANY, ALL
};
extern "C" {
// Marked const, so that g++ calls them once: they do not change during the life of a CUDA thread.
uint3 simt_thread_index() __attribute__((const));
uint3 simt_block_index() __attribute__((const));
uint3 simt_block_shape() __attribute__((const));
uint3 simt_grid_shape() __attribute__((const));
// Waits until the threads concerned have arrived; `line` names the call in messages and tells two barriers apart.
uint64_t simt_collective(int op, unsigned mask, uint64_t value, int argument, int width, int line);
void simt_fence();
void simt_atomic_begin(const void* address, int size, const void* caller);
void simt_atomic_end();
void simt_trap(int line);
void simt_copy_async(void* to, const void* from);
bool simt_next_copy(void** to, const void** from);   // false when none is left
}

template <class T> SIMT_INLINE uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_arithmetic<T>::value, "shuffles take arithmetic types of at most 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class To, class From> SIMT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) <= sizeof(From), "bit_cast: size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
template <class T> SIMT_INLINE T shuffle(int op, unsigned mask, T value, int argument, int width, int line) {
  return bit_cast<T>(simt_collective(op, mask, to_bits(value), argument, width, line));
}
// Not instrumented itself: the runtime hears of one atomic access, attributed to the caller's line.
template <class T, class Update>
__attribute__((noinline, no_sanitize("thread"))) T atomic_update(T* address, Update update) {
  simt_atomic_begin(address, sizeof(T), __builtin_return_address(0));
  T old = *address;
  *address = update(old);
  simt_atomic_end();
  return old;
}
}  // namespace simt

#define threadIdx (simt::simt_thread_index())
#define blockIdx (simt::simt_block_index())
#define blockDim (simt::simt_block_shape())
#define gridDim (simt::simt_grid_shape())
#define warpSize 32

SIMT_INLINE size_t __cvta_generic_to_shared(const void* p) { return reinterpret_cast<size_t>(p); }

// ---- barriers, votes, shuffles. __builtin_LINE() as a default argument is the caller's line.
#define SIMT_LINE int line = __builtin_LINE()
SIMT_INLINE void __syncthreads(SIMT_LINE) { simt::simt_collective(simt::SYNCTHREADS, 0, 0, 0, 0, line); }
SIMT_INLINE int __syncthreads_or(int p, SIMT_LINE) {
  return (int)simt::simt_collective(simt::SYNCTHREADS_OR, 0, p != 0, 0, 0, line);
}
SIMT_INLINE int __syncthreads_and(int p, SIMT_LINE) {
  return (int)simt::simt_collective(simt::SYNCTHREADS_AND, 0, p != 0, 0, 0, line);
}
SIMT_INLINE int __syncthreads_count(int p, SIMT_LINE) {
  return (int)simt::simt_collective(simt::SYNCTHREADS_COUNT, 0, p != 0, 0, 0, line);
}
SIMT_INLINE void __syncwarp(unsigned mask = 0xffffffffu, SIMT_LINE) {
  simt::simt_collective(simt::SYNCWARP, mask, 0, 0, 32, line);
}
SIMT_INLINE unsigned __ballot_sync(unsigned mask, int p, SIMT_LINE) {
  return (unsigned)simt::simt_collective(simt::BALLOT, mask, p != 0, 0, 32, line);
}
SIMT_INLINE int __any_sync(unsigned mask, int p, SIMT_LINE) {
  return (int)simt::simt_collective(simt::ANY, mask, p != 0, 0, 32, line);
}
SIMT_INLINE int __all_sync(unsigned mask, int p, SIMT_LINE) {
  return (int)simt::simt_collective(simt::ALL, mask, p != 0, 0, 32, line);
}
template <class T> SIMT_INLINE T __shfl_xor_sync(unsigned mask, T v, int lane_mask, int width = 32, SIMT_LINE) {
  return simt::shuffle(simt::SHFL_XOR, mask, v, lane_mask, width, line);
}
template <class T> SIMT_INLINE T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_LINE) {
  return simt::shuffle(simt::SHFL_DOWN, mask, v, (int)delta, width, line);
}
template <class T> SIMT_INLINE T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_LINE) {
  return simt::shuffle(simt::SHFL_UP, mask, v, (int)delta, width, line);
}
template <class T> SIMT_INLINE T __shfl_sync(unsigned mask, T v, int lane, int width = 32, SIMT_LINE) {
  return simt::shuffle(simt::SHFL_IDX, mask, v, lane, width, line);
}
SIMT_INLINE void __threadfence() { simt::simt_fence(); }
SIMT_INLINE void __threadfence_system() { simt::simt_fence(); }
SIMT_INLINE void __threadfence_block() {}   // orders nothing between blocks, and a barrier is needed inside one anyway
SIMT_INLINE void __trap(SIMT_LINE) { simt::simt_trap(line); }

// ---- loads and stores with a cache hint: a plain access here
#define SIMT_LOAD(name) template <class T> SIMT_INLINE T name(const T* p) { return *p; }
SIMT_LOAD(__ldg) SIMT_LOAD(__ldcg) SIMT_LOAD(__ldcs) SIMT_LOAD(__ldca) SIMT_LOAD(__ldlu) SIMT_LOAD(__ldcv)
#define SIMT_STORE(name) template <class T> SIMT_INLINE void name(T* p, T v) { *p = v; }
SIMT_STORE(__stcg) SIMT_STORE(__stcs) SIMT_STORE(__stwb) SIMT_STORE(__stwt)

// ---- atomics
template <class T> struct simt_identity { using type = T; };
template <class T> using simt_same = typename simt_identity<T>::type;   // keeps the second argument out of deduction
template <class T> SIMT_INLINE T atomicAdd(T* p, simt_same<T> v) {
  return simt::atomic_update(p, [=](T old) { return (T)(old + v); });
}
template <class T> SIMT_INLINE T atomicSub(T* p, simt_same<T> v) {
  return simt::atomic_update(p, [=](T old) { return (T)(old - v); });
}
template <class T> SIMT_INLINE T atomicMax(T* p, simt_same<T> v) {
  return simt::atomic_update(p, [=](T old) { return old > v ? old : v; });
}
template <class T> SIMT_INLINE T atomicMin(T* p, simt_same<T> v) {
  return simt::atomic_update(p, [=](T old) { return old < v ? old : v; });
}
template <class T> SIMT_INLINE T atomicAnd(T* p, simt_same<T> v) {
  return simt::atomic_update(p, [=](T old) { return old & v; });
}
template <class T> SIMT_INLINE T atomicOr(T* p, simt_same<T> v) {
  return simt::atomic_update(p, [=](T old) { return old | v; });
}
template <class T> SIMT_INLINE T atomicExch(T* p, simt_same<T> v) {
  return simt::atomic_update(p, [=](T) { return v; });
}
template <class T> SIMT_INLINE T atomicCAS(T* p, simt_same<T> expected, simt_same<T> v) {
  return simt::atomic_update(p, [=](T old) { return old == expected ? v : old; });
}
SIMT_INLINE unsigned atomicInc(unsigned* p, unsigned limit) {
  return simt::atomic_update(p, [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}
SIMT_INLINE unsigned atomicDec(unsigned* p, unsigned limit) {
  return simt::atomic_update(p, [=](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}

// ---- bit patterns
SIMT_INLINE int __float_as_int(float v) { return simt::bit_cast<int>(v); }
SIMT_INLINE unsigned __float_as_uint(float v) { return simt::bit_cast<unsigned>(v); }
SIMT_INLINE float __int_as_float(int v) { return simt::bit_cast<float>(v); }
SIMT_INLINE float __uint_as_float(unsigned v) { return simt::bit_cast<float>(v); }
SIMT_INLINE long long __double_as_longlong(double v) { return simt::bit_cast<long long>(v); }
SIMT_INLINE double __longlong_as_double(long long v) { return simt::bit_cast<double>(v); }
SIMT_INLINE int __double2hiint(double v) { return (int)(simt::bit_cast<uint64_t>(v) >> 32); }
SIMT_INLINE int __double2loint(double v) { return (int)simt::bit_cast<uint64_t>(v); }
SIMT_INLINE double __hiloint2double(int hi, int lo) {
  return simt::bit_cast<double>((uint64_t)(unsigned)hi << 32 | (unsigned)lo);
}

// ---- 16-bit floats, for the PTX instructions that build.py replaces. In float64, where their subnormals are normal, so
// that flushing (see flush_subnormals in module.py) does not touch them: the device does not flush 16-bit operands.
namespace simt {
// Whatever the mode that flushes subnormals: by integers, and by adding a number whose last bit is 2^-149.
SIMT_INLINE double double_of_float(float f) {
  const unsigned bits = bit_cast<unsigned>(f), magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x00800000u) return f;
  const double tiny = static_cast<int>(magnitude) * 1.401298464324817e-45;
  return bits >> 31 ? -tiny : tiny;
}
SIMT_INLINE float float_of_double(double d) {
  const double magnitude = __builtin_fabs(d);
  if (!(magnitude < 1.1754943508222875e-38)) return static_cast<float>(d);
  const unsigned long long sum = bit_cast<unsigned long long>(magnitude + 6.310887241768095e-30);
  return bit_cast<float>(static_cast<unsigned>(sum & 0xffffff) | (__builtin_signbit(d) ? 0x80000000u : 0u));
}

// cp.async: the copies are made when the thread waits for them, and those that nobody waits for never.
SIMT_INLINE void copy_async(size_t to, const void* from) { simt_copy_async(reinterpret_cast<void*>(to), from); }
SIMT_INLINE void copies_arrived() {
  void* to;
  const void* from;
  while (simt_next_copy(&to, &from)) *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
}

SIMT_INLINE float float_of_half(unsigned short half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double magnitude = exponent == 31 ? (mantissa ? (double)NAN : (double)INFINITY)
                           : exponent     ? ldexp(1024.0 + mantissa, exponent - 25)
                                          : ldexp((double)mantissa, -24);
  return (float)(half >> 15 ? -magnitude : magnitude);
}
SIMT_INLINE unsigned short half_of_float(float value) {
  const unsigned short sign = bit_cast<unsigned>(value) >> 16 & 0x8000;
  const double magnitude = fabs((double)value);
  if (!(magnitude == magnitude)) return 0x7fff;
  if (magnitude >= 65520.0) return sign | 0x7c00;
  int exponent = 0;
  frexp(magnitude, &exponent);                       // magnitude = fraction * 2^exponent, fraction in [1/2, 1)
  if (exponent < -13 || magnitude == 0) exponent = -13;   // subnormal, or zero
  const int steps = (int)rint(ldexp(magnitude, 11 - exponent));   // to nearest even, in units of the last place
  return sign | (unsigned short)(steps + (exponent + 13) * 1024);  // 1024 more steps: the next exponent
}
}  // namespace simt

// ---- integers
SIMT_INLINE int __popc(unsigned v) { return __builtin_popcount(v); }
SIMT_INLINE int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
SIMT_INLINE int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
SIMT_INLINE int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
SIMT_INLINE int __ffs(int v) { return __builtin_ffs(v); }
SIMT_INLINE int __ffsll(long long v) { return __builtin_ffsll(v); }
SIMT_INLINE unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
SIMT_INLINE int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
SIMT_INLINE unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
template <class A, class B> constexpr SIMT_INLINE std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return (T)b < (T)a ? (T)b : (T)a;
}
template <class A, class B> constexpr SIMT_INLINE std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return (T)a < (T)b ? (T)b : (T)a;
}
// CUDA's min and max of floating types ignore a NaN, as fmin and fmax do.
SIMT_INLINE float min(float a, float b) { return fminf(a, b); }
SIMT_INLINE float max(float a, float b) { return fmaxf(a, b); }
SIMT_INLINE double min(double a, double b) { return fmin(a, b); }
SIMT_INLINE double max(double a, double b) { return fmax(a, b); }

// ---- conversions: saturating, NaN gives 0, as on the device
namespace simt {
template <class To, class From> SIMT_INLINE To saturate(From rounded) {
  if (!(rounded == rounded)) return 0;
  const From low = (From)(std::is_signed<To>::value ? (To)1 << (sizeof(To) * 8 - 1) : 0);
  const From high = std::is_signed<To>::value ? -low : (From)2 * (From)((To)1 << (sizeof(To) * 8 - 1));
  if (rounded < low) return (To)low;
  return rounded >= high ? (To) ~((std::is_signed<To>::value ? (To)1 : (To)0) << (sizeof(To) * 8 - 1)) : (To)rounded;
}
}  // namespace simt
SIMT_INLINE int __float2int_rn(float v) { return simt::saturate<int>(rintf(v)); }
SIMT_INLINE int __float2int_rz(float v) { return simt::saturate<int>(truncf(v)); }
SIMT_INLINE unsigned __float2uint_rn(float v) { return simt::saturate<unsigned>(rintf(v)); }
SIMT_INLINE int __double2int_rn(double v) { return simt::saturate<int>(rint(v)); }
SIMT_INLINE long long __double2ll_rn(double v) { return simt::saturate<long long>(rint(v)); }
SIMT_INLINE float __int2float_rn(int v) { return (float)v; }
SIMT_INLINE float __uint2float_rn(unsigned v) { return (float)v; }
SIMT_INLINE double __int2double_rn(int v) { return v; }
SIMT_INLINE double __uint2double_rn(unsigned v) { return v; }
SIMT_INLINE double __ll2double_rn(long long v) { return (double)v; }
SIMT_INLINE float __double2float_rn(double v) { return (float)v; }
SIMT_INLINE float __double2float_rz(double v) {
  const float nearest = (float)v;
  return fabs((double)nearest) > fabs(v) ? nextafterf(nearest, 0.0f) : nearest;
}

// ---- floating point. The device's approximate functions are computed exactly here: see "Not covered" in README.md.
SIMT_INLINE float rsqrtf(float v) { return (float)(1.0 / sqrt((double)v)); }
SIMT_INLINE double rsqrt(double v) { return 1.0 / sqrt(v); }
SIMT_INLINE float rsqrt(float v) { return rsqrtf(v); }
SIMT_INLINE float __fadd_rn(float a, float b) { return a + b; }
SIMT_INLINE float __fsub_rn(float a, float b) { return a - b; }
SIMT_INLINE float __fmul_rn(float a, float b) { return a * b; }
SIMT_INLINE float __fdiv_rn(float a, float b) { return a / b; }
SIMT_INLINE float __frcp_rn(float a) { return 1.0f / a; }
SIMT_INLINE float __fsqrt_rn(float a) { return sqrtf(a); }
SIMT_INLINE float __frsqrt_rn(float a) { return rsqrtf(a); }
SIMT_INLINE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
SIMT_INLINE double __dadd_rn(double a, double b) { return a + b; }
SIMT_INLINE double __dsub_rn(double a, double b) { return a - b; }
SIMT_INLINE double __dmul_rn(double a, double b) { return a * b; }
SIMT_INLINE double __ddiv_rn(double a, double b) { return a / b; }
SIMT_INLINE double __drcp_rn(double a) { return 1.0 / a; }
SIMT_INLINE double __dsqrt_rn(double a) { return sqrt(a); }
SIMT_INLINE double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
SIMT_INLINE float __fdividef(float a, float b) { return a / b; }
SIMT_INLINE float __expf(float v) { return expf(v); }
SIMT_INLINE float __logf(float v) { return logf(v); }
SIMT_INLINE float __powf(float a, float b) { return powf(a, b); }
SIMT_INLINE float __saturatef(float v) { return fminf(fmaxf(v, 0.0f), 1.0f); }
SIMT_INLINE double normcdf(double v) { return 0.5 * erfc(-v * 0.70710678118654752440); }
SIMT_INLINE float normcdff(float v) { return (float)normcdf((double)v); }

// ---- how the harness reaches a kernel: one entry point, the kinds of its parameters, its launch bound
namespace simt {
enum ParameterKind : int { POINTER = 0x100, FLOATING = 0x200, INTEGER = 0x300, STRUCT = 0x400, CONST_POINTER = 0x1100 };
template <class T> constexpr int parameter_kind() {
  return std::is_pointer<T>::value ? (std::is_const<std::remove_pointer_t<T>>::value ? CONST_POINTER : POINTER)
         : std::is_floating_point<T>::value ? FLOATING : std::is_integral<T>::value ? INTEGER : STRUCT;
}
// {number of parameters, then (kind << 16 | size) of each}
template <class... Args> const int* signature(void (*)(Args...)) {
  static const int description[] = {(int)sizeof...(Args), (int)(parameter_kind<Args>() << 16 | (int)sizeof(Args))...};
  return description;
}
template <class... Args, size_t... I>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(Args...), void** a, std::index_sequence<I...>) {
  kernel(*(Args*)a[I]...);
}
template <class... Args>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(Args...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<Args...>{});
}
// Of what __launch_bounds__ was given: threads of a block; 1024 for a kernel without.
template <class... Rest> constexpr int first_bound(int threads = 1024, Rest...) { return threads; }
}  // namespace simt
