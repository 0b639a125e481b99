// The box of a block: which part of an (N, outer, C, inner) array it holds, how it is brought into shared memory, walked
// through by teams of threads, and written back.
//
// A box spans `samples` x `rows` (of outer) x `channels` x `columns` (of inner); a row of it is `channels * columns`
// contiguous elements (columns == inner where channels > 1). It holds whole groups, or a part of one. Channels-first is
// outer == 1, channels-last inner == 1. `flat` boxes are one contiguous stretch of memory. Global memory is touched in
// aligned 16-byte vectors whatever the sizes; a vector across the edge of the box goes element by element.
//
// The order of every sum is fixed by the position in the box, never by an address: the same bits at any alignment.

// Launch bounds: threads of a block, and blocks that a multiprocessor is to hold (which leaves 65536 / (threads * blocks)
// registers). None of them makes a kernel spill, over all options and architectures. The kernels that go over a split group
// have three blocks where that allows it: 12 KB of reads in flight, and sm_90 needs 8 to read and write at the memory's speed.
#define FORWARD_BOUNDS __launch_bounds__(512, 1)
#define MOMENTS_BOUNDS __launch_bounds__(256, 3)
#define HEAVY (ACTIVATION == GELU || (REAL_IS_DOUBLE && ACTIVATION != IDENTITY))  // erfc, and exp in float64
#define APPLY_BOUNDS \
  __launch_bounds__(256, HEAVY || (VECTOR_CHANNELS > 1 && REAL_IS_DOUBLE) || (VECTOR_CHANNELS > 2 && X_DTYPE != FLOAT32) ? 2 : 3)
#define MORE_THAN_SUMS (TANGENT || MASKED || ACTIVATION != IDENTITY)
#define BACKWARD_BOUNDS \
  __launch_bounds__(256, REAL_IS_DOUBLE || SINGLE || MORE_THAN_SUMS || (VECTOR_CHANNELS > 2 && Y_DTYPE < FLOAT32) ? 1 : 2)
#define BACKWARD_SUMS_BOUNDS __launch_bounds__(256, HEAVY ? 1 : 2)
#define BACKWARD_APPLY_BOUNDS \
  __launch_bounds__(256, HEAVY || (VECTOR_CHANNELS > 2 && Y_DTYPE < FLOAT32 && MORE_THAN_SUMS) ? 1 : 2)
#define SECOND_BOUNDS __launch_bounds__(256, 1)
#define MERGE_BOUNDS __launch_bounds__(256, 1)

#if MASKED
#define MASK_PARAMETERS \
  , const unsigned char *where, const long long where_sn, const long long where_so, const long long where_sc, const long long where_si
#else
#define MASK_PARAMETERS
#endif

extern __shared__ __align__(16) double shared[];

// Bytes of a box of elements of type T in shared memory, a multiple of 16.
template <class T> __device__ __forceinline__ int box_bytes(int samples, int rows, int width, int pitch, int flat) {
  constexpr int V = 16 / sizeof(T);
  return flat ? ((samples * rows * width + 2 * V - 2) / V) * 16 : samples * rows * pitch * (int)sizeof(T);
}

__device__ __forceinline__ unsigned char* align_16(unsigned char* p) {  // p lies in `shared`, whose base is aligned
  unsigned char* base = reinterpret_cast<unsigned char*>(shared);
  return base + ((p - base) + 15) / 16 * 16;
}

// Position of the block's box in the array; same for every kernel. See config.Box for the meaning of the sizes.
#define BOX_PARAMETERS                                                                                               \
  const long long N, const long long outer, const int C, const long long inner, const int D, const int samples,      \
      const int rows, const int channels, const int columns, const int row_tiles, const int channel_tiles,           \
      const int column_tiles, const int pitch, const int flat
#define BOX_ARGUMENTS \
  N, outer, C, inner, D, samples, rows, channels, columns, row_tiles, channel_tiles, column_tiles, pitch, flat

// Quotient of small integers (0 <= n < 2^21) by a float multiplication: (n + 1/2) / d is at least 1 / (2d) away from an
// integer, which is more than the rounding of the product. An integer division costs five times as much.
struct Divisor {
  float inverse;
  __device__ __forceinline__ Divisor(int d) : inverse(1.0f / (float)d) {}
  __device__ __forceinline__ int quotient(int n) const { return (int)(((float)n + 0.5f) * inverse); }
};

