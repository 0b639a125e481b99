// Double backward: from u = ddx, ddweight and ddbias the gradients with respect to dy, x, weight and bias.
//
// The same steps as for the backward, over boxes of a part of a group or of some whole ones. The statistics come from
// `moments` and its merges (x read once); `second_sums` takes sums over the channels of each box (x, dy and u read once);
// `merge_second` adds them up in a fixed order, to coefficients of each group and the sums of gweight and gbias of each
// channel; `second_apply` reads x, dy and u again and writes the gradients of dy and of x. With d_mean, d_along the mean of
// a value over the group and of its product with x_hat, and J(u) = u - u_mean - x_hat u_along:
//
//   gz = gdz dy act''(z),  gdz = weight rstd J(u) + ddweight x_hat + ddbias,  f = ddweight dz + weight gz,  q = weight dz
//   gdy = gdz act'(z)
//   gx = rstd (f - used (f_mean + x_hat f_along)) - rstd^2 (used (cross x_hat + q_along J(u)) + u_along (q - used (q_mean +
//        x_hat q_along))),  cross = mean of q J(u)
//
// `used` is `where`; u_mean and u_along are over the elements where it is true, the other sums over all. All in float64: sums of products of
// three arrays have no bound that float32 would keep. J(u) and gz are linear in u, so that one pass takes all sums.
//
// Requires: as forward.cu; REAL_IS_DOUBLE and TANGENT (ddweight and ddbias stand in the tables as tangents).
//
// Options: X_DTYPE (= Y_DTYPE), ACTIVATION, MASKED, VECTOR_CHANNELS.

constexpr bool CURVED = ACTIVATION != IDENTITY && ACTIVATION != RELU;

// Sums over a channel: of u and u x_hat where used; of dz, dz x_hat, dz u; of e = dy act''(z): e, e x_hat, e x_hat^2, e u,
// e u x_hat.
enum Sum { U, U_X, Z, Z_X, Z_U, E, E_X, E_XX, E_U, E_UX };
constexpr int SUMS = CURVED ? 10 : 5;

enum SecondPlane { U_MEAN = COUNT + 1, U_ALONG, Q_MEAN, Q_ALONG, CROSS, F_MEAN, F_ALONG };

// A group in shared memory.
struct SecondGroup {
  double high, low, rstd, unit;  // as Centre
  double true_rstd, u_mean, u_along, x, u, constant;  // gx = ... + used (x x_hat + u (u - u_mean) + constant)
};
constexpr int GROUP_VALUES = sizeof(SecondGroup) / sizeof(double);

struct SecondWork {
  double *groups, *channels;
  int group_step, channel_step;
  unsigned char *tiles[3], *mask;
  __device__ __forceinline__ SecondWork(int samples, int rows, int channels_of_box, int columns, int units, int pitch, int flat)
      : groups(shared + SCRATCH), group_step(spread<double>(units)), channel_step(spread<double>(channels_of_box)) {
    channels = groups + GROUP_VALUES * group_step;
    unsigned char* p = align_16(reinterpret_cast<unsigned char*>(channels + 4 * channel_step));
    for (int i = 0; i < 3; ++i) {
      tiles[i] = p;
      p += box_bytes<x_t>(samples, rows, channels_of_box * columns, pitch, flat);
    }
    mask = p;
  }
  __device__ __forceinline__ double& group(int value, int u) const { return groups[value * group_step + spread<double>(u)]; }
  __device__ __forceinline__ double& channel(int value, int c) const {
    return channels[value * channel_step + spread<double>(c)];
  }
  __device__ __forceinline__ Centre centre(int u) const {
    Centre centre;
    centre.high = group(0, u);
    centre.low = group(1, u);
    centre.rstd = group(2, u);
    centre.unit = group(3, u);
    return centre;
  }
  __device__ __forceinline__ SecondGroup group(int u) const {
    return {group(0, u), group(1, u), group(2, u), group(3, u), group(4, u),
            group(5, u), group(6, u), group(7, u), group(8, u), group(9, u)};
  }
  __device__ __forceinline__ void set_statistic(int u, const Statistic& s) const {
    const Centre centre(s);
    group(0, u) = centre.high;
    group(1, u) = centre.low;
    group(2, u) = centre.rstd;
    group(3, u) = centre.unit;
    group(4, u) = s.rstd * s.unit;
  }
  __device__ void fill_channels(const Box& box, const Parameters& p) const {
    for (int c = threadIdx.x; c < box.nc; c += blockDim.x) {
      channel(0, c) = parameter(p.weight, p.weight_dtype, box.c0 + c, 1);
      channel(1, c) = parameter(p.bias, p.bias_dtype, box.c0 + c, 0);
      channel(2, c) = parameter(p.tweight, p.tweight_dtype, box.c0 + c, 0);
      channel(3, c) = parameter(p.tbias, p.tbias_dtype, box.c0 + c, 0);
    }
  }
};

