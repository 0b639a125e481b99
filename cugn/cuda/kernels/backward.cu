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
// Options: X_DTYPE (= Y_DTYPE), ACTIVATION, MASKED, SAME_CHANNEL, TANGENT.

#define PARAMETER_ARGUMENTS \
  {weight, bias, tweight, tbias, weight_dtype, bias_dtype, tweight_dtype, tbias_dtype}

// What a group adds to each element: along * x_hat + offset; in float32 along * d + offset with d = x - mean, one rounding
// less (in float64 the square of rstd in it would leave the range).
struct Coefficient {
  real along, offset;
};
struct Entries {
  real high, low, rstd, scale, shift, along, offset;
};

// The operation `apply` of the backward. `FromX`, `FromV`: the boxes of x and v, in shared or in global memory.
template <class FromX, class FromV> struct Gradient {
  const FromX x;
  const FromV v;
  const Statistics statistics;
  const double *along, *offset;  // of the groups in the box, on x_hat
  const Tables tables;
  const Coefficient* coefficients;
  const Mask mask;
  const Box& box;
  const Divisor by_group;

  typedef Entries Entry;
  struct Exact {
    double mean, low, rstd, weight, bias, along, offset, tweight, tbias;
  };
  struct Input {
    const x_t* x;
    const x_t* v;
  };
  template <int K> struct Values {
    Pack<x_t, K> x, v;
    bool used[K];
  };

  __device__ __forceinline__ int unit(int n, int c) const {
    return n * box.groups + (box.groups == 1 ? 0 : by_group.quotient(c));
  }
  __device__ __forceinline__ Entries entry(int n, int c) const {
    const int u = unit(n, c);
    const Centre centre = tables.centres[u];
    const Scale scale = tables.scales[c];
    const Coefficient coefficient = coefficients[u];
    Entries e = {centre.high, centre.low,        centre.rstd,       scale.times(centre.rstd),
                 scale.bias,  coefficient.along, coefficient.offset};
#if TANGENT
    e.along = fma(scale.weight, e.along, REAL_IS_DOUBLE ? scale.tweight : scale.tweight * centre.rstd);
    e.offset = fma(scale.weight, e.offset, scale.tbias);
#endif
    return e;
  }
  __device__ __forceinline__ bool slow(const Entries& e) const { return !REAL_IS_DOUBLE && e.scale != e.scale; }

  __device__ __forceinline__ Exact exact_entry(int n, int c) const {
    const int u = unit(n, c);
    const Scale scale = tables.scales[c];
    Exact e = {statistics.mean[u], statistics.low[u], statistics.rstd[u], exactly(scale.weight), exactly(scale.bias),
               along[u],           offset[u],         0,                  0};
#if TANGENT
    e.tweight = exactly(scale.tweight);
    e.tbias = exactly(scale.tbias);
#endif
    return e;
  }

  __device__ __forceinline__ Input input(int n, int r) const { return {x.row(n, r), v.row(n, r)}; }
  template <int K>
  __device__ __forceinline__ void load(Values<K>& values, const Input& from, int e, int n, int r, int q) const {
    values.x = load_pack<x_t, K>(from.x + e, (size_t)(from.x + e) % (K * sizeof(x_t)) == 0);
    values.v = load_pack<x_t, K>(from.v + e, (size_t)(from.v + e) % (K * sizeof(x_t)) == 0);
#pragma unroll
    for (int k = 0; k < K; ++k) values.used[k] = TANGENT || mask.at(n, r, q + k);
  }
  template <int K> __device__ __forceinline__ real fast(const Entries& e, const Values<K>& values, int k) const {
    const real d = (to_real<X_DTYPE>(values.x.element[k]) - e.high) - e.low, v = to_real<X_DTYPE>(values.v.element[k]);
    const real along = fma(e.along, REAL_IS_DOUBLE ? d * e.rstd : d, e.offset);
#if TANGENT
    const real t = fma(e.scale, v, along);
    return ACTIVATION == IDENTITY ? t : t * slope(fma(d, e.scale, e.shift));
#else
    const real dz = ACTIVATION == IDENTITY ? v : v * slope(fma(d, e.scale, e.shift));
    return fma(e.scale, dz, values.used[k] ? along : (real)0);
#endif
  }
  template <int K> __device__ __forceinline__ double exact(const Exact& e, const Values<K>& values, int k) const {
    const double v = to_double<X_DTYPE>(values.v.element[k]);
    const double x_hat = ((to_double<X_DTYPE>(values.x.element[k]) - e.mean) - e.low) * e.rstd;
    const double bend = ACTIVATION == IDENTITY ? 1 : (double)slope((real)fma(x_hat, e.weight, e.bias));
    const double from_group = fma(e.along, x_hat, e.offset);
#if TANGENT
    return fma(e.weight, fma(e.rstd, v, from_group), fma(e.tweight, x_hat, e.tbias)) * bend;
#else
    return fma(e.rstd * e.weight, v * bend, values.used[k] ? from_group : 0);
#endif
  }
};

