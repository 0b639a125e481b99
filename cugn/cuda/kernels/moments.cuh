// Statistics of the groups of a box, and the affine map of each channel that they give.

// Groups of so few elements get float64 arithmetic: the backward takes two of their directions away, and of what is left
// float32's rounding is a large part (of two elements only what eps leaves). From 12 on it is below 0.6 of the bound.
#define FEW_ELEMENTS (X_DTYPE == FLOAT32 ? 12 : 2)

// float32: the mean from a float64 sum, two float64 operations an element, which even a GPU with 2 of them a clock does
// at the speed of its memory. A channel of one element has its dweight from x - mean alone: there a mean with float32's
// rounding, 1e-8 standard deviations, would be seen.
#define EXACT_MEAN (X_DTYPE == FLOAT32 && !REAL_IS_DOUBLE)

struct Moments {
  double count, mean, low;  // the mean in two parts, mean + low: one float64 is not enough for float64 arrays
  double m2, scale;         // sum of ((x - mean) * scale)^2; the scale is a power of two, 1 unless m2 would leave the range

  __device__ __forceinline__ double root() const { return sqrt(m2) / scale; }  // of the unscaled m2
  __device__ __forceinline__ double rstd(double eps) const {
    if (scale == 1) return 1 / sqrt(m2 / count + eps);
    return 1 / hypot(sqrt(m2 / count) / scale, sqrt(eps));
  }
};

// Sum of a and b and what its rounding lost.
__device__ __forceinline__ void two_sum(double a, double b, double& sum, double& lost) {
  sum = a + b;
  const double b_part = sum - a;
  lost = (a - (sum - b_part)) + (b - b_part);
}

// Power of two that brings `largest` to between 1 and 2; 1 for values that cannot be brought there.
__device__ __forceinline__ double to_unity(double largest) {
  if (!(largest > 0x1p-1000 && largest <= 1.7976931348623157e308)) return 1;
  return bits_of<double>((2046ull << 52) - (bits_of<unsigned long long>(largest) & 0x7ff0000000000000ull));
}