#define SECOND_INPUTS                                                                                                   \
  const x_t *x, const long long x_sn, const long long x_so, const x_t *dy, const long long dy_sn, const long long dy_so, \
      const x_t *ddx, const long long ddx_sn, const long long ddx_so
#define SECOND_PARAMETERS \
  {weight, bias, tweight, tbias, weight_dtype, bias_dtype, tweight_dtype, tbias_dtype}

// The tiles of x, dy and u, filled.
struct SecondTiles {
  Shared<x_t> x, dy, u;
  __device__ __forceinline__ SecondTiles(const SecondWork& work, const Global<const x_t>& x_source,
                                         const Global<const x_t>& dy_source, const Global<const x_t>& u_source, const Box& box)
      : x(reinterpret_cast<x_t*>(work.tiles[0]), box), dy(reinterpret_cast<x_t*>(work.tiles[1]), box),
        u(reinterpret_cast<x_t*>(work.tiles[2]), box) {
    x.fill(x_source, box);
    dy.fill(dy_source, box);
    u.fill(u_source, box);
  }
};

#ifdef KERNEL_SECOND_SUMS
// One block a box of one sample, which may be a part of a group. sums: (N, spatial parts, C, SUMS), under the statistics in
// `planes`; labels, the group of each channel, where labelled.
extern "C" __global__ void SECOND_BOUNDS
    second_sums(BOX_PARAMETERS, const int team, SECOND_INPUTS, PARAMETERS, TANGENTS, double* planes, const int G,
                const int* labels, const int labelled, double* sums MASK_PARAMETERS) {
  const SecondWork work(samples, rows, channels, columns, max(1, channels / D), pitch, flat);
  const Box box(BOX_ARGUMENTS, blockIdx.x);
  const SecondTiles tiles(work, {x, x_sn, x_so, box, inner}, {dy, dy_sn, dy_so, box, inner}, {ddx, ddx_sn, ddx_so, box, inner}, box);
  work.fill_channels(box, SECOND_PARAMETERS);
  for_each_group(box, G, labels, labelled,
                 [&](int u, long long group) { work.set_statistic(u, statistic_of({planes, N * G}, group)); });
  Mask mask = {};
#if MASKED
  mask.fill(work.mask, where, where_sn, where_so, where_sc, where_si, box);
#endif
  copies_arrived();
  __syncthreads();

  const int teams = blockDim.x / team, lane = threadIdx.x & (team - 1);
  const Divisor by_group(box.group_channels);
  for (int first = 0; first < box.nc; first += teams) {
    const int c = first + threadIdx.x / team, q0 = c * box.ncol;
    double sum[SUMS] = {};
    if (c < box.nc) {
      const int g = by_group.quotient(c);
      const Centre centre = work.centre(g);
      const double weight_c = work.channel(0, c), bias_c = work.channel(1, c);
      walk(box.nr, box.ncol, lane, team,
           [&](auto width, int r, int i) {
             constexpr int K = decltype(width)::value;
             real xs[K], dys[K], us[K];
             read<X_DTYPE, K>(tiles.x, 0, r, q0 + i, xs);
             read<X_DTYPE, K>(tiles.dy, 0, r, q0 + i, dys);
             read<X_DTYPE, K>(tiles.u, 0, r, q0 + i, us);
#pragma unroll
             for (int k = 0; k < K; ++k) {
               const double x_hat = centred(centre, xs[k]) * centre.rstd, z = fma(x_hat, weight_c, bias_c);
               const double dz = ACTIVATION == IDENTITY ? dys[k] : dys[k] * slope(z);
               if (mask.at(0, r, q0 + i + k)) {
                 sum[U] += us[k];
                 sum[U_X] = fma(us[k], x_hat, sum[U_X]);
               }
               sum[Z] += dz;
               sum[Z_X] = fma(dz, x_hat, sum[Z_X]);
               sum[Z_U] = fma(dz, us[k], sum[Z_U]);
               if constexpr (CURVED) {
                 const double e = dys[k] * curvature(z), e_x = e * x_hat;
                 sum[E] += e;
                 sum[E_X] += e_x;
                 sum[E_XX] = fma(e_x, x_hat, sum[E_XX]);
                 sum[E_U] = fma(e, us[k], sum[E_U]);
                 sum[E_UX] = fma(e_x, us[k], sum[E_UX]);
               }
             }
           },
           [] {});
    }
    double* to = sums + SUMS * ((box.n0 * box.spatial_parts + box.spatial_part) * C + box.c0 + c);
#pragma unroll
    for (int i = 0; i < SUMS; i += 2) {
      const Pair total = team_sum(Pair{sum[i], i + 1 < SUMS ? sum[i + 1 < SUMS ? i + 1 : i] : 0}, team, shared);
      if (c < box.nc && lane == 0) {
        to[i] = total.a;
        if (i + 1 < SUMS) to[i + 1] = total.b;
      }
    }
  }
}
#endif