// Sums of v and v x_hat over each channel of each sample in the box, to sums[2 (n nc + c)], by teams; v = dz, or tx where
// it is used. x_hat is about the statistics in shared memory, whatever they are.
__device__ __forceinline__ void sum_channels(const Shared<x_t>& x, const Shared<x_t>& dy, const Mask& mask, const Box& box,
                                             int team, const Statistics& statistics, const Tables& tables, double* scratch,
                                             double* sums) {
  const int units = box.ns * box.nc, teams = blockDim.x / team, lane = threadIdx.x & (team - 1);
  const Divisor by_channels(box.nc), by_group(box.group_channels);
  for (int first = 0; first < units; first += teams) {
    const int unit = first + threadIdx.x / team, n = by_channels.quotient(unit), c = unit - n * box.nc, q0 = c * box.ncol;
    const int rows = unit < units ? box.nr : 0;
    double sum_v = 0, sum_v_x_hat = 0;
    if (rows) {
      const int u = n * box.groups + by_group.quotient(c);
      const Centre centre = tables.centres[u];
      const Scale scale = tables.scales[c];
      if (REAL_IS_DOUBLE || (centre.rstd == centre.rstd && (ACTIVATION == IDENTITY || in_range(scale.weight, true) == scale.weight))) {
        real run_v = 0, run_v_x_hat = 0;
        walk(rows, box.ncol, lane, team,
             [&](auto width, int r, int i) {
               constexpr int K = decltype(width)::value;
               real xs[K], vs[K];
               read<X_DTYPE, K>(x, n, r, q0 + i, xs);
               read<X_DTYPE, K>(dy, n, r, q0 + i, vs);
#pragma unroll
               for (int k = 0; k < K; ++k) {
                 const real x_hat = ((xs[k] - centre.high) - centre.low) * centre.rstd;
#if TANGENT
                 const real v = mask.at(n, r, q0 + i + k) ? vs[k] : (real)0;
                 run_v += v;
                 run_v_x_hat += mask.at(n, r, q0 + i + k) ? v * x_hat : (real)0;
#else
                 const real v = ACTIVATION == IDENTITY ? vs[k] : vs[k] * slope(fma(x_hat, scale.weight, scale.bias));
                 run_v += v;
                 run_v_x_hat = fma(v, x_hat, run_v_x_hat);
#endif
               }
             },
             [&] {
               sum_v += run_v;
               sum_v_x_hat += run_v_x_hat;
               run_v = run_v_x_hat = 0;
             });
      } else {
        const double mean = statistics.mean[u], low = statistics.low[u], rstd = statistics.rstd[u];
        const double w = exactly(scale.weight), b = exactly(scale.bias);
        walk_slowly(rows, box.ncol, lane, team, [&](int r, int i) {
          const double x_hat = ((to_double<X_DTYPE>(x.data[x.index(n, r, q0 + i)]) - mean) - low) * rstd;
          double v = to_double<X_DTYPE>(dy.data[dy.index(n, r, q0 + i)]);
          if (!TANGENT && ACTIVATION != IDENTITY) v *= (double)slope((real)fma(x_hat, w, b));
          if (!TANGENT || mask.at(n, r, q0 + i)) {
            sum_v += v;
            sum_v_x_hat = fma(v, x_hat, sum_v_x_hat);
          }
        });
      }
    }
    const Pair total = team_sum({sum_v, sum_v_x_hat}, team, scratch);
    if (rows && lane == 0) {
      sums[2 * unit] = total.a;
      sums[2 * unit + 1] = total.b;
    }
  }
}