// Moments of unit (n, k), group k of sample n in the box, by a team. Called by the whole block; `rows` is 0 for teams
// without a unit.
//
// Two passes over shared memory: a mean, then the sums of d = x - mean and d^2, which correct both. d is rounded once,
// relative to itself, so neither |mean| / std nor an outlier costs accuracy. Where d^2 may have left the range of the
// arithmetic the unit (and no other) is done again in float64, for float64 arrays after scaling by a power of two.
__device__ __forceinline__ Moments moments_of(const Shared<x_t>& x, const Mask& mask, const Box& box, int n, int k, int rows,
                                              int lane, int team, double* scratch) {
  const int q0 = k * box.run;
  double sum = 0, counted = 0;
  real run_sum = 0;
  int run_count = 0;
  walk(rows, box.run, lane, team,
       [&](auto width, int r, int i) {
         constexpr int K = decltype(width)::value;
         real v[K];
         read<X_DTYPE, K>(x, n, r, q0 + i, v);
#pragma unroll
         for (int j = 0; j < K; ++j) {
           const bool used = mask.at(n, r, q0 + i + j);
           if (EXACT_MEAN) sum += (double)(used ? v[j] : (real)0);
           else run_sum += used ? v[j] : (real)0;
           run_count += used;
         }
       },
       [&] {
         sum += run_sum;
         run_sum = 0;
       });
  counted = run_count;
  Pair total = team_sum({sum, counted}, team, scratch);
  const double count = total.b;
  const double average = total.a / count;
  const real estimate = (real)average;

  double s1 = 0, s2 = 0;
  real run_1 = 0, run_2 = 0;
  walk(rows, box.run, lane, team,
       [&](auto width, int r, int i) {
         constexpr int K = decltype(width)::value;
         real v[K];
         read<X_DTYPE, K>(x, n, r, q0 + i, v);
#pragma unroll
         for (int j = 0; j < K; ++j) {
           const real d = mask.at(n, r, q0 + i + j) ? v[j] - estimate : (real)0;
           if (!EXACT_MEAN) run_1 += d;
           run_2 = fma(d, d, run_2);
         }
       },
       [&] {
         s1 += run_1;
         s2 += run_2;
         run_1 = run_2 = 0;
       });
  total = team_sum({s1, s2}, team, scratch);
  if (EXACT_MEAN) total.a = (average - estimate) * count;
  double centre = estimate, scale = 1;

#if REAL_IS_DOUBLE
  const bool slow = !(total.b >= count * 1e-250 && total.b <= 1e250);
#else
  const bool slow = !(total.b >= count * 0x1p-96 && total.b <= 0x1p+1000) || count <= FEW_ELEMENTS;
#endif
  if (any_of_team(slow, team)) {
    const int slow_rows = slow ? rows : 0;
    double wanted = 1;
#if REAL_IS_DOUBLE
    double largest = 0;
    walk_slowly(slow_rows, box.run, lane, team, [&](int r, int i) {
      if (mask.at(n, r, q0 + i)) largest = fmax(largest, fabs(to_double<X_DTYPE>(x.data[x.index(n, r, q0 + i)])));
    });
    wanted = to_unity(team_max(largest, team, scratch));
#endif
    sum = 0;
    walk_slowly(slow_rows, box.run, lane, team, [&](int r, int i) {
      if (mask.at(n, r, q0 + i)) sum += to_double<X_DTYPE>(x.data[x.index(n, r, q0 + i)]) * wanted;
    });
    const double slow_centre = team_sum({sum, 0}, team, scratch).a / count;
    s1 = s2 = 0;
    walk_slowly(slow_rows, box.run, lane, team, [&](int r, int i) {
      if (mask.at(n, r, q0 + i)) {
        const double d = fma(to_double<X_DTYPE>(x.data[x.index(n, r, q0 + i)]), wanted, -slow_centre);
        s1 += d;
        s2 = fma(d, d, s2);
      }
    });
    const Pair slow_total = team_sum({s1, s2}, team, scratch);
    if (slow) {
      total = slow_total;
      centre = slow_centre;
      scale = wanted;
    }
  }
  Moments m;
  m.count = count;
  m.scale = scale;
  two_sum(centre, total.a / count, m.mean, m.low);
  m.m2 = fmax(total.b - total.a * (total.a / count), 0.0);
  if (!(total.b == total.b)) m.m2 = total.b;  // fmax would drop a NaN
  if (scale != 1) {
    m.mean /= scale;
    m.low /= scale;
  }
  return m;
}

// Moments of a group from those of its parts, (mean, low, root of m2, count) every `stride` doubles, by a team: Chan's
// formula about the mean of the first part that has elements, in the order of the parts.
__device__ __forceinline__ Moments merge_parts(const double* from, long long stride, int parts, int lane, int team,
                                               double* scratch) {
  double high0 = 0, low0 = 0;
  if (parts) {
    int p = 0;
    while (p < parts - 1 && !(from[p * stride + 3] > 0)) ++p;
    high0 = from[p * stride];
    low0 = from[p * stride + 1];
  }
  double elements = 0, shifted = 0, largest = 0;
  double first_distance = 0, first_root = 0, first_count = 0;  // of the thread's first part: often its only one
  for (int p = lane; p < parts; p += team) {
    const double* q = from + p * stride;
    const double m = q[3], d = (q[0] - high0) + (q[1] - low0), root = q[2];
    if (m > 0) {
      elements += m;
      shifted = fma(m, d, shifted);
      largest = fmax(largest, fmax(fabs(d), root));
    }
    if (p == lane) first_distance = d, first_root = root, first_count = m;
  }
  const Pair sums = team_sum({elements, shifted}, team, scratch);
  largest = team_max(largest, team, scratch);
  Moments merged;
  merged.scale = largest > 1e-130 && largest < 1e130 ? 1 : to_unity(largest);
  const double correction = sums.b / sums.a;  // no elements: NaN, as the mean of none
  double squares = 0;
  for (int p = lane; p < parts; p += team) {
    const double* q = from + p * stride;
    const double m = p == lane ? first_count : q[3];
    if (m > 0) {
      const double from_first = p == lane ? first_distance : (q[0] - high0) + (q[1] - low0);
      const double d = (from_first - correction) * merged.scale, root = (p == lane ? first_root : q[2]) * merged.scale;
      squares += fma(root, root, m * (d * d));
    }
  }
  merged.m2 = team_sum({squares, 0}, team, scratch).a;
  merged.count = sums.a;
  two_sum(high0, correction + low0, merged.mean, merged.low);
  return merged;
}

