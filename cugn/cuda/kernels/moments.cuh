// Statistics of the groups of a box, and the affine map of each channel that they give.

// Groups of so few elements get float64 arithmetic: the backward takes two of their directions away, and of what is left
// float32's rounding is a large part (of two elements only what eps leaves). From 12 on it is below 0.6 of the bound.
#define FEW_ELEMENTS (X_DTYPE == FLOAT32 ? 12 : 2)

// float32: the mean from a float64 sum, two float64 operations an element, which even a GPU with 2 of them a clock does
// at the speed of its memory. A channel of one element has its dweight from x - mean alone: there a mean with float32's
// rounding, 1e-8 standard deviations, would be seen.
#define EXACT_MEAN (X_DTYPE == FLOAT32 && !REAL_IS_DOUBLE)

// Whether groups of so few are told by their size, before the first float32 sum. `backward` has no registers to spare for it
// (128 on sm_90, for two blocks), unless single elements make small groups usual.
#if defined(KERNEL_BACKWARD) && !SINGLE
#define FEW_AT_ONCE false
#else
#define FEW_AT_ONCE true
#endif

// Moments of x * unit. The unit is a power of two, 1 unless squares would leave the range of float64, or subnormals lose
// bits; only float64 arithmetic has another one.
struct Moments {
  double count, mean, low;  // the mean in two parts, mean + low: one float64 is not enough for float64 arrays
  double m2, unit;          // sum of (x * unit - mean)^2

  // rstd / unit: what x * unit - mean is to be multiplied by.
  __device__ __forceinline__ double rstd(double eps) const {
    if (unit == 1) return 1 / sqrt(m2 / count + eps);
    return 1 / hypot(sqrt(m2 / count), sqrt(eps) * unit);
  }
  // The same in another unit, x * unit * factor.
  __device__ __forceinline__ void change_unit(double factor) {
    mean *= factor;
    low *= factor;
    m2 = m2 * factor * factor;
    unit *= factor;
  }
  // A unit in which sqrt(eps) is in range, too: it decides where x is far smaller, or as good as constant.
  __device__ __forceinline__ void fit(double eps) {
    if (unit == 1 || !(eps > 0)) return;
    const int size = ilogb(sqrt(eps)) + ilogb(unit);
    if (size > 500) change_unit(ldexp(1.0, 500 - size));
    else if (size < -500 && m2 < 0x1p-1000) change_unit(0x1p+800);
  }
};

// Sum of a and b and what its rounding lost.
__device__ __forceinline__ void two_sum(double a, double b, double& sum, double& lost) {
  sum = a + b;
  const double b_part = sum - a;
  lost = (a - (sum - b_part)) + (b - b_part);
}

// Power of two that brings `largest` to between 2 and 4, the least float64 to 2^-74; 1 for zero, infinity and NaN.
__device__ __forceinline__ double to_unity(double largest) {
  if (!(largest > 0 && largest <= 1.7976931348623157e308)) return 1;
  if (largest < 0x1p-1000) return 0x1p+1000;
  return bits_of<double>((2047ull << 52) - (bits_of<unsigned long long>(largest) & 0x7ff0000000000000ull));
}