#ifdef KERNEL_MERGE_SECOND
// One block a group of a sample: its coefficients, in `planes`, and of each of its channels what gweight and gbias are sums of
// over the samples, partial: (N, C, 2), gbias first. channel_sums: (N, C, SUMS), from those of its boxes. The sums over the
// channels do not depend on their order, to the bit, as in merge_labels.
extern "C" __global__ void MERGE_BOUNDS
    merge_second(const int C, const int D, const int G, const int* order, const int* bounds, const int labelled,
                 const int spatial_parts, const int team, const double* sums, PARAMETERS, TANGENTS, double* planes,
                 double* channel_sums, double* partial) {
  double* scratch = shared;
  const long long group = blockIdx.x, n = group / G;
  const int g = (int)(group - n * G), lane = threadIdx.x & (team - 1), teams = blockDim.x / team;
  const int group_channels = labelled ? bounds[g + 1] - bounds[g] : D;
  const auto channel = [&](int k) { return labelled ? order[bounds[g] + k] : g * D + k; };
  for (int first = 0; first < group_channels; first += teams) {
    const int k = first + threadIdx.x / team, c = k < group_channels ? channel(k) : 0;
#pragma unroll
    for (int i = 0; i < SUMS; i += 2) {
      Pair sum = {0, 0};
      if (k < group_channels) {
        for (int p = lane; p < spatial_parts; p += team) {
          const double* q = sums + SUMS * ((n * spatial_parts + p) * C + c);
          sum.a += q[i];
          if (i + 1 < SUMS) sum.b += q[i + 1];
        }
      }
      sum = team_sum(sum, team, scratch);
      if (k < group_channels && lane == 0) {
        channel_sums[SUMS * (n * C + c) + i] = sum.a;
        if (i + 1 < SUMS) channel_sums[SUMS * (n * C + c) + i + 1] = sum.b;
      }
    }
  }
  __syncthreads();  // the sums of all channels are there

  const Planes values = {planes, (long long)gridDim.x};
  const double count = values.at(COUNT, group), rstd = values.at(RSTD, group) * values.at(UNIT, group);
  const auto of = [&](int k) { return channel_sums + SUMS * (n * C + channel(k)); };
  const auto w = [&](int k) { return parameter(weight, weight_dtype, channel(k), 1); };
  const auto dw = [&](int k) { return parameter(tweight, tweight_dtype, channel(k), 0); };
  const auto mean = [&](auto value) { return sum_in_any_order(group_channels, threadIdx.x, blockDim.x, scratch, value) / count; };
  const double u_mean = mean([&](int k) { return of(k)[U]; }), u_along = mean([&](int k) { return of(k)[U_X]; });
  // sums of dz J(u), of gz and of gz x_hat over a channel
  const auto pushed = [&](int k) { return (of(k)[Z_U] - u_mean * of(k)[Z]) - u_along * of(k)[Z_X]; };
  const auto gz = [&](int k) {
    if (!CURVED) return 0.0;
    const double j = (of(k)[CURVED ? E_U : 0] - u_mean * of(k)[CURVED ? E : 0]) - u_along * of(k)[CURVED ? E_X : 0];
    const double db = parameter(tbias, tbias_dtype, channel(k), 0);
    return fma(rstd * w(k), j, fma(dw(k), of(k)[CURVED ? E_X : 0], db * of(k)[CURVED ? E : 0]));
  };
  const auto gz_x_hat = [&](int k) {
    if (!CURVED) return 0.0;
    const double j = (of(k)[CURVED ? E_UX : 0] - u_mean * of(k)[CURVED ? E_X : 0]) - u_along * of(k)[CURVED ? E_XX : 0];
    const double db = parameter(tbias, tbias_dtype, channel(k), 0);
    return fma(rstd * w(k), j, fma(dw(k), of(k)[CURVED ? E_XX : 0], db * of(k)[CURVED ? E_X : 0]));
  };
  for (int k = threadIdx.x; k < group_channels; k += blockDim.x) {
    partial[2 * (n * C + channel(k))] = gz(k);
    partial[2 * (n * C + channel(k)) + 1] = fma(rstd, pushed(k), gz_x_hat(k));
  }
  const double q_mean = mean([&](int k) { return w(k) * of(k)[Z]; });
  const double q_along = mean([&](int k) { return w(k) * of(k)[Z_X]; });
  const double cross = mean([&](int k) { return w(k) * pushed(k); });
  const double f_mean = mean([&](int k) { return fma(dw(k), of(k)[Z], w(k) * gz(k)); });
  const double f_along = mean([&](int k) { return fma(dw(k), of(k)[Z_X], w(k) * gz_x_hat(k)); });
  if (threadIdx.x == 0) {
    const double found[] = {u_mean, u_along, q_mean, q_along, cross, f_mean, f_along};
#pragma unroll
    for (int i = 0; i < 7; ++i) values.at((Plane)(U_MEAN + i), group) = found[i];
  }
}
#endif