// Coefficients of a group from the sums of v and v x_hat over it.
struct GroupCoefficients {
  double along, offset;
  __device__ __forceinline__ GroupCoefficients(const Pair& sums, double rstd, double count)
      : along(-rstd * (sums.b / count)), offset(-rstd * (sums.a / count)) {}
};

// Tables of a group whose coefficients are known. Where float32 could not hold them the group goes to float64.
__device__ __forceinline__ void set_tables(const Statistics& statistics, const double* along, const double* offset,
                                           double count, int u, Centre* centres, Coefficient* coefficients) {
  Centre centre(statistics, u);
  coefficients[u].along = in_range(REAL_IS_DOUBLE ? along[u] : along[u] * statistics.rstd[u], true);
  coefficients[u].offset = in_range(offset[u], true);
  if (!REAL_IS_DOUBLE && (count <= FEW_ELEMENTS || coefficients[u].along != coefficients[u].along ||
                          coefficients[u].offset != coefficients[u].offset))
    centre.rstd = (real)bits_of<float>(0x7fc00000u);
#if !TANGENT && !MASKED
  if (count == 1) {  // the only element cannot move against its mean: exactly zero
    centre.rstd = 0;
    coefficients[u].along = coefficients[u].offset = 0;
  }
#endif
  centres[u] = centre;
}

// Places in shared memory that `backward` and `backward_sums` have in common, in this order. See config.backward_bytes.
struct Work {
  Statistics statistics;
  double *along, *offset, *counts;  // of the groups
  double *sums, *totals;            // of the channels of each sample, and of all samples
  Tables tables;
  Coefficient* coefficients;
  unsigned char *x, *dy, *mask;
  __device__ __forceinline__ Work(int samples, int rows, int channels, int columns, int D, int pitch, int flat)
      : statistics(shared + SCRATCH, samples * max(1, channels / D)), tables(nullptr, 0) {
    const int units = samples * max(1, channels / D);
    along = shared + SCRATCH + 3 * units;
    offset = along + units;
    counts = offset + units;
    sums = shared + SCRATCH + 6 * units;
    totals = sums + 2 * samples * channels;
    tables = Tables(reinterpret_cast<unsigned char*>(totals + 2 * channels), units);
    coefficients = reinterpret_cast<Coefficient*>(tables.end(channels));
    x = align_16(reinterpret_cast<unsigned char*>(coefficients + units));
    dy = x + box_bytes<x_t>(samples, rows, channels * columns, pitch, flat);
    mask = dy + box_bytes<x_t>(samples, rows, channels * columns, pitch, flat);
  }
};