// Moments of unit (n, k), group k of sample n in the box, by a team. Called by the whole block; `rows` is 0 for teams
// without a unit.
//
// Two passes over shared memory: a mean, then the sums of d = x - mean and d^2, which correct both. d is rounded once,
// relative to itself, so neither |mean| / std nor an outlier costs accuracy. Where d^2 may have left the range of the
// arithmetic the unit (and no other) is done again in float64, for float64 arrays after scaling by a power of two.
//
// Where the mean alone is wanted, since the caller gave an rstd that float32 takes, m2 is not to be used: of float32 arrays it
// is then not taken, a pass less.
__device__ __forceinline__ Moments moments_of(const Shared<x_t>& x, const Mask& mask, const Box& box, int n, int k, int rows,
                                              int lane, int team, double* scratch, bool mean_alone = false) {
  const int q0 = k * box.run;
  double sum = 0;
  real run_sum = 0;
  int run_count = 0;
  walk(rows, box.run, lane, team,
       [&](auto width, int r, int i) {
         constexpr int K = decltype(width)::value;
         real v[K];
         bool used[K];
         read<X_DTYPE, K>(x, n, r, q0 + i, v);
         mask.read(n, r, q0 + i, used);
#pragma unroll
         for (int j = 0; j < K; ++j) {
           if (!used[j]) v[j] = 0;
           run_count += used[j];
         }
         if constexpr (EXACT_MEAN) {
           double wide[K];
#pragma unroll
           for (int j = 0; j < K; ++j) wide[j] = to_double<FLOAT32>(v[j]);
#pragma unroll
           for (int half = K / 2; half > 0; half /= 2)  // a tree: each step of a chain would wait for the one before
#pragma unroll
             for (int j = 0; j < half; ++j) wide[j] += wide[j + half];
           sum += wide[0];
         } else {
#pragma unroll
           for (int j = 0; j < K; ++j) run_sum += v[j];
         }
       },
       [&] {
         if (EXACT_MEAN) return;
         sum += exactly(run_sum);
         run_sum = 0;
       });
#if MASKED
  Pair total = team_sum(Pair{sum, (double)run_count}, team, scratch);
  const double count = total.b;
#else
  Pair total = {team_sum(sum, team, scratch), 0};
  const double count = box.nr * box.run;
#endif
  const double average = total.a / count;
  const real estimate = (real)average;

  // Known to be few: in float64 right away.
  const bool few = EXACT_MEAN && FEW_AT_ONCE && box.nr * box.run <= FEW_ELEMENTS;
  double s1 = 0, s2 = 0;
  real run_1 = 0, run_2 = 0;
  const bool no_squares = EXACT_MEAN && mean_alone && !few;
  walk(no_squares ? 0 : rows, box.run, lane, team,
       [&](auto width, int r, int i) {
         constexpr int K = decltype(width)::value;
         real v[K];
         bool used[K];
         read<X_DTYPE, K>(x, n, r, q0 + i, v);
         mask.read(n, r, q0 + i, used);
#pragma unroll
         for (int j = 0; j < K; ++j) {
           if (few) {
             const double d = used[j] ? (double)v[j] - average : 0;
             s1 += d;
             s2 = fma(d, d, s2);
           } else {
             const real d = used[j] ? v[j] - estimate : (real)0;
             if (!EXACT_MEAN) run_1 += d;
             run_2 = fma(d, d, run_2);
           }
         }
       },
       [&] {
         if (!EXACT_MEAN) s1 += exactly(run_1);
         s2 += exactly(run_2);
         run_1 = run_2 = 0;
       });
  if (EXACT_MEAN && !few) total = {0, team_sum(s2, team, scratch)};
  else total = team_sum(Pair{s1, s2}, team, scratch);
  if (no_squares) total.b = count;
  if (EXACT_MEAN && !few) total.a = (average - estimate) * count;
  double centre = few ? average : (double)estimate, unit = 1;

#if REAL_IS_DOUBLE
  const bool slow = !(total.b >= count * 1e-250 && total.b <= 1e250);
#else
  const bool slow = !(total.b >= count * 0x1p-96 && total.b <= 0x1p+1000) || (count <= FEW_ELEMENTS && !few);
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
    const double slow_centre = team_sum(sum, team, scratch) / count;
    s1 = s2 = 0;
    walk_slowly(slow_rows, box.run, lane, team, [&](int r, int i) {
      if (mask.at(n, r, q0 + i)) {
        const double d = fma(to_double<X_DTYPE>(x.data[x.index(n, r, q0 + i)]), wanted, -slow_centre);
        s1 += d;
        s2 = fma(d, d, s2);
      }
    });
    const Pair slow_total = team_sum(Pair{s1, s2}, team, scratch);
    if (slow) {
      total = slow_total;
      centre = slow_centre;
      unit = wanted;
    }
  }
  Moments m;
  m.count = count;
  m.unit = unit;
  two_sum(centre, total.a / count, m.mean, m.low);
  m.m2 = fmax(total.b - total.a * (total.a / count), 0.0);
  if (!(total.b == total.b)) m.m2 = total.b;  // fmax would drop a NaN
  return m;
}

