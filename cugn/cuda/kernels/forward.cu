// Forward: statistics of the groups, and y = act((x - mean) * rstd * weight + bias).
//
// A box of whole groups that fits in shared memory: `forward` alone. x is read once, y written once.
// A larger group: `moments` of its boxes (x read once, 32 bytes a group written), `merge_moments` in a fixed order,
// `apply` (x read again, y written). `moments` and `merge_moments` alone are the moments of the public function, `apply`
// alone its normalize.
//
// Accumulators: float32 over SHORT_RUN elements, float64 beyond (float64 arrays: float64 throughout, means in two parts).
// Requires: blocks of a power of two of threads, at least 32 and as many as the launch bounds say at most; dynamic shared memory as
// config.Box.shared says; x and y may be the same memory where they have the same strides.
//
// Options: X_DTYPE, Y_DTYPE, ACTIVATION, MASKED, VECTOR_CHANNELS; LABELLED, for `forward` where S = 1.

#ifdef KERNEL_FORWARD
// One block a box: groups of one or more samples.
extern "C" __global__ void FORWARD_BOUNDS
    forward(BOX_PARAMETERS, const int team, const x_t* x, const long long x_sn, const long long x_so,
            PARAMETERS, const double eps, y_t* y,
            const long long y_sn, const long long y_so, double* mean, double* rstd MASK_PARAMETERS LABEL_PARAMETERS) {
  const Box box(BOX_ARGUMENTS, blockIdx.x);
  const Grouping grouping LABELS_OF(box);
  const int G = LABELLED ? grouping.groups : C / D;
  double* scratch = shared;
  const Tables tables(shared + SCRATCH, samples * (LABELLED ? G : max(1, channels / D)), channels, 0);
  unsigned char* bytes = align_16(tables.end());

  const Global<const x_t> source(x, x_sn, x_so, box, inner);
  Shared<x_t> tile(reinterpret_cast<x_t*>(bytes), box);
  tile.fill(source, box);
  tables.fill_scales(box, {weight, bias, nullptr, nullptr, weight_dtype, bias_dtype, -1, -1});
  Mask mask = {};
#if MASKED
  mask.fill(bytes + box_bytes<x_t>(samples, rows, channels * columns, pitch, flat), where, where_sn, where_so, where_sc,
            where_si, box);
#endif
  copies_arrived();
  __syncthreads();

  const int units = box.ns * grouping.groups, teams = blockDim.x / team, lane = threadIdx.x & (team - 1);
  for (int first = 0; first < units; first += teams) {
    const int u = in_turn(first + threadIdx.x / team, units, box.run), n = u / grouping.groups, k = u - n * grouping.groups;
#if LABELLED
    Moments m = moments_of_label(tile, mask, grouping, n, k, u < units ? grouping.channels(k) : 0, lane, team, scratch);
#else
    Moments m = moments_of(tile, mask, box, n, k, u < units ? box.nr : 0, lane, team, scratch);
#endif
    if (u < units && lane == 0) {
      m.fit(eps);
      tables.hold(u, m);
    }
  }
  __syncthreads();
  for (int u = threadIdx.x; u < units; u += blockDim.x) {  // a thread a group: a team would leave all but one lane idle
    const Moments m = tables.held(u);
    const double r = m.rstd(eps);
    const int n = u / grouping.groups;
    const long long at = (box.n0 + n) * G + box.g0 + (u - n * grouping.groups);
    tables.finish(u, m, r);
    mean[at] = m.mean / m.unit;
    rstd[at] = r * m.unit;
  }
  __syncthreads();

  const Normalization<Shared<x_t>> operation = {tile, tables, grouping};
  apply(operation, Global<y_t>(y, y_sn, y_so, box, inner), box);
}
#endif

