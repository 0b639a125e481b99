// Forward: statistics of the groups, and y = act((x - mean) * rstd * weight + bias).
//
// A box of whole groups that fits in shared memory: `forward` alone. x is read once, y written once.
// A larger group: `moments` of its boxes (x read once, 32 bytes a group written), `merge_moments` in a fixed order,
// `apply` (x read again, y written). `moments` and `merge_moments` alone are the moments of the public function, `apply`
// alone its normalize.
//
// Accumulators: float32 over SHORT_RUN elements, float64 beyond (float64 arrays: float64 throughout, means in two parts).
// Requires: blocks of a power of two of threads, at least 32 and at most THREADS; dynamic shared memory as
// config.Box.shared says; x and y may be the same memory where they have the same strides.
//
// Options: X_DTYPE, Y_DTYPE, ACTIVATION, MASKED, SAME_CHANNEL.

// One block a box: groups of one or more samples.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward(BOX_PARAMETERS, const int team, const x_t* x, const long long x_sn, const long long x_so,
            PARAMETERS, const double eps, y_t* y,
            const long long y_sn, const long long y_so, double* mean, double* rstd MASK_PARAMETERS) {
  const Box box(BOX_ARGUMENTS, blockIdx.x);
  const int most_units = samples * max(1, channels / D);
  double* scratch = shared;
  const Statistics statistics(shared + SCRATCH, most_units);
  Tables tables(reinterpret_cast<unsigned char*>(shared + SCRATCH + (3 * most_units + 1) / 2 * 2), most_units);
  unsigned char* bytes = align_16(tables.end(channels));

  const Global<const x_t> source(x, x_sn, x_so, box, inner);
  Shared<x_t> tile(reinterpret_cast<x_t*>(bytes), source, box);
  tile.fill(source, box);
  tables.fill_scales(box, {weight, bias, nullptr, nullptr, weight_dtype, bias_dtype, -1, -1});
  Mask mask = {};
#if MASKED
  mask.fill(bytes + box_bytes<x_t>(samples, rows, channels * columns, pitch, flat), where, where_sn, where_so, where_sc,
            where_si, box);
#endif
  __syncthreads();

  const int units = box.ns * box.groups, teams = blockDim.x / team, lane = threadIdx.x & (team - 1);
  for (int first = 0; first < units; first += teams) {
    const int u = first + threadIdx.x / team, n = u / box.groups, k = u - n * box.groups;
    const Moments m = moments_of(tile, mask, box, n, k, u < units ? box.nr : 0, lane, team, scratch);
    if (u < units && lane == 0) {
      const double r = m.rstd(eps);
      statistics.mean[u] = m.mean;
      statistics.low[u] = m.low;
      statistics.rstd[u] = r;
      tables.centres[u] = Centre(statistics, u);
      const long long at = (box.n0 + n) * (C / D) + box.g0 + k;
      mean[at] = m.mean;
      rstd[at] = r;
    }
  }
  __syncthreads();

  const Normalization<Shared<x_t>> operation(tile, statistics, tables, box);
  apply(operation, Global<y_t>(y, y_sn, y_so, box, inner), box);
}

// One block a box, which may be a part of a group. Writes (mean, low, root of m2, count) of each of its groups.
extern "C" __global__ void __launch_bounds__(SPLIT_THREADS, 3)
    moments(BOX_PARAMETERS, const int team, const x_t* x, const long long x_sn, const long long x_so,
            double* partial MASK_PARAMETERS) {
  const Box box(BOX_ARGUMENTS, blockIdx.x);
  double* scratch = shared;
  unsigned char* bytes = reinterpret_cast<unsigned char*>(shared + SCRATCH);
  const Global<const x_t> source(x, x_sn, x_so, box, inner);
  Shared<x_t> tile(reinterpret_cast<x_t*>(bytes), source, box);
  tile.fill(source, box);
  Mask mask = {};
#if MASKED
  mask.fill(bytes + box_bytes<x_t>(samples, rows, channels * columns, pitch, flat), where, where_sn, where_so, where_sc,
            where_si, box);
#endif
  __syncthreads();

  const int units = box.ns * box.groups, teams = blockDim.x / team, lane = threadIdx.x & (team - 1);
  for (int first = 0; first < units; first += teams) {
    const int u = first + threadIdx.x / team, n = u / box.groups, k = u - n * box.groups;
    const Moments m = moments_of(tile, mask, box, n, k, u < units ? box.nr : 0, lane, team, scratch);
    if (u < units && lane == 0) {
      double* to = partial + 4 * (((box.n0 + n) * box.parts + box.part) * (C / D) + box.g0 + k);
      to[0] = m.mean;
      to[1] = m.low;
      to[2] = m.root();
      to[3] = m.count;
    }
  }
}