#if LABELLED
// Moments of label group g of sample n, by a team, whatever the order of its channels, to the bit: in float64, a mean, and then
// the sums of the differences from it, as moments_of. In a unit where a square might leave the range.
__device__ __forceinline__ Moments moments_of_label(const Shared<x_t>& x, const Mask& mask, const Grouping& grouping, int n,
                                                    int g, int channels, int lane, int team, double* scratch) {
  const auto used = [&](int c) { return mask.at(n, 0, c); };
  const auto value = [&](int c) { return to_double<X_DTYPE>(x.data[x.index(n, 0, c)]); };
  double largest = 0, elements = 0;
  for (int k = lane; k < channels; k += team) {
    const int c = grouping.channel(g, k);
    if (!used(c)) continue;
    largest = fmax(largest, fabs(value(c)));
    ++elements;
  }
  largest = team_max(largest, team, scratch);
  Moments m;
  m.count = MASKED ? team_sum(elements, team, scratch) : channels;
  m.unit = REAL_IS_DOUBLE && !(largest > 1e-100 && largest < 1e100) ? to_unity(largest) : 1;
  const auto scaled = [&](int c) { return REAL_IS_DOUBLE ? value(c) * m.unit : value(c); };
  AnyOrder sum(channels, largest * m.unit);
  for (int k = lane; k < channels; k += team) {
    const int c = grouping.channel(g, k);
    if (used(c)) sum.add(scaled(c));
  }
  const double centre = sum.total(team, scratch) / m.count;
  double distance = 0;
  for (int k = lane; k < channels; k += team) {
    const int c = grouping.channel(g, k);
    if (used(c)) distance = fmax(distance, fabs(scaled(c) - centre));
  }
  distance = team_max(distance, team, scratch);
  AnyOrder rest(channels, distance), squares(channels, distance * distance);
  for (int k = lane; k < channels; k += team) {
    const int c = grouping.channel(g, k);
    if (!used(c)) continue;
    const double d = scaled(c) - centre;
    rest.add(d);
    squares.add(d * d);
  }
  const double left = rest.total(team, scratch), about_centre = squares.total(team, scratch);
  two_sum(centre, left / m.count, m.mean, m.low);
  m.m2 = fmax(about_centre - left * (left / m.count), 0.0);
  if (!(about_centre == about_centre)) m.m2 = about_centre;  // fmax would drop a NaN
  return m;
}
#endif

// What is written of the moments of a part of a group: mean, low, root of m2, count; in float64 arithmetic the unit.
constexpr int PART = REAL_IS_DOUBLE ? 5 : 4;
__device__ __forceinline__ void write_part(double* to, const Moments& m) {
  to[0] = m.mean;
  to[1] = m.low;
  to[2] = sqrt(m.m2);
  to[3] = m.count;
  if (REAL_IS_DOUBLE) to[4] = m.unit;
}