#ifdef KERNEL_MOMENTS
// One block a box, which may be a part of a group. Writes PART values of each of its groups.
extern "C" __global__ void MOMENTS_BOUNDS
    moments(BOX_PARAMETERS, const int team, const x_t* x, const long long x_sn, const long long x_so,
            double* partial MASK_PARAMETERS) {
  const Box box(BOX_ARGUMENTS, blockIdx.x);
  double* scratch = shared;
  unsigned char* bytes = reinterpret_cast<unsigned char*>(shared + SCRATCH);
  const Global<const x_t> source(x, x_sn, x_so, box, inner);
  Shared<x_t> tile(reinterpret_cast<x_t*>(bytes), box);
  tile.fill(source, box);
  Mask mask = {};
#if MASKED
  mask.fill(bytes + box_bytes<x_t>(samples, rows, channels * columns, pitch, flat), where, where_sn, where_so, where_sc,
            where_si, box);
#endif
  copies_arrived();
  __syncthreads();

  const int units = box.ns * box.groups, teams = blockDim.x / team, lane = threadIdx.x & (team - 1);
  for (int first = 0; first < units; first += teams) {
    const int u = in_turn(first + threadIdx.x / team, units, box.run), n = u / box.groups, k = u - n * box.groups;
    const Moments m = moments_of(tile, mask, box, n, k, u < units ? box.nr : 0, lane, team, scratch);
    if (u < units && lane == 0) {
      write_part(partial + PART * (((box.n0 + n) * box.parts + box.part) * (C / D) + box.g0 + k), m);
    }
  }
}
#endif

// What the merged moments of a group become: (mean, m2, count) of the public function, `count` given; or (mean, rstd) where
// the caller wants them, and the planes that the other kernels read, with the caller's rstd where there is one.
struct Results {
  double *mean, *rstd, *m2;
  long long* count;
  const double* rstd_given;
  Planes planes;
  double eps;
  int public_moments, have_rstd;

  __device__ __forceinline__ void write(Moments m, long long group) const {
    if (public_moments) {
      mean[group] = m.mean / m.unit;
      m2[group] = m.m2 / m.unit / m.unit;
      count[group] = (long long)m.count;
      return;
    }
    m.fit(eps);
    const double r = have_rstd ? rstd_given[group] / m.unit : m.rstd(eps);
    mean[group] = m.mean / m.unit;
    rstd[group] = r * m.unit;
    planes.at(MEAN, group) = m.mean;
    planes.at(LOW, group) = m.low;
    planes.at(RSTD, group) = r;
    planes.at(UNIT, group) = m.unit;
    planes.at(COUNT, group) = m.count;
  }
};
#define RESULTS                                                                                                        \
  const double eps, const int public_moments, const double *rstd_given, const int have_rstd, double *mean, double *rstd, \
      double *m2, long long *count, double *planes
#define RESULTS_OF(groups) {mean, rstd, m2, count, rstd_given, {planes, groups}, eps, public_moments, have_rstd}

#ifdef KERNEL_MERGE_MOMENTS
// One team a group: merges the moments of its `parts`; or, where the groups are channels (of labelled groups), writes to
// channel_moments what `moments` writes of a part, (N, G, PART).
extern "C" __global__ void MERGE_BOUNDS
    merge_moments(const double* partial, const long long groups_of_all, const int G, const int parts, const int team,
                  double* channel_moments, const int channels_only, RESULTS) {
  const long long group = (long long)blockIdx.x * (blockDim.x / team) + threadIdx.x / team;
  const int lane = threadIdx.x & (team - 1), mine = group < groups_of_all ? parts : 0;
  const double* from = partial + PART * ((group / G) * parts * G + group % G);
  const Moments m = merge_parts(from, (long long)PART * G, mine, lane, team, shared);
  if (lane == 0 && mine) {
    const Results results = RESULTS_OF(groups_of_all);
    if (channels_only) write_part(channel_moments + PART * group, m);
    else results.write(m, group);
  }
}
#endif

