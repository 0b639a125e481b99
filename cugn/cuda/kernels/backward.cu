// Backward: dx, and the sums over samples and positions that are dweight and dbias. With -DTANGENT=1 the tangent (jvp).
//
// Both are the same mechanism: of v (dz = dy act'(z); or tx) the sums of v and v x_hat over each channel, from them two
// coefficients of each group, and then every element is scale * v + along * d + offset, with d = x - mean.
//
// A box of whole groups that fits in shared memory: `backward` alone. x and dy are read once, dx written once, and two
// sums a channel written for every block. A larger group: `backward_sums` of its boxes (x and dy read once),
// `merge_backward` in a fixed order, `backward_apply` (x and dy read again, dx written). The sums of a box are taken about
// the box's own mean, so that they need no statistics; an activation does, and then takes those of merge_moments.
// `parameter_gradients` adds the sums up over the samples.
//
// Accumulators: float32 over SHORT_RUN elements, float64 beyond (float64 arrays: float64 throughout).
// Requires: as forward.cu; dx may be the memory of x or dy where it has the same strides.
//
// Options: X_DTYPE (= Y_DTYPE), ACTIVATION, MASKED, VECTOR_CHANNELS, TANGENT; SINGLE, for `backward` where S = 1, and there
// LABELLED.

#define PARAMETER_ARGUMENTS \
  {weight, bias, tweight, tbias, weight_dtype, bias_dtype, tweight_dtype, tbias_dtype}

// Whether an activation's slope comes in, and so the bias.
constexpr bool BENT = ACTIVATION != IDENTITY;

// Whether a channel is in the range of the arithmetic of the elements, or else goes to float64: x_hat and the slope there.
__device__ __forceinline__ bool in_reals(const Scale& scale) {
  return REAL_IS_DOUBLE || TANGENT || !BENT || in_range(scale.weight, true) == scale.weight;
}
__device__ __forceinline__ double exact_x_hat(const Statistic& group, x_t x) {
  return ((to_double<X_DTYPE>(x) - group.mean) - group.low) * group.rstd;
}
__device__ __forceinline__ double exact_slope(double x_hat, const Scale& scale) {
  return (double)slope((real)fma(x_hat, exactly(scale.weight), exactly(scale.bias)));
}

// A channel of a sample. The slope is taken at centred(x) * bend + shift.
struct Entries {
  real high, low, unit, rstd, scale, bend, shift, along, offset;
};

// The operation `apply` of the backward. `FromX`, `FromV`: the boxes of x and v, in shared or in global memory.
template <class FromX, class FromV> struct Gradient {
  const FromX x;
  const FromV v;
  const Tables tables;
  const Mask mask;
  const Box& box;
  const Grouping grouping;
  const bool shares;  // whether there are groups of two elements

  typedef Entries Entry;
  typedef ::Scale Scale;
  struct Group {
    Centre centre;
    Coefficient coefficient;
  };
  struct ExactGroup {
    Statistic statistic;
    ExactCoefficient coefficient;
  };
  struct Input {
    const x_t* x;
    const x_t* v;
  };
  template <int K> struct Values {
    Pack<x_t, K> x, v;
    bool used[K];
  };
  static constexpr int UNROLL = (FromX::FAR ? 2 : 1) * (ENTRIES == 1 ? 2 : 1);  // loads in flight, of each array

  __device__ __forceinline__ Group group(int u) const { return {tables.centre(u), tables.coefficient(u, shares)}; }
  __device__ __forceinline__ Scale scale(int c) const { return tables.scale(c, BENT); }
  __device__ __forceinline__ Entries entry(const Group& group, const Scale& scale) const {
    const Centre& centre = group.centre;
    const Coefficient& coefficient = group.coefficient;
    const real bend = scale.safe * centre.rstd;
    Entries e = {centre.high, centre.low, centre.unit, centre.rstd,       REAL_IS_DOUBLE ? bend * coefficient.share : bend,
                 bend,        scale.bias, coefficient.along, coefficient.offset};
#if TANGENT
    if (REAL_IS_DOUBLE) e.scale *= centre.unit;
    e.along = fma(scale.weight, e.along, REAL_IS_DOUBLE ? scale.tweight : scale.tweight * centre.rstd);
    e.offset = fma(scale.weight, e.offset, scale.tbias);
#endif
    return e;
  }
  static constexpr bool FEW_REGISTERS = false;
  // Small groups of float32, which `backward` knows by their size.
  __device__ __forceinline__ bool all_slow() const { return SINGLE && !LABELLED && !REAL_IS_DOUBLE && box.nr * box.run <= FEW_ELEMENTS; }
  __device__ __forceinline__ bool slow(const Entries& e) const { return !REAL_IS_DOUBLE && e.scale != e.scale; }

  __device__ __forceinline__ ExactGroup exact_group(int u) const {
    return {tables.statistic(u), tables.exact_coefficient(u)};
  }

  __device__ __forceinline__ Input input(int n, int r) const { return {x.row(n, r), v.row(n, r)}; }
  __device__ __forceinline__ bool rows_aligned() const { return x.rows_aligned() && v.rows_aligned(); }
  __device__ __forceinline__ bool aligned_at(const Input& from, int e) const {
    return ((size_t)(from.x + e) | (size_t)(from.v + e)) % (VY * sizeof(x_t)) == 0;
  }
  template <int K>
  __device__ __forceinline__ void load(Values<K>& values, const Input& from, int e, int n, int r, int q, bool aligned) const {
    values.x = load_pack<x_t, K>(from.x + e, aligned);
    values.v = load_pack<x_t, K>(from.v + e, aligned);
    if (!TANGENT) mask.read(n, r, q, values.used, false);
  }
  template <int K> __device__ __forceinline__ real fast(const Entries& e, const Values<K>& values, int k) const {
    const real d = centred(e, to_real<X_DTYPE>(values.x.element[k])), v = to_real<X_DTYPE>(values.v.element[k]);
    const real along = fma(e.along, REAL_IS_DOUBLE ? d * e.rstd : d, e.offset);
#if TANGENT
    const real t = fma(e.scale, v, along);
    return ACTIVATION == IDENTITY ? t : t * slope(fma(d, e.bend, e.shift));
#else
    const real dz = ACTIVATION == IDENTITY ? v : v * slope(fma(d, e.bend, e.shift));
    const real dx = fma(e.scale, dz, values.used[k] ? along : (real)0);
    return REAL_IS_DOUBLE ? dx * e.unit : dx;  // last: where dx is below the normal range, it is rounded once
#endif
  }
  template <int K>
  __device__ __forceinline__ double exact(const ExactGroup& g, int c, const Values<K>& values, int k) const {
    const Scale scale = tables.scale(c, BENT);
    const double v = to_double<X_DTYPE>(values.v.element[k]), w = exactly(scale.weight), rstd = g.statistic.rstd;
    const double x_hat = exact_x_hat(g.statistic, values.x.element[k]), bend = BENT ? exact_slope(x_hat, scale) : 1;
    const double from_group = fma(g.coefficient.along, x_hat, g.coefficient.offset);
#if TANGENT
    return fma(w, fma(rstd, v, from_group), fma(exactly(scale.tweight), x_hat, exactly(scale.tbias))) * bend;
#else
    return fma(rstd * w, v * bend, values.used[k] ? from_group : 0);
#endif
  }
};