// Moments of a group from those of its parts, PART values every `stride` doubles, by a team: Chan's formula about the mean of
// the first part that has elements, in the order of the parts and in the unit of the largest.
__device__ __forceinline__ Moments merge_parts(const double* from, long long stride, int parts, int lane, int team,
                                               double* scratch) {
  double most = 0;  // of the inverse units
  if (REAL_IS_DOUBLE)
    for (int p = lane; p < parts; p += team)
      if (from[p * stride + 3] > 0) most = fmax(most, 1 / from[p * stride + 4]);
  if (REAL_IS_DOUBLE) most = team_max(most, team, scratch);
  Moments merged;
  merged.unit = REAL_IS_DOUBLE && most > 0 ? 1 / most : 1;
  const auto to_unit = [&](const double* q) { return REAL_IS_DOUBLE ? merged.unit / q[4] : 1; };
  double high0 = 0, low0 = 0;
  if (parts) {
    int p = 0;
    while (p < parts - 1 && !(from[p * stride + 3] > 0)) ++p;
    high0 = from[p * stride] * to_unit(from + p * stride);
    low0 = from[p * stride + 1] * to_unit(from + p * stride);
  }
  double elements = 0, shifted = 0, largest = 0;
  double first_distance = 0, first_root = 0, first_count = 0;  // of the thread's first part: often its only one
  const auto distance = [&](const double* q) { return (q[0] * to_unit(q) - high0) + (q[1] * to_unit(q) - low0); };
  for (int p = lane; p < parts; p += team) {
    const double* q = from + p * stride;
    const double m = q[3], d = distance(q), root = q[2] * to_unit(q);
    if (m > 0) {
      elements += m;
      shifted = fma(m, d, shifted);
      largest = fmax(largest, fmax(fabs(d), root));
    }
    if (p == lane) first_distance = d, first_root = root, first_count = m;
  }
  const Pair sums = team_sum(Pair{elements, shifted}, team, scratch);
  largest = team_max(largest, team, scratch);
  const double factor = largest > 1e-130 && largest < 1e130 ? 1 : to_unity(largest);
  const double correction = sums.b / sums.a;  // no elements: NaN, as the mean of none
  double squares = 0;
  for (int p = lane; p < parts; p += team) {
    const double* q = from + p * stride;
    const double m = p == lane ? first_count : q[3];
    if (m > 0) {
      const double d = ((p == lane ? first_distance : distance(q)) - correction) * factor;
      const double root = (p == lane ? first_root : q[2] * to_unit(q)) * factor;
      squares += fma(root, root, m * (d * d));
    }
  }
  merged.m2 = team_sum(squares, team, scratch);
  merged.count = sums.a;
  two_sum(high0, correction + low0, merged.mean, merged.low);
  merged.mean *= factor;
  merged.low *= factor;
  merged.unit *= factor;
  return merged;
}

// Values of all groups in global memory, a plane (N, G) of doubles for each: the statistics, and the coefficients of the
// backward.
enum Plane { MEAN, LOW, RSTD, UNIT, COUNT, ALONG, OFFSET, SHARE };
struct Planes {
  double* data;
  long long groups;  // N * G
  __device__ __forceinline__ double& at(Plane plane, long long group) const { return data[plane * groups + group]; }
};

// Bounds of |weight|, of rstd and its inverse: within them no step of the float32 arithmetic of an element overflows or
// loses bits to flushed subnormals that would be seen in y. What is beyond is done in float64, and marked by a NaN
// instead of rstd or the scale, since that is where a NaN among the inputs leads anyway.
#define FLOAT_RANGE 0x1p+60
__device__ __forceinline__ real in_range(double v, bool zero_is) {
  const double size = fabs(v);
  const bool inside = REAL_IS_DOUBLE || (size <= FLOAT_RANGE && size >= 1 / FLOAT_RANGE) || (zero_is && size == 0);
  return inside ? (real)v : (real)bits_of<float>(0x7fc00000u);
}

// body(u, group) for each group in the box, u: by threads that share the work; group: its place among all (N, G), by the
// label of its channel where the groups in the box are channels.
template <class Body>
__device__ __forceinline__ void for_each_group(const Box& box, int G, const int* labels, int labelled, Body body) {
  for (int u = threadIdx.x; u < box.ns * box.groups; u += blockDim.x) {
    const int n = u / box.groups, g = box.g0 + u - n * box.groups;
    body(u, (box.n0 + n) * G + (labelled ? labels[g] : g));
  }
}

// One entry of a table in shared memory is left out every 128 bytes, so that entries a power of two apart are in different
// banks: threads that take a vector of the 16-bit types each look up channels 8 apart.
template <class T> __device__ __forceinline__ int spread(int i) { return i + i / (int)(128 / sizeof(T)); }

