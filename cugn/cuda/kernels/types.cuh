// Element types as plain storage, conversions that are right under -ftz=true, and packs of elements.
//
// CuPy compiles with -ftz=true: float32 arithmetic flushes subnormals. bfloat16 is converted by integer operations, all else
// by the hardware's cvt without .ftz, which flushes nothing. 16-bit values travel as unsigned short: no CUDA header is
// needed.
//
// Options: X_DTYPE (x and dy), Y_DTYPE (y and dx), each one of the names below; REAL_IS_DOUBLE.
#define FLOAT16 0
#define BFLOAT16 1
#define FLOAT32 2
#define FLOAT64 3
#define INT8 4
#define UINT8 5
#define INT16 6
#define UINT16 7

template <int DTYPE> struct Storage { typedef unsigned short type; };
template <> struct Storage<FLOAT32> { typedef float type; };
template <> struct Storage<FLOAT64> { typedef double type; };
template <> struct Storage<INT8> { typedef signed char type; };
template <> struct Storage<UINT8> { typedef unsigned char type; };
template <> struct Storage<INT16> { typedef short type; };

typedef Storage<X_DTYPE>::type x_t;
typedef Storage<Y_DTYPE>::type y_t;

// Arithmetic of the elements: float32 unless float64 arrays or weights are at hand, or exact moments are asked for (float64
// runs at 1/64 of the speed on many GPUs).
#if REAL_IS_DOUBLE
typedef double real;
#else
typedef float real;
#endif

// Elements of a 16-byte vector of x, and of y.
constexpr int VX = 16 / sizeof(x_t);
constexpr int VY = 16 / sizeof(y_t);

template <class To, class From> __device__ __forceinline__ To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  union {
    From from;
    To to;
  } both;
  both.from = value;
  return both.to;
}

// ---- to float32 and float64, exactly