// Sums of v and v x_hat, in shared memory.
struct ChannelSums {
  double *of_v, *of_v_x_hat;
  __device__ __forceinline__ ChannelSums(double* p, int count) : of_v(p), of_v_x_hat(p + spread<double>(count)) {}
  __device__ __forceinline__ Pair at(int i) const { return {of_v[spread<double>(i)], of_v_x_hat[spread<double>(i)]}; }
  __device__ __forceinline__ void set(int i, const Pair& sum) const {
    of_v[spread<double>(i)] = sum.a;
    of_v_x_hat[spread<double>(i)] = sum.b;
  }
  __device__ __forceinline__ double* end(int count) const { return of_v_x_hat + spread<double>(count); }
};

// Sums over each channel c of each sample n in the box, to sums[n nc + c]; v = dz, or tx where it is used. x_hat is about the
// statistics in the tables, whatever they are. Where a row has one element of a channel, threads take columns; else teams
// take channels.
struct SumChannels {
  const Shared<x_t>&x, &dy;
  const Mask& mask;
  const Box& box;
  const Tables& tables;
  const ChannelSums& sums;
  const Grouping grouping;

  // Elements q, ..., q + K - 1 of a row, of one channel or (centre, scale: arrays) of K of them.
  template <int K, class OfGroup, class OfChannel, class Add>
  __device__ __forceinline__ void add(int n, int r, int q, OfGroup centre, OfChannel scale, Add add) const {
    real xs[K], vs[K];
    read<X_DTYPE, K>(x, n, r, q, xs);
    read<X_DTYPE, K>(dy, n, r, q, vs);
#if TANGENT
    bool used[K];
    mask.read(n, r, q, used);
#endif
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const real x_hat = centred(centre(k), xs[k]) * centre(k).rstd;
#if TANGENT
      add(k, used[k] ? vs[k] : (real)0, used[k] ? x_hat : (real)0);
#else
      add(k, ACTIVATION == IDENTITY ? vs[k] : vs[k] * slope(fma(x_hat, scale(k).weight, scale(k).bias)), x_hat);
#endif
    }
  }
  __device__ __forceinline__ Pair slowly(int n, int r, int q, const Statistic& statistic, const Scale& scale) const {
    const double x_hat = exact_x_hat(statistic, x.data[x.index(n, r, q)]);
    double v = to_double<X_DTYPE>(dy.data[dy.index(n, r, q)]);
    if (!TANGENT && BENT) v *= exact_slope(x_hat, scale);
    if (TANGENT && !mask.at(n, r, q)) return {0, 0};
    return {v, v * x_hat};
  }

  __device__ __forceinline__ void by_teams(int team, double* scratch) const {
    const int units = box.ns * box.nc, teams = blockDim.x / team, lane = threadIdx.x & (team - 1);
    const Divisor by_channels(box.nc);
    for (int first = 0; first < units; first += teams) {
      const int unit = in_turn(first + threadIdx.x / team, units, box.ncol), n = by_channels.quotient(unit), c = unit - n * box.nc;
      const int rows = unit < units ? box.nr : 0, q0 = c * box.ncol;
      double sum_v = 0, sum_v_x_hat = 0;
      if (rows) {
        const int u = grouping.unit(n, c);
        const Scale scale = BENT && !TANGENT ? tables.scale(c) : Scale();
        if (tables.in_reals(u) && in_reals(scale)) {
          const Centre centre = tables.centre(u);
          real run_v = 0, run_v_x_hat = 0;
          walk(rows, box.ncol, lane, team,
               [&](auto width, int r, int i) {
                 add<decltype(width)::value>(n, r, q0 + i, [&](int) -> const Centre& { return centre; },
                                             [&](int) -> const Scale& { return scale; }, [&](int, real v, real x_hat) {
                                               run_v += v;
                                               run_v_x_hat = fma(v, x_hat, run_v_x_hat);
                                             });
               },
               [&] {
                 sum_v += exactly(run_v);
                 sum_v_x_hat += exactly(run_v_x_hat);
                 run_v = run_v_x_hat = 0;
               });
        } else {
          const Statistic statistic = tables.statistic(u);
          walk_slowly(rows, box.ncol, lane, team, [&](int r, int i) {
            const Pair one = slowly(n, r, q0 + i, statistic, scale);
            sum_v += one.a;
            sum_v_x_hat += one.b;
          });
        }
      }
      const Pair total = team_sum(Pair{sum_v, sum_v_x_hat}, team, scratch);
      if (rows && lane == 0) sums.set(unit, total);
    }
  }

  template <int K> __device__ __forceinline__ void by_columns() const {
    Centre centre[K];
    Scale scale[K];
    sum_columns<K>(
        box.ns, box.samples, box.nr, box.nc, false,
        [&](int n, int c) {
          bool plain = true;
#pragma unroll
          for (int k = 0; k < K; ++k) {
            const int u = grouping.unit(n, c + k);
            centre[k] = tables.centre(u);
            if (BENT && !TANGENT) scale[k] = tables.scale(c + k);
            plain = plain && tables.in_reals(u) && in_reals(scale[k]);
          }
          return plain;
        },
        [&](int n, int r, int c, real(&a)[K], real(&b)[K]) {
          add<K>(n, r, c, [&](int k) -> const Centre& { return centre[k]; }, [&](int k) -> const Scale& { return scale[k]; },
                 [&](int k, real v, real x_hat) {
                   a[k] += v;
                   b[k] = fma(v, x_hat, b[k]);
                 });
        },
        [&](int n, int r, int c, double(&a)[K], double(&b)[K]) {
#pragma unroll
          for (int k = 0; k < K; ++k) {
            const Scale own = BENT && !TANGENT ? tables.scale(c + k) : Scale();
            const Pair one = slowly(n, r, c + k, tables.statistic(grouping.unit(n, c + k)), own);
            a[k] += one.a;
            b[k] += one.b;
          }
        },
        [&](int i) { return sums.at(i); }, [&](int i, const Pair& sum) { sums.set(i, sum); });
  }

  __device__ __forceinline__ void operator()(int team, double* scratch) const {
    if (MAYBE_COLUMNS && box.ncol == 1 && box.nr > 1) {
      if (box.nc % COLUMNS == 0) by_columns<COLUMNS>();
      else by_columns<1>();
    } else {
      by_teams(team, scratch);
    }
  }
};