// One block `repeat` boxes of whole groups, of consecutive samples. rstd_given: (N, G), where have_rstd. partial: sums of
// v and v x_hat of each channel over the samples of the block, (blocks of samples, C, 2).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward(BOX_PARAMETERS, const int repeat, const int group_team, const int channel_team, const x_t* x,
             const long long x_sn, const long long x_so, const x_t* dy, const long long dy_sn, const long long dy_so,
             PARAMETERS, TANGENTS, const double eps, const double* rstd_given,
             const int have_rstd, y_t* dx, const long long dx_sn, const long long dx_so, real* partial MASK_PARAMETERS) {
  const Work work(samples, rows, channels, columns, D, pitch, flat);
  const unsigned sample_block = blockIdx.x / channel_tiles, channel_tile = blockIdx.x - sample_block * channel_tiles;
  Tables tables = work.tables;
  int c0 = 0, nc = 0;
  for (int i = 0; i < repeat; ++i) {
    const unsigned tile = (sample_block * repeat + i) * channel_tiles + channel_tile;
    if ((long long)(sample_block * repeat + i) * samples >= N) break;
    const Box box(BOX_ARGUMENTS, tile);
    c0 = box.c0;
    nc = box.nc;
    const Global<const x_t> x_source(x, x_sn, x_so, box, inner), dy_source(dy, dy_sn, dy_so, box, inner);
    Shared<x_t> x_tile(reinterpret_cast<x_t*>(work.x), x_source, box);
    Shared<x_t> dy_tile(reinterpret_cast<x_t*>(work.dy), dy_source, box);
    if (i > 0) __syncthreads();  // the box before may still be being read
    else tables.fill_scales(box, PARAMETER_ARGUMENTS);
    x_tile.fill(x_source, box);
    dy_tile.fill(dy_source, box);
    Mask mask = {};
#if MASKED
    mask.fill(work.mask, where, where_sn, where_so, where_sc, where_si, box);
#endif
    __syncthreads();

    const int units = box.ns * box.groups, G = C / D;
    {
      const int team = group_team, teams = blockDim.x / team, lane = threadIdx.x & (team - 1);
      for (int first = 0; first < units; first += teams) {
        const int u = first + threadIdx.x / team, n = u / box.groups, k = u - n * box.groups;
        const Moments m = moments_of(x_tile, mask, box, n, k, u < units ? box.nr : 0, lane, team, shared);
        if (u < units && lane == 0) {
          work.statistics.mean[u] = m.mean;
          work.statistics.low[u] = m.low;
          work.statistics.rstd[u] = have_rstd ? rstd_given[(box.n0 + n) * G + box.g0 + k] : m.rstd(eps);
          work.counts[u] = m.count;
          Centre centre(work.statistics, u);
          if (m.count <= FEW_ELEMENTS && !REAL_IS_DOUBLE) centre.rstd = (real)bits_of<float>(0x7fc00000u);
          tables.centres[u] = centre;
        }
      }
    }
    __syncthreads();

    sum_channels(x_tile, dy_tile, mask, box, channel_team, work.statistics, tables, shared, work.sums);
    __syncthreads();

    {
      const int team = group_team, teams = blockDim.x / team, lane = threadIdx.x & (team - 1);
      for (int first = 0; first < units; first += teams) {
        const int u = first + threadIdx.x / team, n = u / box.groups, k = u - n * box.groups;
        Pair sum = {0, 0};
        if (u < units) {
          for (int c = k * box.group_channels + lane; c < (k + 1) * box.group_channels; c += team) {
            const double w = TANGENT ? 1 : exactly(tables.scales[c].weight);
            sum.a = fma(w, work.sums[2 * (n * box.nc + c)], sum.a);
            sum.b = fma(w, work.sums[2 * (n * box.nc + c) + 1], sum.b);
          }
        }
        sum = team_sum(sum, team, shared);
        if (u < units && lane == 0) {
          const GroupCoefficients g(sum, work.statistics.rstd[u], work.counts[u]);
          work.along[u] = g.along;
          work.offset[u] = g.offset;
          set_tables(work.statistics, work.along, work.offset, work.counts[u], u, tables.centres, work.coefficients);
        }
      }
    }
#if !TANGENT
    for (int c = threadIdx.x; c < box.nc; c += blockDim.x) {
      double sum_v = i ? work.totals[2 * c] : 0, sum_v_x_hat = i ? work.totals[2 * c + 1] : 0;
      for (int n = 0; n < box.ns; ++n) {
        sum_v += work.sums[2 * (n * box.nc + c)];
        sum_v_x_hat += work.sums[2 * (n * box.nc + c) + 1];
      }
      work.totals[2 * c] = sum_v;
      work.totals[2 * c + 1] = sum_v_x_hat;
    }
#endif
    __syncthreads();

    const Gradient<Shared<x_t>, Shared<x_t>> operation = {
        x_tile, dy_tile, work.statistics, work.along, work.offset, tables, work.coefficients, mask, box,
        Divisor(box.group_channels)};
    apply(operation, Global<y_t>(dx, dx_sn, dx_so, box, inner), box);
  }
#if !TANGENT
  real* to = partial + 2 * ((long long)sample_block * C + c0);
  for (int c = threadIdx.x; c < nc; c += blockDim.x) {  // each thread those that it summed
    to[2 * c] = (real)work.totals[2 * c];
    to[2 * c + 1] = (real)work.totals[2 * c + 1];
  }
#endif
}