__device__ __forceinline__ float half_to_float(unsigned short h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

__device__ __forceinline__ float bfloat_to_float(unsigned short b) { return bits_of<float>((unsigned)b << 16); }

template <int DTYPE, class T> __device__ __forceinline__ float to_float(T v) {
  if constexpr (DTYPE == FLOAT16) return half_to_float(v);
  else if constexpr (DTYPE == BFLOAT16) return bfloat_to_float(v);
  else return (float)v;
}

// float32 to float64, subnormals too: a cast would be cvt.ftz, which takes a multiplication of its own to flush them.
__device__ __forceinline__ double widen(float f) {
  double d;
  asm("cvt.f64.f32 %0, %1;" : "=d"(d) : "f"(f));
  return d;
}

__device__ __forceinline__ double exactly(float v) { return widen(v); }
__device__ __forceinline__ double exactly(double v) { return v; }

template <int DTYPE, class T> __device__ __forceinline__ double to_double(T v) {
  if constexpr (DTYPE == FLOAT64) return v;
  else return widen(to_float<DTYPE>(v));
}

template <int DTYPE, class T> __device__ __forceinline__ real to_real(T v) {
  if constexpr (REAL_IS_DOUBLE) return (real)to_double<DTYPE>(v);
  else return (real)to_float<DTYPE>(v);
}

// ---- from float32 and float64, to nearest even

__device__ __forceinline__ unsigned short float_to_half(float f) {
  unsigned short h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

__device__ __forceinline__ unsigned short float_to_bfloat(float f) {
  const unsigned u = bits_of<unsigned>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return (unsigned short)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// float64 to float32, rounded once, to subnormals too.
__device__ __forceinline__ float narrow(double d) {
  float f;
  asm("cvt.rn.f32.f64 %0, %1;" : "=f"(f) : "d"(d));
  return f;
}

template <int DTYPE> __device__ __forceinline__ typename Storage<DTYPE>::type from_float(float f) {
  if constexpr (DTYPE == FLOAT16) return float_to_half(f);
  else if constexpr (DTYPE == BFLOAT16) return float_to_bfloat(f);
  else return f;
}

template <int DTYPE> __device__ __forceinline__ typename Storage<DTYPE>::type from_double(double d) {
  if constexpr (DTYPE == FLOAT64) return d;
  else return from_float<DTYPE>(narrow(d));
}

template <int DTYPE> __device__ __forceinline__ typename Storage<DTYPE>::type from_real(real v) {
  if constexpr (REAL_IS_DOUBLE) return from_double<DTYPE>(v);
  else return from_float<DTYPE>(v);
}

// ---- arrays whose dtype is known at run time only: weight, bias, their gradients, what is copied

__device__ __forceinline__ double load_any(const void* p, int dtype, long long i) {
  switch (dtype) {
    case FLOAT16: return half_to_float(((const unsigned short*)p)[i]);
    case BFLOAT16: return widen(bfloat_to_float(((const unsigned short*)p)[i]));
    case FLOAT32: return widen(((const float*)p)[i]);
    case INT8: return ((const signed char*)p)[i];
    case UINT8: return ((const unsigned char*)p)[i];
    case INT16: return ((const short*)p)[i];
    case UINT16: return ((const unsigned short*)p)[i];
    default: return ((const double*)p)[i];
  }
}

__device__ __forceinline__ void store_any(void* p, int dtype, long long i, double value) {
  switch (dtype) {
    case FLOAT16: ((unsigned short*)p)[i] = from_double<FLOAT16>(value); break;
    case BFLOAT16: ((unsigned short*)p)[i] = from_double<BFLOAT16>(value); break;
    case FLOAT32: ((float*)p)[i] = narrow(value); break;
    default: ((double*)p)[i] = value;
  }
}

// A value for each channel, or a constant where the caller gave none (the pointer is then not read).
__device__ __forceinline__ double parameter(const void* p, int dtype, int c, double otherwise) {
  return dtype < 0 ? otherwise : load_any(p, dtype, c);
}

// ---- packs: V elements that move as one access of V * sizeof(T) bytes

template <int BYTES> struct Word;
template <> struct Word<1> { typedef unsigned char type; };
template <> struct Word<2> { typedef unsigned short type; };
template <> struct Word<4> { typedef unsigned type; };
template <> struct Word<8> { typedef uint2 type; };
template <> struct Word<16> { typedef uint4 type; };

template <class T, int V> union Pack {
  typename Word<sizeof(T) * V>::type word;
  T element[V];
};

// V elements at p; one access where p is aligned for it.
template <class T, int V> __device__ __forceinline__ Pack<T, V> load_pack(const T* p, bool aligned) {
  Pack<T, V> pack;
  if (aligned) {
    pack.word = *reinterpret_cast<const typename Word<sizeof(T) * V>::type*>(p);
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) pack.element[k] = p[k];
  }
  return pack;
}

// 16 bytes from global to shared memory, which have arrived when the thread has called copies_arrived(): from sm_80 on they
// pass no register, so that all of a box are in flight at once.
__device__ __forceinline__ void copy_16_bytes(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const size_t address = __cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "l"(address), "l"(from) : "memory");
#else
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
#endif
}
__device__ __forceinline__ void copies_arrived() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}

// Four bytes of a pack.
template <class T> __device__ __forceinline__ unsigned word_of(const T* e) {
  if constexpr (sizeof(T) == 4) return bits_of<unsigned>(*e);
  else return (unsigned)(unsigned short)e[0] | (unsigned)(unsigned short)e[1] << 16;
}

// To global memory. 16 bytes are stored by the intrinsic of the usual write-back store: assigned, they became four stores
// in the machine code.
template <class T, int V> __device__ __forceinline__ void store_pack(T* p, const Pack<T, V>& pack, bool aligned) {
  if constexpr (sizeof(T) * V == 16) {
    if (aligned) {
      const T* e = pack.element;
      if constexpr (sizeof(T) == 8) {
        __stwb(reinterpret_cast<double2*>(p), make_double2(e[0], e[1]));
      } else {
        constexpr int STEP = V / 4;
        __stwb(reinterpret_cast<uint4*>(p),
               make_uint4(word_of(e), word_of(e + STEP), word_of(e + 2 * STEP), word_of(e + 3 * STEP)));
      }
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < V; ++k) p[k] = pack.element[k];
}