// The operation `apply` of the gradients of dy (OF_X false) and of x. What a channel needs is looked up for each element where
// a vector may have more than two of them: it would not fit in registers.
template <bool OF_X> struct Second {
  const SecondTiles& tiles;
  const SecondWork& work;
  const Mask mask;
  const Box& box;
  const Grouping grouping;

  struct Full {
    double high, low, rstd, unit, u_mean, weight, bias;
    double u, x_hat, constant;             // gdz = u (u - u_mean) + x_hat x_hat + constant
    double dz, bend, of_u, of_x_hat, of_1;  // gx = dz dz + bend gz + used (of_u (u - u_mean) + of_x_hat x_hat + of_1)
  };
  struct Index {
    int u, c;
  };
  template <bool FEW, class Nothing = void> struct Choice { typedef Full Entry; };
  template <class Nothing> struct Choice<false, Nothing> { typedef Index Entry; };
  typedef typename Choice<ENTRIES <= 2>::Entry Entry;
  typedef int Group;
  typedef int Scale;
  typedef int ExactGroup;
  struct Input {};
  template <int K> struct Values {
    Pack<x_t, K> x, dy, u;
    bool used[K];
  };
  static constexpr int UNROLL = 1;

  __device__ __forceinline__ int group(int u) const { return u; }
  __device__ __forceinline__ int scale(int c) const { return c; }
  __device__ __forceinline__ Full full(int u, int c) const {
    const SecondGroup g = work.group(u);
    const double w = work.channel(0, c), ddw = work.channel(2, c);
    return {g.high, g.low, g.rstd, g.unit, g.u_mean, w, work.channel(1, c),
            g.true_rstd * w, fma(-g.true_rstd * w, g.u_along, ddw), work.channel(3, c),
            g.true_rstd * fma(-g.true_rstd * g.u_along, w, ddw), g.true_rstd * w, g.u, g.x, g.constant};
  }
  __device__ __forceinline__ Entry entry(int u, int c) const {
    if constexpr (ENTRIES <= 2) return full(u, c);
    else return {u, c};
  }
  static constexpr bool FEW_REGISTERS = false;
  __device__ __forceinline__ bool all_slow() const { return false; }
  __device__ __forceinline__ bool slow(const Entry&) const { return false; }
  __device__ __forceinline__ int exact_group(int u) const { return u; }
  template <int K> __device__ __forceinline__ double exact(int, int, const Values<K>&, int) const { return 0; }
  __device__ __forceinline__ Input input(int, int) const { return {}; }
  __device__ __forceinline__ bool rows_aligned() const { return true; }
  __device__ __forceinline__ bool aligned_at(const Input&, int) const { return true; }
  template <int K> __device__ __forceinline__ void load(Values<K>& values, const Input&, int, int n, int r, int q, bool) const {
    const auto pack = [&](const Shared<x_t>& from) {
      const x_t* p = from.data + from.index(n, r, q);
      return load_pack<x_t, K>(p, (size_t)p % (K * sizeof(x_t)) == 0);
    };
    values.x = pack(tiles.x);
    values.dy = pack(tiles.dy);
    values.u = pack(tiles.u);
#pragma unroll
    for (int k = 0; k < K; ++k) values.used[k] = mask.at(n, r, q + k);
  }
  template <int K> __device__ __forceinline__ double fast(const Entry& entry, const Values<K>& values, int k) const {
    Full e;
    if constexpr (ENTRIES <= 2) e = entry;
    else e = full(entry.u, entry.c);
    const double x_hat = centred(e, to_real<X_DTYPE>(values.x.element[k])) * e.rstd, z = fma(x_hat, e.weight, e.bias);
    const double dy = to_real<X_DTYPE>(values.dy.element[k]), du = to_real<X_DTYPE>(values.u.element[k]) - e.u_mean;
    const double gdz = fma(e.u, du, fma(e.x_hat, x_hat, e.constant)), act = ACTIVATION == IDENTITY ? 1 : slope(z);
    if (!OF_X) return gdz * act;
    const double of_group = values.used[k] ? fma(e.of_u, du, fma(e.of_x_hat, x_hat, e.of_1)) : 0;
    const double of_dz = fma(e.dz, dy * act, of_group);
    if constexpr (CURVED) return fma(e.bend, gdz * dy * curvature(z), of_dz);
    else return of_dz;
  }
};

