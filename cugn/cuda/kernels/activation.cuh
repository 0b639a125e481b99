// Activations and their first two derivatives, chosen by -DACTIVATION.
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

// 1 / (1 + exp(-t)) and 1 / (1 + exp(t)), each to the relative accuracy of exp: the exponential never overflows, and where
// one of them is near 1 the other is not a difference from it (a slope takes it times z^3).
struct Sigmoid {
  real up, down;
  __device__ __forceinline__ Sigmoid(real t) {
    const real e = exponential(-fabs(t)), larger = 1 / (1 + e), smaller = e * larger;
    up = t < 0 ? smaller : larger;
    down = t < 0 ? larger : smaller;
  }
};
// Argument of the sigmoid that gelu_tanh is: 1/2 (1 + tanh(s)) = sigmoid(2 s).
__device__ __forceinline__ real gelu_argument(real z) { return 2 * SQRT_2_OVER_PI * fma(GELU_CUBIC * z * z, z, z); }

__device__ __forceinline__ real activate(real z) {
#if ACTIVATION == RELU
  return z <= 0 ? (real)0 : z;  // in this order a NaN stays one
#elif ACTIVATION == SILU
  return z * Sigmoid(z).up;
#elif ACTIVATION == GELU
  return z * ((real)0.5 * complementary_error(-z * SQRT_HALF));
#elif ACTIVATION == GELU_TANH
  return z * Sigmoid(gelu_argument(z)).up;
#else
  return z;
#endif
}

// Beyond this all exponentials are 0, while z^2 may be infinite.
__device__ __forceinline__ real bounded(real z) { return z > 1000 ? (real)1000 : z < -1000 ? (real)-1000 : z; }

__device__ __forceinline__ real slope(real z) {
#if ACTIVATION == RELU
  return z <= 0 ? (real)0 : z > 0 ? (real)1 : z;
#elif ACTIVATION == SILU
  const Sigmoid gate(z);
  return fma(z * gate.up, gate.down, gate.up);
#elif ACTIVATION == GELU
  return fma(z, INVERSE_SQRT_2PI * exponential((real)-0.5 * z * z), (real)0.5 * complementary_error(-z * SQRT_HALF));
#elif ACTIVATION == GELU_TANH
  z = bounded(z);
  const Sigmoid gate(gelu_argument(z));
  return fma(z * gate.up * gate.down, 2 * SQRT_2_OVER_PI * fma(3 * GELU_CUBIC * z, z, (real)1), gate.up);
#else
  return 1;
#endif
}

__device__ __forceinline__ real curvature(real z) {
#if ACTIVATION == SILU
  const Sigmoid gate(z);
  return gate.up * gate.down * fma(bounded(z), gate.down - gate.up, (real)2);
#elif ACTIVATION == GELU
  z = bounded(z);
  return INVERSE_SQRT_2PI * exponential((real)-0.5 * z * z) * fma(-z, z, (real)2);
#elif ACTIVATION == GELU_TANH
  z = bounded(z);
  const Sigmoid gate(gelu_argument(z));
  const real rise = gate.up * gate.down, argument_slope = 2 * SQRT_2_OVER_PI * fma(3 * GELU_CUBIC * z, z, (real)1);
  const real argument_curvature = 12 * SQRT_2_OVER_PI * GELU_CUBIC * z;
  const real bend = fma((gate.down - gate.up) * argument_slope, argument_slope, argument_curvature);
  return rise * fma(z, bend, 2 * argument_slope);
#else
  return z * 0;
#endif
}