// Sums of v and v x_hat of each channel of each sample in the box: as SumChannels left them; or, under SINGLE, of the one
// element of the channel, which costs less than to keep them: a third of the accesses of shared memory.
struct SumsOfChannels {
  const Shared<x_t>&x, &v;
  const Mask& mask;
  const Box& box;
  const Tables& tables;
  const ChannelSums& sums;
  const Grouping grouping;

  // Of channels c, ..., c + K - 1 of sample n, which are of one group where K > 1, or of any under LABELLED.
  template <int K> __device__ __forceinline__ void at(int n, int c, Pair (&sum)[K]) const {
    if constexpr (LABELLED && K > 1) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        Pair one[1];
        at(n, c + k, one);
        sum[k] = one[0];
      }
      return;
    }
#if !SINGLE
#pragma unroll
    for (int k = 0; k < K; ++k) sum[k] = sums.at(n * box.nc + c + k);
#else
    const int u = grouping.unit(n, c), at = x.index(n, 0, c);
    const Pack<x_t, K> xs = load_pack<x_t, K>(x.data + at, true), vs = load_pack<x_t, K>(v.data + at, true);
    if (!tables.in_reals(u)) {
      const Statistic statistic = tables.statistic(u);
#pragma unroll
      for (int k = 0; k < K; ++k) sum[k] = exactly_of(statistic, n, c + k, xs.element[k], vs.element[k]);
      return;
    }
    const Centre centre = tables.centre(u);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Scale scale = BENT && !TANGENT ? tables.scale(c + k) : Scale();
      if (in_reals(scale)) {
        const real x_hat = centred(centre, to_real<X_DTYPE>(xs.element[k])) * centre.rstd;
        const real bend = BENT && !TANGENT ? slope(fma(x_hat, scale.weight, scale.bias)) : (real)1;
        sum[k] = of(n, c + k, to_real<X_DTYPE>(vs.element[k]) * bend, x_hat);
      } else {
        sum[k] = exactly_of(tables.statistic(u), n, c + k, xs.element[k], vs.element[k]);
      }
    }