struct Box {
  long long n0, o0, i0;  // first sample, row and column
  int ns, nr, nc, ncol;  // samples, rows, channels, columns: clipped at the array's end
  int c0;                // first channel
  int width;             // contiguous elements of a row
  int pitch, flat;       // elements from row to row in shared memory, unless flat
  int groups, run;       // groups of a sample in the box, contiguous elements of a group in a row
  int group_channels;    // channels of a group in the box
  int g0, part, parts;   // first group; which part of its groups the box is, of how many
  int spatial_part, spatial_parts;  // the same for its channels

  // `tile` counts boxes: columns fastest, then channels, rows, samples (the order of memory).
  __device__ __forceinline__ Box(BOX_PARAMETERS, unsigned tile) : pitch(pitch), flat(flat) {
    const int column_tile = (int)(tile % column_tiles);
    tile /= column_tiles;
    const int channel_tile = (int)(tile % channel_tiles);
    tile /= channel_tiles;
    const int row_tile = (int)(tile % row_tiles);
    n0 = (long long)(tile / row_tiles) * samples;
    o0 = (long long)row_tile * rows;
    i0 = (long long)column_tile * columns;
    const int tiles_of_group = channels >= D ? 1 : (D + channels - 1) / channels, k = channel_tile % tiles_of_group;
    c0 = tiles_of_group == 1 ? channel_tile * channels : channel_tile / tiles_of_group * D + k * channels;
    nc = min(channels, (tiles_of_group == 1 ? C : (channel_tile / tiles_of_group + 1) * D) - c0);
    ns = (int)min((long long)samples, N - n0);
    nr = (int)min((long long)rows, outer - o0);
    ncol = (int)min((long long)columns, inner - i0);
    width = nc * ncol;
    group_channels = min(nc, D);
    groups = nc / group_channels;
    run = group_channels * ncol;
    g0 = c0 / D;
    spatial_part = row_tile * column_tiles + column_tile;
    spatial_parts = row_tiles * column_tiles;
    part = spatial_part * tiles_of_group + k;
    parts = spatial_parts * tiles_of_group;
  }
  // Contiguous stretches of memory that make up the box, and the elements of one.
  __device__ __forceinline__ int segments() const { return flat ? 1 : ns * nr; }
  __device__ __forceinline__ int segment_length() const { return flat ? ns * nr * width : width; }
};

// A box of an array in global memory.
template <class T> struct Global {
  T* origin;         // element (0, 0, 0) of the box
  long long sn, so;  // strides of samples and rows, in elements
  __device__ __forceinline__ Global(T* base, long long sn, long long so, const Box& box, long long inner)
      : origin(base + box.n0 * sn + box.o0 * so + box.c0 * inner + box.i0), sn(sn), so(so) {}
  __device__ __forceinline__ T* row(int n, int r) const { return origin + n * sn + r * so; }
};

template <class T> __device__ __forceinline__ int elements_past_16_bytes(const T* p) {
  return (int)((size_t)p / sizeof(T) % (16 / sizeof(T)));
}