__device__ __forceinline__ void write_moments(const Moments& m, long long group, double eps, int result, double* mean,
                                              double* low, double* rstd, double* elements, double* m2, long long* count) {
  mean[group] = m.mean;
  if (result == 1) {
    m2[group] = m.m2 / m.scale / m.scale;
    count[group] = (long long)m.count;
  } else {
    low[group] = m.low;
    rstd[group] = m.rstd(eps);
    elements[group] = m.count;
  }
}

// One team a group: merges the moments of its `parts`. Writes mean, low, rstd and the number of
// elements; or mean, m2 and count (result 1); or (result 2) to `mean` what `moments` writes of a part, (N, G, 4).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    merge_moments(const double* partial, const long long groups_of_all, const int G, const int parts, const int team,
                  const double eps, const int result, double* mean, double* low, double* rstd, double* elements, double* m2,
                  long long* count) {
  const long long group = (long long)blockIdx.x * (blockDim.x / team) + threadIdx.x / team;
  const int lane = threadIdx.x & (team - 1), mine = group < groups_of_all ? parts : 0;
  const double* from = partial + 4 * ((group / G) * parts * G + group % G);
  const Moments m = merge_parts(from, 4ll * G, mine, lane, team, shared);
  if (lane == 0 && mine) {
    if (result == 2) {
      mean[4 * group] = m.mean;
      mean[4 * group + 1] = m.low;
      mean[4 * group + 2] = m.root();
      mean[4 * group + 3] = m.count;
    } else {
      write_moments(m, group, eps, result, mean, low, rstd, elements, m2, count);
    }
  }
}

// One block a group of a sample, of the channels order[bounds[g]] ... order[bounds[g + 1] - 1]: merges their moments,
// channel_moments: (N, C, 4), and writes as merge_moments. The sums do not depend on the order of the channels, to the bit.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    merge_labels(const double* channel_moments, const int C, const int G, const int* order, const int* bounds,
                 const double eps, const int result, double* mean, double* low, double* rstd, double* elements, double* m2,
                 long long* count) {
  double* scratch = shared;
  const long long n = blockIdx.x / G;
  const int g = (int)(blockIdx.x - n * G), channels = bounds[g + 1] - bounds[g];
  const auto of = [&](int k) { return channel_moments + 4 * (n * C + order[bounds[g] + k]); };
  const auto sum = [&](auto value) { return sum_in_any_order(channels, threadIdx.x, blockDim.x, scratch, value); };
  Moments m;
  m.count = sum([&](int k) { return of(k)[3]; });
  // A power of two that keeps the squares in range, from the means and the spreads.
  double largest = 0;
  for (int k = threadIdx.x; k < channels; k += blockDim.x)
    if (of(k)[3] > 0) largest = fmax(largest, fmax(fabs(of(k)[0]), of(k)[2]));
  largest = team_max(largest, blockDim.x, scratch);
  m.scale = largest > 1e-130 && largest < 1e130 ? 1 : to_unity(largest);
  const double unit = m.scale;
  const double centre = sum([&](int k) { return of(k)[3] > 0 ? of(k)[3] * (of(k)[0] * unit) : 0; }) / m.count;
  const auto distance = [&](int k) { return (of(k)[0] * unit - centre) + of(k)[1] * unit; };
  const double correction = sum([&](int k) { return of(k)[3] > 0 ? of(k)[3] * distance(k) : 0; }) / m.count;
  m.m2 = sum([&](int k) {
    const double d = distance(k) - correction, root = of(k)[2] * unit;
    return of(k)[3] > 0 ? fma(root, root, of(k)[3] * (d * d)) : 0;
  });
  two_sum(centre, correction, m.mean, m.low);
  m.mean /= unit;
  m.low /= unit;
  if (threadIdx.x == 0) write_moments(m, n * G + g, eps, result, mean, low, rstd, elements, m2, count);
}

// One block a box: x read once, y written once, under the statistics in mean, low (where have_low) and rstd, (N, G).
extern "C" __global__ void __launch_bounds__(SPLIT_THREADS, 3)
    apply_statistics(BOX_PARAMETERS, const x_t* x, const long long x_sn, const long long x_so,
                     const double* mean, const double* low, const int have_low, const double* rstd, const int G,
                     const int* labels, const int labelled, PARAMETERS, y_t* y, const long long y_sn, const long long y_so) {
  const Box box(BOX_ARGUMENTS, blockIdx.x);
  const int most_units = samples * max(1, channels / D);
  Statistics statistics(shared, most_units);
  Tables tables(reinterpret_cast<unsigned char*>(shared + (3 * most_units + 1) / 2 * 2), most_units);
  tables.fill_scales(box, {weight, bias, nullptr, nullptr, weight_dtype, bias_dtype, -1, -1});
  statistics.load(mean, low, have_low, rstd, G, labels, labelled, box);
  tables.fill_centres(box, statistics);  // each thread those that it loaded
  __syncthreads();
  const Normalization<Global<const x_t>> operation(Global<const x_t>(x, x_sn, x_so, box, inner), statistics, tables, box);
  apply(operation, Global<y_t>(y, y_sn, y_so, box, inner), box);
}