#endif
  }
  __device__ __forceinline__ Pair of(int n, int c, double value, double x_hat) const {
    const bool used = !TANGENT || mask.at(n, 0, c);
    return {used ? value : 0, used ? value * x_hat : 0};
  }
  __device__ __forceinline__ Pair exactly_of(const Statistic& statistic, int n, int c, x_t x, x_t v) const {
    const double x_hat = exact_x_hat(statistic, x);
    const double bend = BENT && !TANGENT ? exact_slope(x_hat, tables.scale(c)) : 1;
    return of(n, c, to_double<X_DTYPE>(v) * bend, x_hat);
  }
};

// Coefficients of a group from the sums of v and v x_hat over it. In a group of two elements, whose rstd was taken from them,
// rstd v + offset and along x_hat are the same but for eps rstd^2 of them, which is the result: the difference of the two is 85
// times the bound off in float64. dx is computed in the group's unit, in which rstd is, a tangent as it is.
__device__ __forceinline__ ExactCoefficient coefficients_of(const Pair& sums, double rstd_in_unit, double unit, double count,
                                                            double eps, bool given) {
  const double rstd = TANGENT ? rstd_in_unit * unit : rstd_in_unit, offset = -rstd * (sums.a / count);
  if (REAL_IS_DOUBLE && !MASKED && count == 2 && !given) {
    const double of_x = rstd_in_unit * unit;
    const double share = eps > 0 ? eps * (of_x * of_x) : 0;  // without eps the square may be infinite
    return {0, offset * share, share};
  }
  return {-rstd * (sums.b / count), offset, 1};
}

// Whether a given rstd is one that float32 takes: the squares of its group are then not needed, not even for their size.
__device__ __forceinline__ bool usual_rstd(double rstd) { return rstd > 0x1p-48 && rstd < 0x1p+48; }

// Tables of a group whose statistics stand there, and whose coefficients are known. Where float32 could not hold them the
// group goes to float64.
__device__ __forceinline__ void set_coefficients(const ExactCoefficient& g, double rstd, double count, int u,
                                                 const Tables& tables, bool shares) {
  Coefficient coefficient = {in_range(REAL_IS_DOUBLE ? g.along : g.along * rstd, true), in_range(g.offset, true), (real)g.share};
  const bool slow = !REAL_IS_DOUBLE && (count <= FEW_ELEMENTS || coefficient.along != coefficient.along ||
                                        coefficient.offset != coefficient.offset);
  if (slow) tables.to_exact(u);
#if !TANGENT && !MASKED
  if (count == 1) {  // the only element cannot move against its mean: exactly zero
    tables.group(2, u) = 0;
    coefficient = {0, 0, 1};
  }
#endif
  tables.set_coefficient(u, coefficient, shares);
  tables.set_exact_coefficient(u, g);
}

// Places in shared memory that the kernels of the backward have in common, in this order. See config.backward_bytes.
struct Work {
  double* counts;            // of the groups
  ChannelSums sums, totals;  // of the channels of each sample, and of all samples
  Tables tables;
  unsigned char *x, *dy, *mask;
  __device__ __forceinline__ Work(int samples, int rows, int channels, int columns, int units, int pitch, int flat)
      : counts(shared + SCRATCH), sums(counts + units, kept(samples, channels)),
        totals(sums.end(kept(samples, channels)), channels), tables(totals.end(channels), units, channels, 2) {
    x = align_16(tables.end());
    dy = x + box_bytes<x_t>(samples, rows, channels * columns, pitch, flat);
    mask = dy + box_bytes<x_t>(samples, rows, channels * columns, pitch, flat);
  }
  static __device__ __forceinline__ int kept(int samples, int channels) { return SINGLE ? 0 : samples * channels; }
};