// Bounds of |weight|, of rstd and its inverse: within them no step of the float32 arithmetic of an element overflows or
// loses bits to flushed subnormals that would be seen in y. What is beyond is done in float64, and marked by a NaN
// instead of rstd or the scale, since that is where a NaN among the inputs leads anyway.
#define FLOAT_RANGE 0x1p+60
__device__ __forceinline__ real in_range(double v, bool zero_is) {
  const double size = fabs(v);
  const bool inside = REAL_IS_DOUBLE || (size <= FLOAT_RANGE && size >= 1 / FLOAT_RANGE) || (zero_is && size == 0);
  return inside ? (real)v : (real)bits_of<float>(0x7fc00000u);
}
__device__ __forceinline__ double exactly(float v) { return widen(v); }
__device__ __forceinline__ double exactly(double v) { return v; }

// Statistics of the groups in the box, in shared memory, `units` of each.
struct Statistics {
  double *mean, *low, *rstd;
  __device__ __forceinline__ Statistics(double* p, int units) : mean(p), low(p + units), rstd(p + 2 * units) {}

  // From arrays of (N, G): those of the merge, or of the caller. labels: group of each channel, where labelled.
  __device__ void load(const double* means, const double* lows, int have_low, const double* rstds, int G, const int* labels,
                       int labelled, const Box& box) const {
    for (int u = threadIdx.x; u < box.ns * box.groups; u += blockDim.x) {
      const int n = u / box.groups, g = box.g0 + u - n * box.groups;
      const long long at = (box.n0 + n) * G + (labelled ? labels[g] : g);
      mean[u] = means[at];
      low[u] = have_low ? lows[at] : 0;
      rstd[u] = rstds[at];
    }
  }
};

// A group in the arithmetic of the elements: the mean in two parts. x_hat = ((x - high) - low) * rstd.
struct Centre {
  real high, low, rstd;
  __device__ __forceinline__ Centre(const Statistics& s, int u) {
    const double mean = s.mean[u];
    high = (real)mean;
    low = (real)((mean - high) + s.low[u]);
    rstd = REAL_IS_DOUBLE || fabs(mean) <= 0x1p+100 ? in_range(s.rstd[u], false) : (real)bits_of<float>(0x7fc00000u);
  }
  Centre() = default;
};

// Weight and bias of a channel, and their tangents: exact, for float64 ones have float64 arithmetic.
struct Scale {
  real weight, bias;
#if TANGENT
  real tweight, tbias;
#endif
  // weight * rstd, NaN where the weight is out of range; by its bits, which no flushing touches.
  __device__ __forceinline__ real times(real rstd) const {
    if (!REAL_IS_DOUBLE) {
      const unsigned size = bits_of<unsigned>((float)weight) & 0x7fffffffu;
      if (size > bits_of<unsigned>((float)FLOAT_RANGE) || (size != 0 && size < bits_of<unsigned>((float)(1 / FLOAT_RANGE))))
        return (real)bits_of<float>(0x7fc00000u);
    }
    return weight * rstd;
  }
};

// The caller's weight and bias, and their tangents; a dtype below zero stands for none.
struct Parameters {
  const void *weight, *bias, *tweight, *tbias;
  int weight_dtype, bias_dtype, tweight_dtype, tbias_dtype;
};
#define PARAMETERS const void *weight, const int weight_dtype, const void *bias, const int bias_dtype
#define TANGENTS const void *tweight, const int tweight_dtype, const void *tbias, const int tbias_dtype