// Of a group: of x * unit, rstd / unit.
struct Statistic {
  double mean, low, rstd, unit;
};
// The caller's, of group `group` of all: where x or rstd are near an end of the range, in a unit that keeps x - mean in it.
__device__ __forceinline__ Statistic given_statistic(const double* mean, const double* rstd, long long group) {
  const double unit = REAL_IS_DOUBLE && (fabs(mean[group]) > 0x1p+1000 || rstd[group] < 0x1p-1000) ? 0x1p-100 : 1;
  return {mean[group] * unit, 0, rstd[group] / unit, unit};
}
__device__ __forceinline__ Statistic statistic_of(const Planes& from, long long group) {
  return {from.at(MEAN, group), from.at(LOW, group), from.at(RSTD, group), REAL_IS_DOUBLE ? from.at(UNIT, group) : 1};
}

// A group in the arithmetic of the elements: the mean in two parts. x_hat = centred(x) * rstd.
struct Centre {
  real high, low, rstd, unit;
  __device__ __forceinline__ Centre(const Statistic& s) {
    high = (real)s.mean;
    low = (real)((s.mean - high) + s.low);
    rstd = REAL_IS_DOUBLE || fabs(s.mean) <= 0x1p+100 ? in_range(s.rstd, false) : (real)bits_of<float>(0x7fc00000u);
    unit = (real)s.unit;
  }
  Centre() = default;
};
// x - mean, in the group's unit; the product with it is exact.
template <class Entry> __device__ __forceinline__ real centred(const Entry& e, real x) {
  return (REAL_IS_DOUBLE ? fma(x, e.unit, -e.high) : x - e.high) - e.low;
}

// Weight and bias of a channel, and their tangents: exact, for float64 ones have float64 arithmetic.
struct Scale {
  real weight, bias;
  real safe;  // the weight, NaN where it is out of range
#if TANGENT
  real tweight, tbias;
#endif
};
// By its bits, which no flushing touches.
__device__ __forceinline__ real safe_weight(real weight) {
  if (REAL_IS_DOUBLE) return weight;
  const unsigned size = bits_of<unsigned>((float)weight) & 0x7fffffffu;
  const bool out = size > bits_of<unsigned>((float)FLOAT_RANGE) || (size != 0 && size < bits_of<unsigned>((float)(1 / FLOAT_RANGE)));
  return out ? (real)bits_of<float>(0x7fc00000u) : weight;
}

// The caller's weight and bias, and their tangents; a dtype below zero stands for none.
struct Parameters {
  const void *weight, *bias, *tweight, *tbias;
  int weight_dtype, bias_dtype, tweight_dtype, tbias_dtype;
};
#define PARAMETERS const void *weight, const int weight_dtype, const void *bias, const int bias_dtype
#define TANGENTS const void *tweight, const int tweight_dtype, const void *tbias, const int tbias_dtype

// What a group adds to each element in the backward: along * x_hat + offset; in float32 along * d + offset with d = x - mean,
// one rounding less (in float64 the square of rstd in it would leave the range). `share`: what v is multiplied by beside, in
// float64; 1, but for a group of two elements.
struct Coefficient {
  real along, offset, share;
};

// The same in float64: along * x_hat + offset.
struct ExactCoefficient {
  double along, offset, share;
};

// Tables of a box in shared memory, one of each value: what is looked up for a group and for a channel of a sample. Beside the
// values of the elements' arithmetic stand those that float64 takes over with where float32 does not reach: mean and rstd of
// the groups (one float64 is enough for the mean of what is no float64 array), and their coefficients.
struct Tables {
  double* exact;
  real *of_groups, *of_channels;
  int units, group_step, channel_step;  // from the table of a value to the next
  static constexpr int GROUP_VALUES = REAL_IS_DOUBLE ? 4 : 3, SHARES = REAL_IS_DOUBLE ? 1 : 0, CHANNEL_VALUES = TANGENT ? 4 : 2;

  // `coefficients`: 2 where they are kept, else 0.
  __device__ __forceinline__ Tables(double* p, int units, int channels, int coefficients)
      : exact(p), units(units), group_step(spread<real>(units)), channel_step(spread<real>(channels)) {
    of_groups = reinterpret_cast<real*>(exact + (REAL_IS_DOUBLE ? 0 : (2 + coefficients) * units));
    of_channels = of_groups + (GROUP_VALUES + (coefficients ? coefficients + SHARES : 0)) * group_step;
  }
  __device__ __forceinline__ unsigned char* end() const {
    return reinterpret_cast<unsigned char*>(of_channels + CHANNEL_VALUES * channel_step);
  }
  __device__ __forceinline__ real& group(int value, int u) const { return of_groups[value * group_step + spread<real>(u)]; }
  __device__ __forceinline__ real& channel(int value, int c) const {
    return of_channels[value * channel_step + spread<real>(c)];
  }