#ifdef KERNEL_BACKWARD
// One block `repeat` boxes of whole groups, of consecutive samples. rstd_given: (N, G), where have_rstd. partial: sums of
// v and v x_hat of each channel over the samples of the block, (blocks of samples, C, 2).
extern "C" __global__ void BACKWARD_BOUNDS
    backward(BOX_PARAMETERS, const int repeat, const int group_team, const int channel_team, const x_t* x,
             const long long x_sn, const long long x_so, const x_t* dy, const long long dy_sn, const long long dy_so,
             PARAMETERS, TANGENTS, const double eps, const double* rstd_given,
             const int have_rstd, y_t* dx, const long long dx_sn, const long long dx_so,
             real* partial MASK_PARAMETERS LABEL_PARAMETERS) {
#if LABELLED
  const int G = label_groups, most_groups = G;
#else
  const int G = C / D, most_groups = max(1, channels / D);
#endif
  const Work work(samples, rows, channels, columns, samples * most_groups, pitch, flat);
  const unsigned sample_block = blockIdx.x / channel_tiles, channel_tile = blockIdx.x - sample_block * channel_tiles;
  const Tables& tables = work.tables;
  int c0 = 0, nc = 0;
  for (int i = 0; i < repeat; ++i) {
    const unsigned tile = (sample_block * repeat + i) * channel_tiles + channel_tile;
    if ((long long)(sample_block * repeat + i) * samples >= N) break;
    const Box box(BOX_ARGUMENTS, tile);
    const Grouping grouping LABELS_OF(box);
    c0 = box.c0;
    nc = box.nc;
    const Global<const x_t> x_source(x, x_sn, x_so, box, inner), dy_source(dy, dy_sn, dy_so, box, inner);
    Shared<x_t> x_tile(reinterpret_cast<x_t*>(work.x), box);
    Shared<x_t> dy_tile(reinterpret_cast<x_t*>(work.dy), box);
    if (i > 0) __syncthreads();  // the box before may still be being read
    else tables.fill_scales(box, PARAMETER_ARGUMENTS);
    x_tile.fill(x_source, box);
    dy_tile.fill(dy_source, box);
    Mask mask = {};
#if MASKED
    mask.fill(work.mask, where, where_sn, where_so, where_sc, where_si, box);
#endif
    copies_arrived();
    __syncthreads();

    const int units = box.ns * grouping.groups;
    {
      const int team = group_team, teams = blockDim.x / team, lane = threadIdx.x & (team - 1);
      for (int first = 0; first < units; first += teams) {
        const int u = in_turn(first + threadIdx.x / team, units, box.run), n = u / grouping.groups, k = u - n * grouping.groups;
#if LABELLED
        Moments m = moments_of_label(x_tile, mask, grouping, n, k, u < units ? grouping.channels(k) : 0, lane, team, shared);
#else
        const int reader = team < 32 ? threadIdx.x & 31 & -team : 0;  // one lane of the team in each warp
        double given = 0;
        if (have_rstd && u < units && (threadIdx.x & 31) == reader) given = rstd_given[(box.n0 + n) * G + box.g0 + k];
        given = __shfl_sync(0xffffffffu, given, reader);
        Moments m = moments_of(x_tile, mask, box, n, k, u < units ? box.nr : 0, lane, team, shared, usual_rstd(given));
#endif
        if (u < units && lane == 0) {
          m.fit(eps);
          tables.hold(u, m);
          if (MASKED || LABELLED) work.counts[u] = m.count;
        }
      }
    }
    __syncthreads();
    // What is done once a group: a thread for each, where a team would leave all but one lane idle.
    const auto count_of = [&](int u) { return MASKED || LABELLED ? work.counts[u] : box.nr * box.run; };
    for (int u = threadIdx.x; u < units; u += blockDim.x) {
      const Moments m = tables.held(u);
      const int n = u / grouping.groups;
      const double r = have_rstd ? rstd_given[(box.n0 + n) * G + box.g0 + (u - n * grouping.groups)] / m.unit : m.rstd(eps);
      tables.finish(u, m, r);
      if (count_of(u) <= FEW_ELEMENTS && !REAL_IS_DOUBLE) tables.to_exact(u);
    }
    __syncthreads();

    const SumsOfChannels sums = {x_tile, dy_tile, mask, box, tables, work.sums, grouping};
#if !SINGLE
    SumChannels{x_tile, dy_tile, mask, box, tables, work.sums, grouping}(channel_team, shared);
    __syncthreads();
#endif
#if !TANGENT
#if SINGLE
    const auto add_samples = [&](auto width) {
      constexpr int K = decltype(width)::value;
      sum_columns<K>(
          1, 1, box.ns, box.nc, i > 0, [](int, int) { return false; }, [](int, int, int, real(&)[K], real(&)[K]) {},
          [&](int, int n, int c, double(&a)[K], double(&b)[K]) {
            Pair sum[K];
            sums.at(n, c, sum);
#pragma unroll
            for (int k = 0; k < K; ++k) {
              a[k] += sum[k].a;
              b[k] += sum[k].b;
            }
          },
          [&](int c) { return work.totals.at(c); }, [&](int c, const Pair& total) { work.totals.set(c, total); });
    };
    if (box.group_channels % COLUMNS == 0) add_samples(Count<COLUMNS>());
    else add_samples(Count<1>());
#else
    for (int c = threadIdx.x; c < box.nc; c += blockDim.x) {
      Pair total = i ? work.totals.at(c) : Pair{0, 0}, sum[1];
#pragma unroll 1
      for (int n = 0; n < box.ns; ++n) {
        sums.at(n, c, sum);
        total.a += sum[0].a;
        total.b += sum[0].b;
      }
      work.totals.set(c, total);
    }
#endif
#endif
    {
      const int team = group_team, teams = blockDim.x / team, lane = threadIdx.x & (team - 1);
      for (int first = 0; first < units; first += teams) {
        const int u = first + threadIdx.x / team, n = u / grouping.groups, k = u - n * grouping.groups;
#if LABELLED
        const Pair sum = pairs_in_any_order(u < units ? grouping.channels(k) : 0, lane, team, shared, [&](int i) {
          const int c = grouping.channel(k, i);
          const double w = TANGENT ? 1 : exactly(tables.channel(0, c));
          Pair one[1];
          sums.at(n, c, one);
          return Pair{w * one[0].a, w * one[0].b};
        });
#else
        Pair sum = {0, 0};
        const auto add = [&](auto width, int, int i) {
          constexpr int K = decltype(width)::value;
          const int c = k * box.group_channels + i;
          Pair of_channel[K];
          sums.at(n, c, of_channel);
#pragma unroll
          for (int j = 0; j < K; ++j) {
            const double w = TANGENT ? 1 : exactly(tables.channel(0, c + j));
            sum.a = fma(w, of_channel[j].a, sum.a);
            sum.b = fma(w, of_channel[j].b, sum.b);
          }
        };
        const int mine = u < units ? box.group_channels : 0;
        if (SINGLE) walk(1, mine, lane, team, add, [] {});
        else for (int c = lane; c < mine; c += team) add(Count<1>(), 0, c);
        sum = team_sum(sum, team, shared);
#endif
        if (u < units && lane == 0) {
          tables.held_sum(0, u) = sum.a;
          tables.held_sum(1, u) = sum.b;
        }
      }
    }
    __syncthreads();
    const bool shares = LABELLED || box.nr * box.run == 2;
    for (int u = threadIdx.x; u < units; u += blockDim.x) {
      const Statistic statistic = tables.statistic(u);
      const double r = statistic.rstd, count = count_of(u);
      const Pair sum = {tables.held_sum(0, u), tables.held_sum(1, u)};
      set_coefficients(coefficients_of(sum, r, statistic.unit, count, eps, have_rstd), r, count, u, tables, shares);
    }
    __syncthreads();

    const Gradient<Shared<x_t>, Shared<x_t>> operation = {
        x_tile, dy_tile, tables, mask, box, grouping, shares};
    apply(operation, Global<y_t>(dx, dx_sn, dx_so, box, inner), box);
  }
#if !TANGENT
  real* to = partial + 2 * ((long long)sample_block * C + c0);
  for (int c = threadIdx.x; c < nc; c += blockDim.x) {
    const Pair total = work.totals.at(c);
    to[2 * c] = (real)total.a;
    to[2 * c + 1] = (real)total.b;
  }
#endif
}
#endif