// One block a box of one sample, which may be a part of a group. Writes the sums of v and of v (x - mean of the box) of
// each channel, sums: (N, spatial parts, C, 2); and the moments of each group in the box, moments: (N, parts, G, 4).
// With have_statistics, (N, G), it is v x_hat under them, and no moments are written; labels, the group of each channel,
// need them (labelled).
extern "C" __global__ void __launch_bounds__(SPLIT_THREADS, 3)
    backward_sums(BOX_PARAMETERS, const int group_team, const int channel_team, const x_t* x, const long long x_sn,
                  const long long x_so, const x_t* dy, const long long dy_sn, const long long dy_so, PARAMETERS, const double* mean, const double* low,
                  const double* rstd, const int have_statistics, const int G, const int* labels, const int labelled,
                  double* moments, double* sums MASK_PARAMETERS) {
  const Work work(samples, rows, channels, columns, D, pitch, flat);
  const Box box(BOX_ARGUMENTS, blockIdx.x);
  Tables tables = work.tables;
  const Global<const x_t> x_source(x, x_sn, x_so, box, inner), dy_source(dy, dy_sn, dy_so, box, inner);
  Shared<x_t> x_tile(reinterpret_cast<x_t*>(work.x), x_source, box);
  Shared<x_t> dy_tile(reinterpret_cast<x_t*>(work.dy), dy_source, box);
  x_tile.fill(x_source, box);
  dy_tile.fill(dy_source, box);
  tables.fill_scales(box, {weight, bias, nullptr, nullptr, weight_dtype, bias_dtype, -1, -1});
  Mask mask = {};
#if MASKED
  mask.fill(work.mask, where, where_sn, where_so, where_sc, where_si, box);
#endif
  const int units = box.groups;
  if (have_statistics) {
    work.statistics.load(mean, low, 1, rstd, G, labels, labelled, box);
    tables.fill_centres(box, work.statistics);
  }
  __syncthreads();

  if (!have_statistics) {
    const int team = group_team, teams = blockDim.x / team, lane = threadIdx.x & (team - 1);
    for (int first = 0; first < units; first += teams) {
      const int u = first + threadIdx.x / team;
      Moments m = moments_of(x_tile, mask, box, 0, u, u < units ? box.nr : 0, lane, team, shared);
      if (u < units && lane == 0) {
        if (!(m.count > 0)) {  // all masked: the sums still need a place to be about
          m.mean = to_double<X_DTYPE>(x_tile.data[x_tile.index(0, 0, u * box.run)]);
          m.low = m.m2 = 0;
        }
        const double spread = m.root();
        work.statistics.mean[u] = m.mean;
        work.statistics.low[u] = m.low;
        work.statistics.rstd[u] = spread > 0 ? sqrt(m.count) / spread : 1;
        tables.centres[u] = Centre(work.statistics, u);
        double* to = moments + 4 * ((box.n0 * box.parts + box.part) * G + box.g0 + u);
        to[0] = m.mean;
        to[1] = m.low;
        to[2] = spread;
        to[3] = m.count;
      }
    }
    __syncthreads();
  }

  sum_channels(x_tile, dy_tile, mask, box, channel_team, work.statistics, tables, shared, work.sums);
  __syncthreads();
  double* to = sums + 2 * ((box.n0 * box.spatial_parts + box.spatial_part) * C + box.c0);
  for (int c = threadIdx.x; c < box.nc; c += blockDim.x) {
    to[2 * c] = work.sums[2 * c];
    to[2 * c + 1] = have_statistics ? work.sums[2 * c + 1] : work.sums[2 * c + 1] / work.statistics.rstd[c / box.group_channels];
  }
}