// Both tables of a box, in shared memory: what `apply` looks up for a channel of a sample.
struct Tables {
  Centre* centres;  // of its groups
  Scale* scales;    // of its channels
  __device__ __forceinline__ Tables(unsigned char* p, int most_units)
      : centres(reinterpret_cast<Centre*>(p)), scales(reinterpret_cast<Scale*>(centres + (most_units + 1) / 2 * 2)) {}
  __device__ __forceinline__ unsigned char* end(int channels) const {
    return reinterpret_cast<unsigned char*>(scales + (channels + 1) / 2 * 2);
  }
  __device__ void fill_scales(const Box& box, const Parameters& p) {
    for (int c = threadIdx.x; c < box.nc; c += blockDim.x) {
      scales[c].weight = narrowed(parameter(p.weight, p.weight_dtype, box.c0 + c, 1));
      scales[c].bias = narrowed(parameter(p.bias, p.bias_dtype, box.c0 + c, 0));
#if TANGENT
      scales[c].tweight = narrowed(parameter(p.tweight, p.tweight_dtype, box.c0 + c, 0));
      scales[c].tbias = narrowed(parameter(p.tbias, p.tbias_dtype, box.c0 + c, 0));
#endif
    }
  }
  static __device__ __forceinline__ real narrowed(double v) { return REAL_IS_DOUBLE ? (real)v : (real)narrow(v); }
  __device__ void fill_centres(const Box& box, const Statistics& statistics) {
    for (int u = threadIdx.x; u < box.ns * box.groups; u += blockDim.x) centres[u] = Centre(statistics, u);
  }
};

// y = act(((x - high) - low) * scale + shift): a channel of a sample.
struct Affine {
  real high, low, scale, shift;
};

// The operation `apply` of the forward. `From`: the box of x, in shared or in global memory.
template <class From> struct Normalization {
  const From x;
  const Statistics statistics;
  const Tables tables;
  const Box& box;
  const Divisor by_group;

  __device__ __forceinline__ Normalization(const From& x, const Statistics& statistics, const Tables& tables, const Box& box)
      : x(x), statistics(statistics), tables(tables), box(box), by_group(box.group_channels) {}

  typedef Affine Entry;
  struct Exact {
    double mean, low, rstd, weight, bias;
  };
  typedef const x_t* Input;
  template <int K> struct Values {
    Pack<x_t, K> x;
  };

  __device__ __forceinline__ int unit(int n, int c) const {
    return n * box.groups + (box.groups == 1 ? 0 : by_group.quotient(c));
  }
  __device__ __forceinline__ Affine entry(int n, int c) const {
    const Centre centre = tables.centres[unit(n, c)];
    const Scale scale = tables.scales[c];
    return {centre.high, centre.low, scale.times(centre.rstd), scale.bias};
  }
  __device__ __forceinline__ bool slow(const Affine& entry) const { return !REAL_IS_DOUBLE && entry.scale != entry.scale; }
  __device__ __forceinline__ Exact exact_entry(int n, int c) const {
    const int u = unit(n, c);
    return {statistics.mean[u], statistics.low[u], statistics.rstd[u], exactly(tables.scales[c].weight),
            exactly(tables.scales[c].bias)};
  }

  __device__ __forceinline__ const x_t* input(int n, int r) const { return x.row(n, r); }
  template <int K> __device__ __forceinline__ void load(Values<K>& values, const x_t* from, int e, int, int, int) const {
    values.x = load_pack<x_t, K>(from + e, (size_t)(from + e) % (K * sizeof(x_t)) == 0);
  }
  template <int K> __device__ __forceinline__ real fast(const Affine& entry, const Values<K>& values, int k) const {
    const real d = (to_real<X_DTYPE>(values.x.element[k]) - entry.high) - entry.low;
    return activate(fma(d, entry.scale, entry.shift));
  }
  template <int K> __device__ __forceinline__ double exact(const Exact& entry, const Values<K>& values, int k) const {
    const double d = (to_double<X_DTYPE>(values.x.element[k]) - entry.mean) - entry.low;
    const double z = fma(d * entry.rstd, entry.weight, entry.bias);
    return ACTIVATION == IDENTITY ? z : (double)activate((real)z);
  }
};