#ifdef KERNEL_BACKWARD_SUMS
// One block a box of one sample, which may be a part of a group. Writes the sums of v and of v (x - mean of the box), x in
// the box's unit, of each channel, sums: (N, spatial parts, C, 2); and the moments of each group in the box, (N, parts, G,
// PART), of which the squares are not to be used where the caller gave an rstd: of float32 arrays they are then not taken, a
// pass of three less. With have_statistics, in `planes`, it is v x_hat under them, and no moments are written; labels, the
// group of each channel, need them (labelled).
extern "C" __global__ void BACKWARD_SUMS_BOUNDS
    backward_sums(BOX_PARAMETERS, const int group_team, const int channel_team, const x_t* x, const long long x_sn,
                  const long long x_so, const x_t* dy, const long long dy_sn, const long long dy_so, PARAMETERS,
                  double* planes, const int have_statistics, const int G, const int* labels, const int labelled,
                  const double* rstd_given, const int have_rstd, double* moments, double* sums MASK_PARAMETERS) {
  const Work work(samples, rows, channels, columns, max(1, channels / D), pitch, flat);
  const Box box(BOX_ARGUMENTS, blockIdx.x);
  const Tables& tables = work.tables;
  const Global<const x_t> x_source(x, x_sn, x_so, box, inner), dy_source(dy, dy_sn, dy_so, box, inner);
  Shared<x_t> x_tile(reinterpret_cast<x_t*>(work.x), box);
  Shared<x_t> dy_tile(reinterpret_cast<x_t*>(work.dy), box);
  x_tile.fill(x_source, box);
  dy_tile.fill(dy_source, box);
  tables.fill_scales(box, {weight, bias, nullptr, nullptr, weight_dtype, bias_dtype, -1, -1});
  Mask mask = {};
#if MASKED
  mask.fill(work.mask, where, where_sn, where_so, where_sc, where_si, box);
#endif
  const int units = box.groups;
  if (have_statistics) {
    for_each_group(box, G, labels, labelled, [&](int u, long long group) {
      tables.set(u, statistic_of({planes, N * G}, group));
    });
  }
  copies_arrived();
  __syncthreads();

  if (!have_statistics) {
    const int team = group_team, teams = blockDim.x / team, lane = threadIdx.x & (team - 1);
    for (int first = 0; first < units; first += teams) {
      const int u = first + threadIdx.x / team;
      const double given = have_rstd && u < units ? rstd_given[box.n0 * G + box.g0 + u] : 0;
      const bool usual = usual_rstd(given);
      Moments m = moments_of(x_tile, mask, box, 0, u, u < units ? box.nr : 0, lane, team, shared, usual);
      if (u < units && lane == 0) {
        if (!(m.count > 0)) {  // all masked: the sums still need a place to be about
          m.mean = to_double<X_DTYPE>(x_tile.data[x_tile.index(0, 0, u * box.run)]);
          m.low = m.m2 = 0;
          m.unit = 1;
        }
        tables.set(u, {m.mean, m.low, usual && !REAL_IS_DOUBLE ? given : m.m2 > 0 ? sqrt(m.count / m.m2) : 1, m.unit});
        write_part(moments + PART * ((box.n0 * box.parts + box.part) * G + box.g0 + u), m);
      }
    }
    __syncthreads();
  }

  SumChannels{x_tile, dy_tile, mask, box, tables, work.sums, Grouping(box)}(channel_team, shared);
  __syncthreads();
  double* to = sums + 2 * ((box.n0 * box.spatial_parts + box.spatial_part) * C + box.c0);
  for (int c = threadIdx.x; c < box.nc; c += blockDim.x) {
    const Pair sum = work.sums.at(c);
    to[2 * c] = sum.a;
    to[2 * c + 1] = have_statistics ? sum.b : sum.b / tables.statistic(c / box.group_channels).rstd;
  }
}
#endif