// One block a group of a sample: its statistics and coefficients, (N, G), and the sums of v and v x_hat of its channels,
// channel_sums: (N, C, 2), from those of its boxes. See backward_sums. Labelled groups as in merge_labels, where the
// order of the channels changes no bit.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    merge_backward(const int C, const int D, const int G, const int* order, const int* bounds, const int labelled, const int channels, const int parts, const int spatial_parts, const int team,
                   const double* moments, const double* sums, const void* weight, const int weight_dtype, const double eps,
                   const double* rstd_given, const int have_rstd, const int have_statistics,
                   double* mean, double* low, double* rstd, double* along, double* offset, double* count,
                   double* channel_sums) {
  double* scratch = shared;
  const long long n = blockIdx.x / G;
  const int g = (int)(blockIdx.x - n * G), lane = threadIdx.x & (team - 1), teams = blockDim.x / team;
  const int group_channels = labelled ? bounds[g + 1] - bounds[g] : D;
  const auto channel = [&](int k) { return labelled ? order[bounds[g] + k] : g * D + k; };
  double mean_g, low_g, rstd_g, count_g;
  const double* of_group = moments + 4 * (n * parts * G + g);
  if (have_statistics) {
    mean_g = mean[n * G + g];
    low_g = low[n * G + g];
    rstd_g = rstd[n * G + g];
    count_g = count[n * G + g];
  } else {
    const Moments m = merge_parts(of_group, 4ll * G, parts, threadIdx.x, blockDim.x, scratch);
    mean_g = m.mean;
    low_g = m.low;
    rstd_g = have_rstd ? rstd_given[n * G + g] : m.rstd(eps);
    count_g = m.count;
  }
  const int parts_of_channels = parts / spatial_parts;
  Pair group = {0, 0};
  for (int first = 0; first < group_channels; first += teams) {
    const int k = first + threadIdx.x / team, c = k < group_channels ? channel(k) : 0;
    Pair sum = {0, 0};
    if (k < group_channels) {
      for (int p = lane; p < spatial_parts; p += team) {
        const double* q = sums + 2 * ((n * spatial_parts + p) * C + c);
        double sum_v_x_hat = q[1];
        if (!have_statistics) {  // from about the box's mean to about the group's
          const double* box = of_group + 4ll * G * (p * parts_of_channels + k / channels);
          const double shift = (box[0] - mean_g) + (box[1] - low_g);
          sum_v_x_hat = fma(q[0], shift, sum_v_x_hat);
        }
        sum.a += q[0];
        sum.b += sum_v_x_hat;
      }
    }
    sum = team_sum(sum, team, scratch);
    if (k < group_channels && lane == 0) {
      if (!have_statistics) sum.b *= rstd_g;
      channel_sums[2 * (n * C + c)] = sum.a;
      channel_sums[2 * (n * C + c) + 1] = sum.b;
      const double w = TANGENT ? 1 : parameter(weight, weight_dtype, c, 1);
      group.a = fma(w, sum.a, group.a);
      group.b = fma(w, sum.b, group.b);
    }
  }
  if (labelled) {
    __syncthreads();  // the sums of all channels are there
    const auto weighted = [&](int k, int which) {
      const double w = TANGENT ? 1 : parameter(weight, weight_dtype, channel(k), 1);
      return w * channel_sums[2 * (n * C + channel(k)) + which];
    };
    group.a = sum_in_any_order(group_channels, threadIdx.x, blockDim.x, scratch, [&](int k) { return weighted(k, 0); });
    group.b = sum_in_any_order(group_channels, threadIdx.x, blockDim.x, scratch, [&](int k) { return weighted(k, 1); });
  } else {
    group = team_sum(group, blockDim.x, scratch);
  }
  if (threadIdx.x == 0) {
    const GroupCoefficients coefficients(group, rstd_g, count_g);
    along[n * G + g] = coefficients.along;
    offset[n * G + g] = coefficients.offset;
    if (!have_statistics) {
      mean[n * G + g] = mean_g;
      low[n * G + g] = low_g;
      rstd[n * G + g] = rstd_g;
      count[n * G + g] = count_g;
    }
  }
}