#ifdef KERNEL_SECOND_APPLY
// One block a box: x, dy and u read once, the gradients of dy and of x written once, under statistics and coefficients in
// `planes`.
extern "C" __global__ void SECOND_BOUNDS
    second_apply(BOX_PARAMETERS, SECOND_INPUTS, PARAMETERS, TANGENTS, double* planes, const int G, const int* labels,
                 const int labelled, y_t* gdy, const long long gdy_sn, const long long gdy_so, y_t* gx, const long long gx_sn,
                 const long long gx_so MASK_PARAMETERS) {
  const SecondWork work(samples, rows, channels, columns, max(1, channels / D), pitch, flat);
  const Box box(BOX_ARGUMENTS, blockIdx.x);
  const SecondTiles tiles(work, {x, x_sn, x_so, box, inner}, {dy, dy_sn, dy_so, box, inner}, {ddx, ddx_sn, ddx_so, box, inner}, box);
  work.fill_channels(box, SECOND_PARAMETERS);
  for_each_group(box, G, labels, labelled, [&](int u, long long group) {
    const Planes values = {planes, N * G};
    const auto value = [&](SecondPlane plane) { return values.at((Plane)plane, group); };
    const Statistic statistic = statistic_of(values, group);
    work.set_statistic(u, statistic);
    const bool alone = !MASKED && values.at(COUNT, group) == 1;  // the only element cannot move against its mean: gx is zero
    const double r = alone ? 0 : statistic.rstd * statistic.unit;
    work.group(4, u) = r;
    work.group(5, u) = value(U_MEAN);
    work.group(6, u) = value(U_ALONG);
    work.group(7, u) = r * (r * (2 * (value(U_ALONG) * value(Q_ALONG)) - value(CROSS)) - value(F_ALONG));
    work.group(8, u) = -r * (r * value(Q_ALONG));
    work.group(9, u) = r * (r * (value(U_ALONG) * value(Q_MEAN)) - value(F_MEAN));
  });
  Mask mask = {};
#if MASKED
  mask.fill(work.mask, where, where_sn, where_so, where_sc, where_si, box);
#endif
  copies_arrived();
  __syncthreads();
  apply(Second<false>{tiles, work, mask, box, Grouping(box)}, Global<y_t>(gdy, gdy_sn, gdy_so, box, inner), box);
  apply(Second<true>{tiles, work, mask, box, Grouping(box)}, Global<y_t>(gx, gx_sn, gx_so, box, inner), box);
}
#endif