#ifdef KERNEL_MERGE_BACKWARD
// One block a group of a sample: its statistics and coefficients, in `planes`, and the sums of v and v x_hat of its channels,
// channel_sums: (N, C, 2), from those of its boxes. See backward_sums. Labelled groups as in merge_labels, where the order of
// the channels changes no bit.
extern "C" __global__ void MERGE_BOUNDS
    merge_backward(const int C, const int D, const int G, const int* order, const int* bounds, const int labelled,
                   const int channels, const int parts, const int spatial_parts, const int team, const double* moments,
                   const double* sums, const void* weight, const int weight_dtype, const double eps,
                   const double* rstd_given, const int have_rstd, const int have_statistics, double* planes,
                   double* channel_sums) {
  double* scratch = shared;
  const long long group = blockIdx.x, n = group / G;
  const int g = (int)(group - n * G), lane = threadIdx.x & (team - 1), teams = blockDim.x / team;
  const int group_channels = labelled ? bounds[g + 1] - bounds[g] : D;
  const auto channel = [&](int k) { return labelled ? order[bounds[g] + k] : g * D + k; };
  const Planes values = {planes, (long long)gridDim.x};
  const double* of_group = moments + PART * (n * parts * G + g);
  Moments m;
  double rstd;
  if (have_statistics) {
    m.count = values.at(COUNT, group);
    m.unit = values.at(UNIT, group);
    rstd = values.at(RSTD, group);
  } else {
    m = merge_parts(of_group, (long long)PART * G, parts, threadIdx.x, blockDim.x, scratch);
    m.fit(eps);
    rstd = have_rstd ? rstd_given[group] / m.unit : m.rstd(eps);
  }
  const int parts_of_channels = parts / spatial_parts;
  Pair total = {0, 0};
  for (int first = 0; first < group_channels; first += teams) {
    const int k = first + threadIdx.x / team, c = k < group_channels ? channel(k) : 0;
    Pair sum = {0, 0};
    if (k < group_channels) {
      for (int p = lane; p < spatial_parts; p += team) {
        const double* q = sums + 2 * ((n * spatial_parts + p) * C + c);
        double sum_v_x_hat = q[1];
        if (!have_statistics) {  // from about the box's mean, in its unit, to about the group's
          const double* box = of_group + (long long)PART * G * (p * parts_of_channels + k / channels);
          const double to_unit = REAL_IS_DOUBLE ? m.unit / box[4] : 1;
          sum_v_x_hat = fma(q[0], (box[0] * to_unit - m.mean) + (box[1] * to_unit - m.low), sum_v_x_hat * to_unit);
        }
        sum.a += q[0];
        sum.b += sum_v_x_hat;
      }
    }
    sum = team_sum(sum, team, scratch);
    if (k < group_channels && lane == 0) {
      if (!have_statistics) sum.b *= rstd;
      channel_sums[2 * (n * C + c)] = sum.a;
      channel_sums[2 * (n * C + c) + 1] = sum.b;
      const double w = TANGENT ? 1 : parameter(weight, weight_dtype, c, 1);
      total.a = fma(w, sum.a, total.a);
      total.b = fma(w, sum.b, total.b);
    }
  }
  if (labelled) {
    __syncthreads();  // the sums of all channels are there
    const auto weighted = [&](int k, int which) {
      const double w = TANGENT ? 1 : parameter(weight, weight_dtype, channel(k), 1);
      return w * channel_sums[2 * (n * C + channel(k)) + which];
    };
    total.a = sum_in_any_order(group_channels, threadIdx.x, blockDim.x, scratch, [&](int k) { return weighted(k, 0); });
    total.b = sum_in_any_order(group_channels, threadIdx.x, blockDim.x, scratch, [&](int k) { return weighted(k, 1); });
  } else {
    total = team_sum(total, blockDim.x, scratch);
  }
  if (threadIdx.x == 0) {
    const ExactCoefficient g = coefficients_of(total, rstd, m.unit, m.count, eps, have_rstd);
    values.at(ALONG, group) = g.along;
    values.at(OFFSET, group) = g.offset;
    values.at(SHARE, group) = g.share;
    if (!have_statistics) {
      values.at(MEAN, group) = m.mean;
      values.at(LOW, group) = m.low;
      values.at(RSTD, group) = rstd;
      values.at(UNIT, group) = m.unit;
      values.at(COUNT, group) = m.count;
    }
  }
}
#endif