  __device__ __forceinline__ Statistic statistic(int u) const {
    if constexpr (REAL_IS_DOUBLE) return {group(0, u), group(1, u), group(2, u), group(3, u)};
    else return {exact[u], 0, exact[units + u], 1};
  }
  __device__ __forceinline__ Centre centre(int u) const {
    Centre centre;
    centre.high = group(0, u);
    centre.low = group(1, u);
    centre.rstd = group(2, u);
    centre.unit = REAL_IS_DOUBLE ? group(3, u) : (real)1;
    return centre;
  }
  // Whether a group is in the range of the arithmetic of the elements, or goes to float64.
  __device__ __forceinline__ bool in_reals(int u) const { return REAL_IS_DOUBLE || group(2, u) == group(2, u); }
  __device__ __forceinline__ void to_exact(int u) const { group(2, u) = (real)bits_of<float>(0x7fc00000u); }
  __device__ __forceinline__ void set(int u, const Statistic& s, bool mean = true) const {
    const Centre centre(s);
    group(0, u) = centre.high;
    group(1, u) = centre.low;
    group(2, u) = centre.rstd;
    if (REAL_IS_DOUBLE) {
      group(3, u) = centre.unit;
    } else {
      if (mean) exact[u] = s.mean;
      exact[units + u] = s.rstd;
    }
  }
  // After held(): the mean stands there.
  __device__ __forceinline__ void finish(int u, const Moments& m, double rstd) const {
    set(u, {m.mean, m.low, rstd, m.unit}, false);
  }
  // Moments in the places of a group, of which the mean of the squares is kept, as if of one element.
  __device__ __forceinline__ void hold(int u, const Moments& m) const {
    if constexpr (REAL_IS_DOUBLE) {
      group(0, u) = m.mean;
      group(2, u) = m.m2 / m.count;
      group(3, u) = m.unit;
    } else {
      exact[u] = m.mean;
      exact[units + u] = m.m2 / m.count;
    }
    group(1, u) = (real)m.low;
  }
  __device__ __forceinline__ Moments held(int u) const {
    if constexpr (REAL_IS_DOUBLE) return {1, group(0, u), group(1, u), group(2, u), group(3, u)};
    else return {1, exact[u], group(1, u), exact[units + u], 1};
  }
  // Sums over a group in the places of its coefficients.
  __device__ __forceinline__ double& held_sum(int which, int u) const {
#if REAL_IS_DOUBLE
    return group(GROUP_VALUES + which, u);
#else
    return exact[(2 + which) * units + u];
#endif
  }
  __device__ __forceinline__ ExactCoefficient exact_coefficient(int u) const {
    return {exact[2 * units + u], exact[3 * units + u], 1};
  }
  __device__ __forceinline__ void set_exact_coefficient(int u, const ExactCoefficient& coefficient) const {
    if (REAL_IS_DOUBLE) return;
    exact[2 * units + u] = coefficient.along;
    exact[3 * units + u] = coefficient.offset;
  }
  // `shares`: whether there are groups of two; without, a thirtieth of what shared memory moves is saved in float64.
  __device__ __forceinline__ Coefficient coefficient(int u, bool shares) const {
    const real share = REAL_IS_DOUBLE && shares ? group(GROUP_VALUES + 2, u) : (real)1;
    return {group(GROUP_VALUES, u), group(GROUP_VALUES + 1, u), share};
  }
  __device__ __forceinline__ void set_coefficient(int u, const Coefficient& coefficient, bool shares) const {
    group(GROUP_VALUES, u) = coefficient.along;
    group(GROUP_VALUES + 1, u) = coefficient.offset;
    if (REAL_IS_DOUBLE && shares) group(GROUP_VALUES + 2, u) = coefficient.share;
  }
  // `bias`: whether it is needed.
  __device__ __forceinline__ Scale scale(int c, bool bias = true) const {
    Scale scale;
    scale.weight = channel(0, c);
    scale.safe = safe_weight(scale.weight);
    scale.bias = bias ? channel(1, c) : (real)0;
#if TANGENT
    scale.tweight = channel(2, c);
    scale.tbias = channel(3, c);
#endif
    return scale;
  }
  __device__ void fill_scales(const Box& box, const Parameters& p) const {
    for (int c = threadIdx.x; c < box.nc; c += blockDim.x) {
      channel(0, c) = narrowed(parameter(p.weight, p.weight_dtype, box.c0 + c, 1));
      channel(1, c) = narrowed(parameter(p.bias, p.bias_dtype, box.c0 + c, 0));
#if TANGENT
      channel(2, c) = narrowed(parameter(p.tweight, p.tweight_dtype, box.c0 + c, 0));
      channel(3, c) = narrowed(parameter(p.tbias, p.tbias_dtype, box.c0 + c, 0));
#endif
    }
  }
  static __device__ __forceinline__ real narrowed(double v) { return REAL_IS_DOUBLE ? (real)v : (real)narrow(v); }
};