// One block a box: x and dy read once, dx written once, under statistics and coefficients of (N, G).
extern "C" __global__ void __launch_bounds__(SPLIT_THREADS, 2)
    backward_apply(BOX_PARAMETERS, const x_t* x, const long long x_sn, const long long x_so, const x_t* dy,
                   const long long dy_sn, const long long dy_so, PARAMETERS, TANGENTS,
                   const double* mean, const double* low, const double* rstd, const double* along, const double* offset,
                   const double* count, const int G, const int* labels, const int labelled, y_t* dx, const long long dx_sn, const long long dx_so MASK_PARAMETERS) {
  const Work work(samples, rows, channels, columns, D, 0, 0);
  const Box box(BOX_ARGUMENTS, blockIdx.x);
  Tables tables = work.tables;
  tables.fill_scales(box, PARAMETER_ARGUMENTS);
  work.statistics.load(mean, low, 1, rstd, G, labels, labelled, box);
  for (int u = threadIdx.x; u < box.groups; u += blockDim.x) {  // each thread those that it loaded
    const long long at = box.n0 * G + (labelled ? labels[box.g0 + u] : box.g0 + u);
    work.along[u] = along[at];
    work.offset[u] = offset[at];
    set_tables(work.statistics, work.along, work.offset, count[at], u, tables.centres, work.coefficients);
  }
  Mask mask = {};
#if MASKED && !TANGENT
  mask.fill(work.x, where, where_sn, where_so, where_sc, where_si, box);
#endif
  __syncthreads();
  const Gradient<Global<const x_t>, Global<const x_t>> operation = {
      Global<const x_t>(x, x_sn, x_so, box, inner), Global<const x_t>(dy, dy_sn, dy_so, box, inner), work.statistics,
      work.along, work.offset, tables, work.coefficients, mask, box, Divisor(box.group_channels)};
  apply(operation, Global<y_t>(dx, dx_sn, dx_so, box, inner), box);
}

// dweight and dbias of 32 channels a block, from partial: (rows, C, 2), to every `step`th element of theirs. Eight threads a
// channel take every eighth row; their sums are added in order.
template <class Partial>
__device__ __forceinline__ void add_rows(const Partial* partial, int rows, int C, void* dweight, void* dbias, int dtype, int step) {
  const int c = blockIdx.x * 32 + (threadIdx.x & 31), part = threadIdx.x >> 5;
  double sum_v = 0, sum_v_x_hat = 0;
  if (c < C) {
    for (int r = part; r < rows; r += 8) {
      sum_v += (double)partial[2 * ((long long)r * C + c)];
      sum_v_x_hat += (double)partial[2 * ((long long)r * C + c) + 1];
    }
  }
  shared[2 * threadIdx.x] = sum_v;
  shared[2 * threadIdx.x + 1] = sum_v_x_hat;
  __syncthreads();
  if (part == 0 && c < C) {
    for (int other = 1; other < 8; ++other) {
      sum_v += shared[2 * (threadIdx.x + 32 * other)];
      sum_v_x_hat += shared[2 * (threadIdx.x + 32 * other) + 1];
    }
    store_any(dweight, dtype, (long long)c * step, sum_v_x_hat);
    store_any(dbias, dtype, (long long)c * step, sum_v);
  }
}
extern "C" __global__ void __launch_bounds__(256)
    parameter_gradients(const void* partial, const int doubles, const int rows, const int C, void* dweight, void* dbias,
                        const int dtype, const int step) {
  if (doubles) add_rows((const double*)partial, rows, C, dweight, dbias, dtype, step);
  else add_rows((const float*)partial, rows, C, dweight, dbias, dtype, step);
}