#ifdef KERNEL_MERGE_LABELS
// One team a group of a sample, of the channels order[bounds[g]] ... order[bounds[g + 1] - 1]: merges their moments,
// channel_moments: (N, C, PART). The sums do not depend on the order of the channels, to the bit.
extern "C" __global__ void MERGE_BOUNDS
    merge_labels(const double* channel_moments, const long long groups_of_all, const int C, const int G, const int team,
                 const int* order, const int* bounds, RESULTS) {
  double* scratch = shared;
  const long long group = (long long)blockIdx.x * (blockDim.x / team) + threadIdx.x / team, n = group / G;
  const int g = (int)(group - n * G), channels = group < groups_of_all ? bounds[g + 1] - bounds[g] : 0;
  const int lane = threadIdx.x & (team - 1);
  const auto of = [&](int k) { return channel_moments + PART * (n * C + order[bounds[g] + k]); };
  const auto sum = [&](auto value) { return sum_in_any_order(channels, lane, team, scratch, value); };
  Moments m;
  m.count = sum([&](int k) { return of(k)[3]; });
  // The unit of the largest channel, then one that keeps the squares in range.
  double most = 0, largest = 0;
  if (REAL_IS_DOUBLE) {
    for (int k = lane; k < channels; k += team)
      if (of(k)[3] > 0) most = fmax(most, 1 / of(k)[4]);
    most = team_max(most, team, scratch);
  }
  m.unit = REAL_IS_DOUBLE && most > 0 ? 1 / most : 1;
  const auto to_unit = [&](int k) { return REAL_IS_DOUBLE ? m.unit / of(k)[4] : 1; };
  for (int k = lane; k < channels; k += team)
    if (of(k)[3] > 0) largest = fmax(largest, fmax(fabs(of(k)[0]), of(k)[2]) * to_unit(k));
  largest = team_max(largest, team, scratch);
  if (!(largest > 1e-130 && largest < 1e130)) m.unit *= to_unity(largest);
  const double centre = sum([&](int k) { return of(k)[3] > 0 ? of(k)[3] * (of(k)[0] * to_unit(k)) : 0; }) / m.count;
  const auto distance = [&](int k) { return (of(k)[0] * to_unit(k) - centre) + of(k)[1] * to_unit(k); };
  const double correction = sum([&](int k) { return of(k)[3] > 0 ? of(k)[3] * distance(k) : 0; }) / m.count;
  m.m2 = sum([&](int k) {
    const double d = distance(k) - correction, root = of(k)[2] * to_unit(k);
    return of(k)[3] > 0 ? fma(root, root, of(k)[3] * (d * d)) : 0;
  });
  two_sum(centre, correction, m.mean, m.low);
  const Results results = RESULTS_OF(groups_of_all);
  if (lane == 0 && group < groups_of_all) results.write(m, group);
}
#endif

#ifdef KERNEL_APPLY_STATISTICS
// One block a box: x read once, y written once, under the statistics of all groups in `planes` or, without them, the
// caller's mean and rstd, (N, G).
extern "C" __global__ void APPLY_BOUNDS
    apply_statistics(BOX_PARAMETERS, const x_t* x, const long long x_sn, const long long x_so, const double* mean,
                     const double* rstd, double* planes, const int have_planes, const int G, const int* labels,
                     const int labelled, PARAMETERS, y_t* y, const long long y_sn, const long long y_so) {
  const Box box(BOX_ARGUMENTS, blockIdx.x);
  const int most_units = samples * max(1, channels / D);
  const Tables tables(shared, most_units, channels, 0);
  tables.fill_scales(box, {weight, bias, nullptr, nullptr, weight_dtype, bias_dtype, -1, -1});
  for_each_group(box, G, labels, labelled, [&](int u, long long group) {
    tables.set(u, have_planes ? statistic_of({planes, N * G}, group) : given_statistic(mean, rstd, group));
  });
  __syncthreads();
  const Normalization<Global<const x_t>> operation = {Global<const x_t>(x, x_sn, x_so, box, inner), tables, Grouping(box)};
  apply(operation, Global<y_t>(y, y_sn, y_so, box, inner), box);
}
#endif