// y = act(centred(x) * scale + shift): a channel of a sample.
struct Affine {
  real high, low, unit, scale, shift;
};

// The operation `apply` of the forward. `From`: the box of x, in shared or in global memory.
template <class From> struct Normalization {
  const From x;
  const Tables tables;
  const Grouping grouping;

  typedef Affine Entry;
  typedef Centre Group;
  typedef ::Scale Scale;
  typedef Statistic ExactGroup;
  typedef const x_t* Input;
  template <int K> struct Values {
    Pack<x_t, K> x;
  };
  // Loads in flight; registers limit them, above all beside erfc.
  static constexpr int UNROLL = ACTIVATION == GELU && ENTRIES == 8 ? 1 : !From::FAR ? 2 : ENTRIES == 4 ? 3 : 4;

  __device__ __forceinline__ Centre group(int u) const { return tables.centre(u); }
  __device__ __forceinline__ Scale scale(int c) const { return tables.scale(c); }
  __device__ __forceinline__ Affine entry(const Centre& centre, const Scale& scale) const {
    return {centre.high, centre.low, centre.unit, scale.safe * centre.rstd, scale.bias};
  }
  static constexpr bool FEW_REGISTERS = true;  // of an entry
  __device__ __forceinline__ bool all_slow() const { return false; }
  __device__ __forceinline__ bool slow(const Affine& entry) const { return !REAL_IS_DOUBLE && entry.scale != entry.scale; }
  __device__ __forceinline__ Statistic exact_group(int u) const { return tables.statistic(u); }

  __device__ __forceinline__ const x_t* input(int n, int r) const { return x.row(n, r); }
  template <int K> __device__ __forceinline__ void load(Values<K>& values, const x_t* from, int e, int, int, int, bool aligned) const {
    values.x = load_pack<x_t, K>(from + e, aligned);
  }
  __device__ __forceinline__ bool rows_aligned() const { return x.rows_aligned(); }
  __device__ __forceinline__ bool aligned_at(const x_t* from, int e) const { return (size_t)(from + e) % (VY * sizeof(x_t)) == 0; }
  template <int K> __device__ __forceinline__ real fast(const Affine& entry, const Values<K>& values, int k) const {
    return activate(fma(centred(entry, to_real<X_DTYPE>(values.x.element[k])), entry.scale, entry.shift));
  }
  template <int K>
  __device__ __forceinline__ double exact(const Statistic& group, int c, const Values<K>& values, int k) const {
    const double d = (to_double<X_DTYPE>(values.x.element[k]) - group.mean) - group.low;
    const Scale scale = tables.scale(c);
    const double z = fma(d * group.rstd, exactly(scale.weight), exactly(scale.bias));
    return ACTIVATION == IDENTITY ? z : (double)activate((real)z);
  }
};