// A box in shared memory. Each stretch keeps its distance from a 16-byte boundary, so that vectors stay vectors.
template <class T> struct Shared {
  T* data;
  int head, step_n, step_r;  // that distance at (0, 0), and how it changes from sample to sample and row to row
  int pitch, flat, width, nr;
  static constexpr int V = 16 / sizeof(T);

  __device__ __forceinline__ Shared(T* data, const Global<const T>& from, const Box& box)
      : data(data), head(elements_past_16_bytes(from.origin)), step_n((int)(from.sn & (V - 1))),
        step_r((int)(from.so & (V - 1))), pitch(box.pitch), flat(box.flat), width(box.width), nr(box.nr) {}

  __device__ __forceinline__ int head_of(int n, int r) const { return (head + n * step_n + r * step_r) & (V - 1); }
  // Index of an element of row r of sample n; 16-byte aligned where it is a multiple of V.
  __device__ __forceinline__ int index(int n, int r, int q) const {
    const int s = n * nr + r;
    return flat ? head + s * width + q : s * pitch + head_of(n, r) + q;
  }
  __device__ __forceinline__ const T* row(int n, int r) const { return data + index(n, r, 0); }

  // Bring the box in: every byte is read once, four vectors of a thread in flight.
  __device__ void fill(const Global<const T>& from, const Box& box) {
    const int segments = box.segments(), length = box.segment_length();
    const bool aligned = head == 0 && (segments == 1 || ((step_n | step_r) == 0)) && length % V == 0;
    const int vectors = aligned ? length / V : (length + 2 * V - 2) / V, count = segments * vectors;
    const Divisor by_vectors(vectors), by_rows(nr);
    constexpr int UNROLL = 4;
    for (int first = threadIdx.x; first < count; first += UNROLL * blockDim.x) {
      Pack<T, V> pack[UNROLL];
      int to[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const int v = first + u * blockDim.x;
        to[u] = -1;
        if (v < count) {
          const int s = segments == 1 ? 0 : by_vectors.quotient(v), n = box.ns == 1 ? 0 : by_rows.quotient(s);
          const int r = s - n * nr, j = v - s * vectors, e = j * V - head_of(n, r);
          if (e >= 0 && e + V <= length) {
            to[u] = (flat ? 0 : s * pitch) + j * V;
            pack[u] = load_pack<T, V>(from.row(n, r) + e, true);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        if (to[u] >= 0) *reinterpret_cast<uint4*>(data + to[u]) = pack[u].word;
      }
    }
    if (aligned) return;
    for (int v = threadIdx.x; v < segments * 2 * V; v += blockDim.x) {  // the ends of each stretch
      const int s = v / (2 * V), n = box.ns == 1 ? 0 : by_rows.quotient(s), r = s - n * nr, start = head_of(n, r);
      const int edge = v & (2 * V - 1), past = (start + length) & (V - 1);  // elements after the last whole vector
      const int e = edge < V ? edge - start : start > 0 && start + length < V ? length : length - past + edge - V;
      const int end = edge < V ? min(start == 0 ? 0 : V - start, length) : length;
      if (e >= 0 && e < end) data[index(n, r, e)] = from.row(n, r)[e];
    }
  }
};

// Elements for which `where` is True, one byte each, in the logical order of the box.
struct Mask {
  const unsigned char* data;
  int width, nr;
#if MASKED
  __device__ __forceinline__ bool at(int n, int r, int q) const { return data[(n * nr + r) * width + q] != 0; }
  __device__ void fill(unsigned char* to, const unsigned char* where, long long sn, long long so, long long sc,
                       long long si, const Box& box) {
    data = to;
    width = box.width;
    nr = box.nr;
    const int count = box.ns * box.nr * box.width;
    const Divisor by_width(box.width), by_columns(box.ncol), by_rows(box.nr);
    for (int e = threadIdx.x; e < count; e += blockDim.x) {
      const int s = by_width.quotient(e), q = e - s * width, c = by_columns.quotient(q), n = by_rows.quotient(s);
      to[e] = where[(box.n0 + n) * sn + (box.o0 + s - n * nr) * so + (box.c0 + c) * sc + (box.i0 + q - c * box.ncol) * si];
    }
  }
#else
  __device__ __forceinline__ bool at(int, int, int) const { return true; }
#endif
};

// K = 1 element, or a vector of them that starts at a multiple of it in the box, from shared memory.
template <int DTYPE, int K, class T>
__device__ __forceinline__ void read(const Shared<T>& from, int n, int r, int q, real (&v)[K]) {
  const int at = from.index(n, r, q);
  const Pack<T, K> pack = load_pack<T, K>(from.data + at, K == 1 || at % K == 0);
#pragma unroll
  for (int k = 0; k < K; ++k) v[k] = to_real<DTYPE>(pack.element[k]);
}
// ---- teams: `team` neighbouring threads (a power of two; up to the block) that work on one unit

struct Pair {
  double a, b;
};

// Doubles that a block needs in shared memory for team_sum and team_max: two for each warp.
constexpr int MOST_WARPS = 32, SCRATCH = 2 * MOST_WARPS;

// Sum over a team, the same bits in each of its threads; the order depends on `team` alone. Called by the whole block.
__device__ __forceinline__ Pair sum_of_lanes(Pair v, int lanes) {
  for (int offset = lanes >> 1; offset > 0; offset >>= 1) {
    v.a += __shfl_xor_sync(0xffffffffu, v.a, offset);
    v.b += __shfl_xor_sync(0xffffffffu, v.b, offset);
  }
  return v;
}
__device__ __forceinline__ Pair team_sum(Pair v, int team, double* scratch) {
  v = sum_of_lanes(v, min(team, 32));
  if (team > 32) {
    __syncthreads();  // the scratch may still be being read
    const int warp = threadIdx.x >> 5, warps = team >> 5;
    if ((threadIdx.x & 31) == 0) {
      scratch[warp] = v.a;
      scratch[MOST_WARPS + warp] = v.b;
    }
    __syncthreads();
    // Each lane reads the sum of one warp of the team: were all read by all, it would cost more than a small group itself.
    const int other = (warp & -warps) + (threadIdx.x & (warps - 1));
    v = sum_of_lanes({scratch[other], scratch[MOST_WARPS + other]}, warps);
  }
  return v;
}

__device__ __forceinline__ double max_of_lanes(double v, int lanes) {
  for (int offset = lanes >> 1; offset > 0; offset >>= 1) v = fmax(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}
__device__ __forceinline__ double team_max(double v, int team, double* scratch) {
  v = max_of_lanes(v, min(team, 32));
  if (team > 32) {
    __syncthreads();
    const int warp = threadIdx.x >> 5, warps = team >> 5;
    if ((threadIdx.x & 31) == 0) scratch[warp] = v;
    __syncthreads();
    v = max_of_lanes(scratch[(warp & -warps) + (threadIdx.x & (warps - 1))], warps);
  }
  return v;
}

// Sum of value(0), ..., value(count - 1) over a team, the same bits in whatever order the values stand: each is cut into a
// multiple of a step so large that no sum of them rounds, and once more for what is left. Error: 2^-100 of the largest.
template <class Value> __device__ __forceinline__ double sum_in_any_order(int count, int lane, int team, double* scratch, Value value) {
  double largest = 0;
  for (int i = lane; i < count; i += team) largest = fmax(largest, fabs(value(i)));
  largest = team_max(largest, team, scratch);
  // Powers of two above the largest value times the count, and what is left of a value after the first cut times the count.
  const double room = ldexp(1.0, 33 - __clz(count)), first = 1.5 * room * ldexp(1.0, ilogb(fmax(largest, 0x1p-900)) + 1);
  const double second = first * room * 0x1p-52;
  Pair sums = {0, 0};
  for (int i = lane; i < count; i += team) {
    const double v = value(i), cut = (v + first) - first, rest = v - cut;
    sums.a += cut;
    sums.b += (rest + second) - second;
  }
  sums = team_sum(sums, team, scratch);
  return sums.a + sums.b;
}

// The unit that is number i of `units`, each a run of elements in shared memory. Runs of an odd number of 2-byte elements are
// taken every second first, if they are long: of neighbours 17.5 words apart two would begin in each bank.
__device__ __forceinline__ int in_turn(int i, int units, int run) {
  if (sizeof(x_t) != 2 || run % 2 == 0 || run < 16 || i >= units) return i;
  const int half = (units + 1) / 2;
  return i < half ? 2 * i : 2 * (i - half) + 1;
}

// Whether it holds for any thread that shares a barrier with this one: a warp for small teams, else the block.
__device__ __forceinline__ bool any_of_team(bool v, int team) {
  return team > 32 ? __syncthreads_or(v) != 0 : __any_sync(0xffffffffu, v) != 0;
}

template <int K> struct Count {
  static constexpr int value = K;
};

// Elements that go into one float32 sum before it is added to a float64 one. Four for float32 keep the worst rounding of
// a sum at 2 units in the last place, for half a float64 operation an element; the 16-bit types, with twice the elements
// and 1/8000 of the accuracy to keep, take 16.
constexpr int SHORT_RUN = X_DTYPE == FLOAT32 ? 4 : 16;

// The elements of `rows` rows, `run` contiguous ones in each, dealt to the threads of a team in chunks of a vector (where
// the run is a whole number of them) or one by one. body(Count<K>, row, first) takes K elements; flush() closes a short run.
template <int V, class Body, class Flush>
__device__ __forceinline__ void deal(int rows, int run, int lane, int team, Body body, Flush flush) {
  const int per_row = run / V, count = rows * per_row;
  const Divisor by_row(per_row);
  for (int j = lane; j < count;) {
    for (int u = 0; u < SHORT_RUN / V && j < count; ++u, j += team) {
      const int r = rows == 1 ? 0 : by_row.quotient(j);
      body(Count<V>(), r, (j - r * per_row) * V);
    }
    flush();
  }
}

// The same elements one by one, where speed does not matter: body(row, element).
template <class Body> __device__ __forceinline__ void walk_slowly(int rows, int run, int lane, int team, Body body) {
  const Divisor by_run(run);
  for (int j = lane; j < rows * run; j += team) {
    const int r = by_run.quotient(j);
    body(r, j - r * run);
  }
}

template <class Body, class Flush>
__device__ __forceinline__ void walk(int rows, int run, int lane, int team, Body body, Flush flush) {
  if (run % VX == 0) deal<VX>(rows, run, lane, team, body, flush);
  else deal<1>(rows, run, lane, team, body, flush);
}

// ---- writing: every element of the box through an operation that depends on its channel

// A place in the box: sample, row, channel, column.
struct Place {
  int n, r, c, i;
  __device__ __forceinline__ void step(const Box& box) {
    if (++i == box.ncol) {
      i = 0;
      if (++c == box.nc) {
        c = 0;
        if (++r == box.nr) r = 0, ++n;
      }
    }
  }
};

// Op: Input (where a row's elements come from), Values<K> (K of them), Entry (what a channel of a sample needs), Group (the part
// of it that its group needs), and unit(n, c), group(unit), entry(group, c), slow(entry), fast(entry, values, k); for slow
// entries the same in float64, ExactGroup, exact_group(unit) and exact(group, c, values, k). An entry is looked up once for as
// long as a thread stays in its channels: for good in channels-last, where a few threads may have nothing to do for it, once
// a vector elsewhere.
//
// VECTOR_CHANNELS: channels that an aligned vector of the output lies in at most. 1, 2 (a channel's run is at least a
// vector), or 16 for any number.
constexpr int ENTRIES = VECTOR_CHANNELS < VY ? VECTOR_CHANNELS : VY;
// 16-bit elements in float64 arithmetic (float64 weights): eight entries would be 96 registers. They are looked up one by one;
// so are the four of float32 where erfc takes the registers.
#if REAL_IS_DOUBLE && ACTIVATION == GELU
constexpr bool KEPT = ENTRIES <= 2;
#else
constexpr bool KEPT = !(REAL_IS_DOUBLE && ENTRIES > 4);
#endif

template <class Op> __device__ __forceinline__ void apply(const Op& op, const Global<y_t>& out, const Box& box) {
  typename Op::Entry entry[ENTRIES];
  int known = -1;  // sample and position in a row that the entries belong to
  const int segments = box.segments(), length = box.segment_length();
  const int head0 = elements_past_16_bytes(out.origin), step = (int)((out.sn | out.so) & (VY - 1));
  const bool aligned = head0 == 0 && (segments == 1 || step == 0) && length % VY == 0;
  const int vectors = aligned ? length / VY : (length + 2 * VY - 2) / VY, count = segments * vectors;
  const Divisor by_vectors(vectors), by_rows(box.nr), by_width(box.width), by_columns(box.ncol);
  // A step of whole rows, if it leaves few threads without work: 255 of 256 for rows of 30 channels of 2 bytes.
  int stride = blockDim.x;
  if (ENTRIES > 2) {
    const int rows_of_vectors = box.flat ? box.width / min(box.width & -box.width, VY) : vectors;
    const int whole = stride / rows_of_vectors * rows_of_vectors;
    if (8 * whole >= 7 * stride) stride = whole;
  }
  for (int v = threadIdx.x < stride ? threadIdx.x : count; v < count; v += stride) {
    int s = segments == 1 ? 0 : by_vectors.quotient(v);
    Place place;
    place.n = box.ns == 1 || box.flat ? 0 : by_rows.quotient(s);
    place.r = box.flat ? 0 : s - place.n * box.nr;
    y_t* to = out.row(place.n, place.r);
    const typename Op::Input from = op.input(place.n, place.r);
    const int e = (v - s * vectors) * VY - elements_past_16_bytes(to), first = max(e, 0), last = min(e + VY, length);
    int q = first;
    if (box.flat) {
      s = by_width.quotient(first);
      q = first - s * box.width;
      place.n = box.ns == 1 ? 0 : by_rows.quotient(s);
      place.r = s - place.n * box.nr;
    }
    place.c = by_columns.quotient(q);
    place.i = q - place.c * box.ncol;
    if (first == e && last == e + VY) {
      // Elements of the vector in its first channel.
      const int here = ENTRIES == 2 ? box.ncol - place.i : VY;
      // The entries of a vector that ends in another sample are not kept.
      const bool one_sample = box.ns == 1 || (box.nr - place.r) * box.width - q >= VY;
      const int position = ENTRIES == 1 ? place.n * box.nc + place.c : one_sample ? place.n * box.width + q : -1;
      if (KEPT && (position < 0 || position != known)) {
        known = position;
        Place next = place;
        typename Op::Group group;
        int unit = -1;  // whose it is
#pragma unroll
        for (int k = 0; k < ENTRIES; ++k) {
          const int other = op.unit(next.n, next.c);
          if (other != unit) group = op.group(unit = other);
          entry[k] = op.entry(group, next.c);
          if (k + 1 < ENTRIES) {
            if (ENTRIES == 2) next.i = here < VY ? box.ncol - 1 : next.i - 1;  // to the next channel, if it gets there
            next.step(box);
          }
        }
      }
      bool plain = KEPT;
#pragma unroll
      for (int k = 0; k < (KEPT ? ENTRIES : 0); ++k) plain = plain && !op.slow(entry[k]);
      typename Op::template Values<VY> values;
      op.load(values, from, e, place.n, place.r, q);
      Pack<y_t, VY> pack;
      const auto kept = [&](int k) { return ENTRIES == 2 && k >= here ? entry[ENTRIES - 1] : entry[ENTRIES == VY ? k : 0]; };
      if (plain) {
#pragma unroll
        for (int k = 0; k < VY; ++k) pack.element[k] = from_real<Y_DTYPE>(op.fast(kept(k), values, k));
      } else {
        // Groups of single elements are small, and small ones are all slow: what is known is kept. Elsewhere it takes registers.
        constexpr bool LOOK_UP = !SINGLE;
        typename Op::Group group;
        typename Op::ExactGroup exact_group;
        int unit = -1;  // whose they are
#pragma unroll
        for (int k = 0; k < VY; ++k) {
          const int other = op.unit(place.n, place.c);
          if (LOOK_UP || other != unit) {
            if (LOOK_UP || !KEPT) group = op.group(other);
            if (!LOOK_UP) exact_group = op.exact_group(other);
            unit = other;
          }
          const typename Op::Entry one = LOOK_UP || !KEPT ? op.entry(group, place.c) : kept(k);
          if (op.slow(one)) {
            if (LOOK_UP) exact_group = op.exact_group(unit);
            pack.element[k] = from_double<Y_DTYPE>(op.exact(exact_group, place.c, values, k));
          } else {
            pack.element[k] = from_real<Y_DTYPE>(op.fast(one, values, k));
          }
          place.step(box);
        }
      }
      store_pack<y_t, VY>(to + e, pack, true);
    } else {
      for (int k = first; k < last; ++k) {
        const typename Op::Entry one = op.entry(op.group(op.unit(place.n, place.c)), place.c);
        typename Op::template Values<1> values;
        op.load(values, from, k, place.n, place.r, place.c * box.ncol + place.i);
        to[k] = op.slow(one) ? from_double<Y_DTYPE>(op.exact(op.exact_group(op.unit(place.n, place.c)), place.c, values, 0))
                             : from_real<Y_DTYPE>(op.fast(one, values, 0));
        place.step(box);
      }
    }
  }
}
