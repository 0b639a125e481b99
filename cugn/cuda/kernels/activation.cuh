// Activations and their slopes, chosen by -DACTIVATION.
#define IDENTITY 0
#define RELU 1
#define SILU 2
#define GELU 3
#define GELU_TANH 4

__device__ __forceinline__ float exponential(float v) { return expf(v); }
__device__ __forceinline__ double exponential(double v) { return exp(v); }
__device__ __forceinline__ float complementary_error(float v) { return erfcf(v); }
__device__ __forceinline__ double complementary_error(double v) { return erfc(v); }

constexpr real SQRT_HALF = (real)0.70710678118654752440, SQRT_2_OVER_PI = (real)0.79788456080286535588;
constexpr real INVERSE_SQRT_2PI = (real)0.39894228040143267794, GELU_CUBIC = (real)0.044715;

// 1 / (1 + exp(-t)), to the relative accuracy of exp on both sides: the exponential never overflows.
__device__ __forceinline__ real sigmoid(real t) {
  const real e = exponential(-fabs(t));
  return (t < 0 ? e : (real)1) / (1 + e);
}
// Argument of the sigmoid that gelu_tanh is: 1/2 (1 + tanh(s)) = sigmoid(2 s).
__device__ __forceinline__ real gelu_argument(real z) { return 2 * SQRT_2_OVER_PI * fma(GELU_CUBIC * z * z, z, z); }

__device__ __forceinline__ real activate(real z) {
#if ACTIVATION == RELU
  return z <= 0 ? (real)0 : z;  // in this order a NaN stays one
#elif ACTIVATION == SILU
  return z * sigmoid(z);
#elif ACTIVATION == GELU
  return z * ((real)0.5 * complementary_error(-z * SQRT_HALF));
#elif ACTIVATION == GELU_TANH
  return z * sigmoid(gelu_argument(z));
#else
  return z;
#endif
}

__device__ __forceinline__ real slope(real z) {
#if ACTIVATION == RELU
  return z <= 0 ? (real)0 : z > 0 ? (real)1 : z;
#elif ACTIVATION == SILU
  const real gate = sigmoid(z);
  return fma(z * gate, 1 - gate, gate);
#elif ACTIVATION == GELU
  return fma(z, INVERSE_SQRT_2PI * exponential((real)-0.5 * z * z), (real)0.5 * complementary_error(-z * SQRT_HALF));
#elif ACTIVATION == GELU_TANH
  const real gate = sigmoid(gelu_argument(z));
  return fma(z * gate * (1 - gate), 2 * SQRT_2_OVER_PI * fma(3 * GELU_CUBIC * z, z, (real)1), gate);
#else
  return 1;
#endif
}