#ifdef KERNEL_BACKWARD_APPLY
// One block a box: x and dy read once, dx written once, under statistics and coefficients in `planes`.
extern "C" __global__ void BACKWARD_APPLY_BOUNDS
    backward_apply(BOX_PARAMETERS, const x_t* x, const long long x_sn, const long long x_so, const x_t* dy,
                   const long long dy_sn, const long long dy_so, PARAMETERS, TANGENTS, double* planes, const int G,
                   const int* labels, const int labelled, y_t* dx, const long long dx_sn, const long long dx_so MASK_PARAMETERS) {
  const Work work(samples, rows, channels, columns, max(1, channels / D), 0, 0);
  const Box box(BOX_ARGUMENTS, blockIdx.x);
  work.tables.fill_scales(box, PARAMETER_ARGUMENTS);
  for_each_group(box, G, labels, labelled, [&](int u, long long group) {
    const Planes values = {planes, N * G};
    const Statistic statistic = statistic_of(values, group);
    const ExactCoefficient g = {values.at(ALONG, group), values.at(OFFSET, group), values.at(SHARE, group)};
    work.tables.set(u, statistic);
    set_coefficients(g, statistic.rstd, values.at(COUNT, group), u, work.tables, true);
  });
  Mask mask = {};
#if MASKED && !TANGENT
  mask.fill(work.x, where, where_sn, where_so, where_sc, where_si, box);
#endif
  __syncthreads();
  const Gradient<Global<const x_t>, Global<const x_t>> operation = {
      Global<const x_t>(x, x_sn, x_so, box, inner), Global<const x_t>(dy, dy_sn, dy_so, box, inner), work.tables,
      mask, box, Grouping(box), true};
  apply(operation, Global<y_t>(dx, dx_sn, dx_so, box, inner), box);
}
#endif

#ifdef KERNEL_PARAMETER_GRADIENTS
// dweight and dbias of 8 channels a block, whose sums are two sectors of a row, from partial: (rows, C, 2), to every `step`th
// element of theirs. Eight threads take a part of the rows, every so many; the sums of the parts, a power of two, are added in
// a tree: those of a warp by shuffles.
template <class Partial>
__device__ __forceinline__ void add_rows(const Partial* partial, int rows, int C, void* dweight, void* dbias, int dtype, int step) {
  const int c = blockIdx.x * 8 + (threadIdx.x & 7), part = threadIdx.x >> 3, parts = blockDim.x >> 3;
  double sum_v = 0, sum_v_x_hat = 0;
  if (c < C) {
#pragma unroll 8  // eight loads in flight
    for (int r = part; r < rows; r += parts) {
      sum_v += (double)partial[2 * ((long long)r * C + c)];
      sum_v_x_hat += (double)partial[2 * ((long long)r * C + c) + 1];
    }
  }
#pragma unroll
  for (int lanes = 8; lanes < 32; lanes *= 2) {
    sum_v += __shfl_xor_sync(0xffffffffu, sum_v, lanes);
    sum_v_x_hat += __shfl_xor_sync(0xffffffffu, sum_v_x_hat, lanes);
  }
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  for (int half = blockDim.x >> 6; half > 0; half /= 2) {
    if (lane < 8 && warp >= half && warp < 2 * half) {
      shared[threadIdx.x] = sum_v;
      shared[blockDim.x + threadIdx.x] = sum_v_x_hat;
    }
    __syncthreads();
    if (lane < 8 && warp < half) {
      sum_v += shared[threadIdx.x + 32 * half];
      sum_v_x_hat += shared[blockDim.x + threadIdx.x + 32 * half];
    }
  }
  if (part == 0 && c < C) {
    store_any(dweight, dtype, (long long)c * step, sum_v_x_hat);
    store_any(dbias, dtype, (long long)c * step, sum_v);
  }
}
extern "C" __global__ void __launch_bounds__(1024)
    parameter_gradients(const void* partial, const int doubles, const int rows, const int C, void* dweight, void* dbias,
                        const int dtype, const int step) {
  if (doubles) add_rows((const double*)partial, rows, C, dweight, dbias, dtype, step);
  else add_rows((const float*)partial, rows, C, dweight, dbias, dtype, step);
}
#endif
