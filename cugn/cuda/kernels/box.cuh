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
// registers). None of them makes a kernel spill (CUGN_EVERY_KERNEL=once). The kernels that go over a split group
// have three blocks where that allows it: 12 KB of reads in flight, and sm_90 needs 8 to read and write at the memory's speed.
#define FORWARD_BOUNDS __launch_bounds__(LABELLED ? 256 : 512, 1)
#define MOMENTS_BOUNDS __launch_bounds__(256, REAL_IS_DOUBLE && (X_DTYPE == INT8 || X_DTYPE == UINT8) ? 2 : 3)
#define HEAVY (ACTIVATION == GELU || (REAL_IS_DOUBLE && ACTIVATION != IDENTITY))  // erfc, and exp in float64
#define APPLY_BOUNDS \
  __launch_bounds__(256, HEAVY || (VECTOR_CHANNELS > 1 && (REAL_IS_DOUBLE || X_DTYPE > FLOAT64)) || (VECTOR_CHANNELS > 2 && (X_DTYPE != FLOAT32 || ACTIVATION != IDENTITY)) ? 2 : 3)
#define MORE_THAN_SUMS (TANGENT || MASKED || ACTIVATION != IDENTITY)
// As config._has_many_threads.
#define LARGE_BACKWARD (!REAL_IS_DOUBLE && VECTOR_CHANNELS <= 2 && !TANGENT && (X_DTYPE == FLOAT32 || ACTIVATION <= RELU))
#define BACKWARD_BOUNDS \
  __launch_bounds__(LARGE_BACKWARD ? 512 : 256, LARGE_BACKWARD || REAL_IS_DOUBLE || SINGLE || MORE_THAN_SUMS ? 1 : 2)
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
// Label groups of `forward` and `backward`, whose box then holds whole samples, a channel in each element: the number of the
// groups, the group of each channel, the channels in the order of the groups, and the bounds of the groups in that.
#if LABELLED
#define LABEL_PARAMETERS , const int label_groups, const int *labels, const int *order, const int *bounds
#define LABELS_OF(box) (box, label_groups, labels, order, bounds)
#else
#define LABEL_PARAMETERS
#define LABELS_OF(box) (box)
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

// Number i of things that lie in rows of `per_row`, as (row, place in the row), from one to the one `step` further on: two
// additions, where a quotient for each would be conversions.
struct Stepper {
  int row, place;
  int rows, places, per_row;  // of a step; of a row
  __device__ __forceinline__ Stepper(int i, int step, int per_row) : per_row(per_row) {
    const Divisor by_row(per_row);
    row = by_row.quotient(i);
    place = i - row * per_row;
    rows = by_row.quotient(step);
    places = step - rows * per_row;
  }
  __device__ __forceinline__ void next() {
    row += rows;
    place += places;
    if (place >= per_row) {
      place -= per_row;
      ++row;
    }
  }
};

struct Box {
  long long n0, o0, i0;  // first sample, row and column
  int ns, nr, nc, ncol;  // samples, rows, channels, columns: clipped at the array's end
  int samples;           // not clipped: the batch decides no order of a sum
  int c0;                // first channel
  int width;             // contiguous elements of a row
  int pitch, flat;       // elements from row to row in shared memory, unless flat
  int groups, run;       // groups of a sample in the box, contiguous elements of a group in a row
  int group_channels;    // channels of a group in the box
  int g0, part, parts;   // first group; which part of its groups the box is, of how many
  int spatial_part, spatial_parts;  // the same for its channels

  // `tile` counts boxes: columns fastest, then channels, rows, samples (the order of memory).
  __device__ __forceinline__ Box(BOX_PARAMETERS, unsigned tile) : samples(samples), pitch(pitch), flat(flat) {
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

// Which channels of the box make a group: neighbours, or those of a label.
struct Grouping {
  int groups;  // of a sample
#if LABELLED
  const int *labels, *order, *bounds;
  __device__ __forceinline__ Grouping(const Box&, int groups, const int* labels, const int* order, const int* bounds)
      : groups(groups), labels(labels), order(order), bounds(bounds) {}
  __device__ __forceinline__ int of(int c) const { return labels[c]; }
  __device__ __forceinline__ int channels(int g) const { return bounds[g + 1] - bounds[g]; }
  __device__ __forceinline__ int channel(int g, int k) const { return order[bounds[g] + k]; }
#else
  int group_channels;
  Divisor by_group;
  __device__ __forceinline__ Grouping(const Box& box)
      : groups(box.groups), group_channels(box.group_channels), by_group(box.group_channels) {}
  __device__ __forceinline__ int of(int c) const { return groups == 1 ? 0 : by_group.quotient(c); }
  __device__ __forceinline__ int channels(int) const { return group_channels; }
  __device__ __forceinline__ int channel(int g, int k) const { return g * group_channels + k; }
#endif
  // The group among those of the box, of channel c of sample n.
  __device__ __forceinline__ int unit(int n, int c) const { return n * groups + of(c); }
};

template <class T> __device__ __forceinline__ int elements_past_16_bytes(const T* p) {
  return (int)((size_t)p / sizeof(T) % (16 / sizeof(T)));
}

// A box of an array in global memory.
template <class T> struct Global {
  static constexpr bool FAR = true;  // loads take long: several are to be in flight
  T* origin;         // element (0, 0, 0) of the box
  long long sn, so;  // strides of samples and rows, in elements
  __device__ __forceinline__ Global(T* base, long long sn, long long so, const Box& box, long long inner)
      : origin(base + box.n0 * sn + box.o0 * so + box.c0 * inner + box.i0), sn(sn), so(so) {}
  __device__ __forceinline__ T* row(int n, int r) const { return origin + n * sn + r * so; }
  // Whether every row begins at a multiple of 16 bytes.
  __device__ __forceinline__ bool rows_aligned() const {
    return elements_past_16_bytes(origin) == 0 && ((int)(sn | so) & (16 / (int)sizeof(T) - 1)) == 0;
  }
};

// A vector to any place in shared memory, in words where there are some. Lanes 8 apart begin with different ones: all of them
// would write to the same eight banks otherwise.
template <class T, int V> __device__ __forceinline__ void store_anywhere(T* p, const Pack<T, V>& pack) {
  if constexpr (sizeof(T) == 2 || sizeof(T) == 4) {
    constexpr int OF_WORD = 4 / sizeof(T);
    const int odd = elements_past_16_bytes(p) & (OF_WORD - 1), first = threadIdx.x >> 3 & 3;
    unsigned words[4];  // of an odd place three, the first and the last element beside them
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const T* from = pack.element + k * OF_WORD;
      const unsigned even_word = word_of(from);
      words[k] = k < 3 && odd ? word_of(from + (OF_WORD - 1)) : even_word;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int j = (first + k) & 3;
      const unsigned word = j == 0 ? words[0] : j == 1 ? words[1] : j == 2 ? words[2] : words[3];
      if (!odd || j < 3) {
        *reinterpret_cast<unsigned*>(p + j * OF_WORD + odd) = word;
      } else {
        p[0] = pack.element[0];
        p[V - 1] = pack.element[V - 1];
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) p[k] = pack.element[k];
  }
}

// A box in shared memory. Vectors of it are vectors there, wherever they lie in global memory.
template <class T> struct Shared {
  static constexpr bool FAR = false;
  T* data;
  int row_step, nr;  // elements from row to row, rows of a sample
  static constexpr int V = 16 / sizeof(T);

  __device__ __forceinline__ Shared(T* data, const Box& box)
      : data(data), row_step(box.flat ? box.width : box.pitch), nr(box.nr) {}

  __device__ __forceinline__ int index(int n, int r, int q) const { return (n * nr + r) * row_step + q; }
  __device__ __forceinline__ const T* row(int n, int r) const { return data + index(n, r, 0); }
  __device__ __forceinline__ bool rows_aligned() const { return row_step % VY == 0; }

  // Bring the box in: every byte is read once, in aligned vectors. It is there after copies_arrived() and a barrier.
  __device__ void fill(const Global<const T>& from, const Box& box) {
    const int segments = box.segments(), length = box.segment_length(), rows_of_sample = segments == 1 ? 1 : nr;
    const int head = elements_past_16_bytes(from.origin), step = segments == 1 ? 0 : (int)(from.sn | from.so) & (V - 1);
    const Divisor by_rows(rows_of_sample);
    if ((head | step) == 0) {
      const int vectors = length / V, rest = length - vectors * V;
      if (segments == 1) {
#pragma unroll 4
        for (int v = threadIdx.x; v < vectors; v += blockDim.x) copy_16_bytes(data + v * V, from.origin + v * V);
      } else if (vectors) {
        for (Stepper at(threadIdx.x, blockDim.x, vectors); at.row < segments; at.next()) {
          const int n = box.ns == 1 ? 0 : by_rows.quotient(at.row);
          copy_16_bytes(data + at.row * row_step + at.place * V, from.row(n, at.row - n * rows_of_sample) + at.place * V);
        }
      }
      if (rest) {  // the end of each stretch
        const Divisor by_rest(rest);
        for (int i = threadIdx.x; i < segments * rest; i += blockDim.x) {
          const int s = by_rest.quotient(i), n = by_rows.quotient(s), e = vectors * V + i - s * rest;
          data[s * row_step + e] = from.row(n, s - n * rows_of_sample)[e];
        }
      }
      return;
    }
    const int vectors = (length + 2 * V - 2) / V;  // whole ones, and parts of them at the ends
    for (Stepper at(threadIdx.x, blockDim.x, vectors); at.row < segments; at.next()) {
      const int n = by_rows.quotient(at.row);
      const T* row = from.row(n, at.row - n * rows_of_sample);
      const int e = at.place * V - elements_past_16_bytes(row);
      T* to = data + at.row * row_step;
      if (e >= 0 && e + V <= length) {
        store_anywhere(to + e, load_pack<T, V>(row + e, true));
      } else {
        for (int k = max(e, 0); k < min(e + V, length); ++k) to[k] = row[k];
      }
    }
  }
};

// Elements for which `where` is True, one byte each, in the logical order of the box.
struct Mask {
  const unsigned char* data;
  int width, nr;
#if MASKED
  __device__ __forceinline__ bool at(int n, int r, int q) const { return data[(n * nr + r) * width + q] != 0; }
  // Of K elements at once, which begin at a multiple of K of the box or, if not `aligned`, anywhere.
  template <int K> __device__ __forceinline__ void read(int n, int r, int q, bool (&used)[K], bool aligned = true) const {
    const int at = (n * nr + r) * width + q;
    const Pack<unsigned char, K> pack = load_pack<unsigned char, K>(data + at, aligned || at % K == 0);
#pragma unroll
    for (int k = 0; k < K; ++k) used[k] = pack.element[k] != 0;
  }
  // Bring the mask in, in words of four elements where these are neighbours in `where`, too, or one and the same; a thread
  // has FLIGHT of them on the way at once: with single bytes, one after the other, the mask took six times as long as x.
  __device__ void fill(unsigned char* to, const unsigned char* where, long long sn, long long so, long long sc,
                       long long si, const Box& box) {
    data = to;
    width = box.width;
    nr = box.nr;
    const unsigned char* from = where + box.n0 * sn + box.o0 * so + box.c0 * sc + box.i0 * si;
    const bool columns = box.ncol % 4 == 0, aligned = (((long long)(size_t)from | sn | so | (columns ? sc : 0)) & 3) == 0;
    const long long step = columns ? si : sc;  // to the next of four neighbours
    const bool words = width % 4 == 0 && (columns || box.ncol == 1) && (step == 0 || (step == 1 && aligned));
    if (!words) copy<1>(to, from, sn, so, sc, si, box, false);
    else copy<4>(to, from, sn, so, sc, si, box, step == 0);
  }
  template <int K>
  __device__ __forceinline__ void copy(unsigned char* to, const unsigned char* from, long long sn, long long so, long long sc,
                                       long long si, const Box& box, bool same) {
    typedef typename Word<K>::type Elements;
    constexpr int FLIGHT = 4;
    const int per_row = width / K, count = box.ns * box.nr * per_row;
    const Divisor by_row(per_row), by_columns(box.ncol), by_rows(box.nr);
    for (int first = threadIdx.x; first < count; first += FLIGHT * blockDim.x) {
      Elements elements[FLIGHT];
#pragma unroll
      for (int u = 0; u < FLIGHT; ++u) {
        const int e = first + u * blockDim.x;
        if (e >= count) break;
        const int s = by_row.quotient(e), q = K * (e - s * per_row), c = by_columns.quotient(q), n = by_rows.quotient(s);
        const unsigned char* p = from + n * sn + (s - n * nr) * so + c * sc + (q - c * box.ncol) * si;
        if (K == 4 && same) elements[u] = (Elements)(*p * 0x01010101u);
        else elements[u] = *reinterpret_cast<const Elements*>(p);
      }
#pragma unroll
      for (int u = 0; u < FLIGHT; ++u) {
        const int e = first + u * blockDim.x;
        if (e < count) reinterpret_cast<Elements*>(to)[e] = elements[u];
      }
    }
  }
#else
  __device__ __forceinline__ bool at(int, int, int) const { return true; }
  template <int K> __device__ __forceinline__ void read(int, int, int, bool (&used)[K], bool = true) const {
#pragma unroll
    for (int k = 0; k < K; ++k) used[k] = true;
  }
#endif
};

// K = 1 element, or a vector of them that starts at a multiple of it in the box, from shared memory.
template <int DTYPE, int K, class T>
__device__ __forceinline__ void read(const Shared<T>& from, int n, int r, int q, real (&v)[K]) {
  const Pack<T, K> pack = load_pack<T, K>(from.data + from.index(n, r, q), true);
#pragma unroll
  for (int k = 0; k < K; ++k) v[k] = to_real<DTYPE>(pack.element[k]);
}
// ---- teams: `team` neighbouring threads (a power of two; up to the block) that work on one unit

struct Pair {
  double a, b;
};

// Doubles that a block needs in shared memory for team_sum and team_max: two for each warp.
constexpr int MOST_WARPS = 32, SCRATCH = 2 * MOST_WARPS;

// Sums over a team, the same bits in each of its threads; the order depends on `team` alone. Called by the whole block.
template <int K> __device__ __forceinline__ void sum_of_lanes(double (&v)[K], int lanes) {
  for (int offset = lanes >> 1; offset > 0; offset >>= 1) {
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] += __shfl_xor_sync(0xffffffffu, v[k], offset);
  }
}
template <int K> __device__ __forceinline__ void team_sums(double (&v)[K], int team, double* scratch) {
  static_assert(K <= SCRATCH / MOST_WARPS, "room in the scratch");
  sum_of_lanes(v, min(team, 32));
  if (team > 32) {
    __syncthreads();  // the scratch may still be being read
    const int warp = threadIdx.x >> 5, warps = team >> 5;
    if ((threadIdx.x & 31) == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) scratch[k * MOST_WARPS + warp] = v[k];
    }
    __syncthreads();
    // Each lane reads the sum of one warp of the team: were all read by all, it would cost more than a small group itself.
    const int other = (warp & -warps) + (threadIdx.x & (warps - 1));
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = scratch[k * MOST_WARPS + other];
    sum_of_lanes(v, warps);
  }
}
__device__ __forceinline__ Pair team_sum(const Pair& v, int team, double* scratch) {
  double sums[2] = {v.a, v.b};
  team_sums(sums, team, scratch);
  return {sums[0], sums[1]};
}
__device__ __forceinline__ double team_sum(double v, int team, double* scratch) {
  double sum[1] = {v};
  team_sums(sum, team, scratch);
  return sum[0];
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

// A sum of `count` values up to `largest`, the same bits in whatever order they come: each is cut into a multiple of a step so
// large that no sum of them rounds, and once more for what is left. Error: 2^-100 of the largest.
struct AnyOrder {
  double first, second;  // powers of two above the largest value times the count, and the same of what the first cut leaves
  Pair sums;
  __device__ __forceinline__ AnyOrder(int count, double largest) : sums{0, 0} {
    const double room = ldexp(1.0, 33 - __clz(count));
    first = 1.5 * room * ldexp(1.0, ilogb(fmax(largest, 0x1p-900)) + 1);
    second = first * room * 0x1p-52;
  }
  __device__ __forceinline__ void add(double v) {
    const double cut = (v + first) - first, rest = v - cut;
    sums.a += cut;
    sums.b += (rest + second) - second;
  }
  // Over a team.
  __device__ __forceinline__ double total(int team, double* scratch) const {
    const Pair all = team_sum(sums, team, scratch);
    return all.a + all.b;
  }
};

// Sum of value(0), ..., value(count - 1) over a team, in whatever order the values stand.
template <class Value> __device__ __forceinline__ double sum_in_any_order(int count, int lane, int team, double* scratch, Value value) {
  double largest = 0;
  for (int i = lane; i < count; i += team) largest = fmax(largest, fabs(value(i)));
  AnyOrder sum(count, team_max(largest, team, scratch));
  for (int i = lane; i < count; i += team) sum.add(value(i));
  return sum.total(team, scratch);
}
// The same of both values of pairs.
template <class Value> __device__ __forceinline__ Pair pairs_in_any_order(int count, int lane, int team, double* scratch, Value value) {
  Pair largest = {0, 0};
  for (int i = lane; i < count; i += team) {
    const Pair v = value(i);
    largest = {fmax(largest.a, fabs(v.a)), fmax(largest.b, fabs(v.b))};
  }
  AnyOrder a(count, team_max(largest.a, team, scratch)), b(count, team_max(largest.b, team, scratch));
  for (int i = lane; i < count; i += team) {
    const Pair v = value(i);
    a.add(v.a);
    b.add(v.b);
  }
  const double sum_a = a.total(team, scratch);
  return {sum_a, b.total(team, scratch)};
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
  constexpr int STEPS = SHORT_RUN / V;
  const int per_row = run / V;
  if (rows == 1) {
#pragma unroll 2
    for (int j = lane; j < per_row; j += STEPS * team) {
#pragma unroll
      for (int u = 0; u < STEPS; ++u)
        if (u == 0 || j + u * team < per_row) body(Count<V>(), 0, (j + u * team) * V);
      flush();
    }
    return;
  }
  Stepper at(lane, team, per_row);
  while (at.row < rows) {
#pragma unroll 1
    for (int u = 0; u < STEPS && (u == 0 || at.row < rows); ++u, at.next()) body(Count<V>(), at.row, at.place * V);
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

// Whether runs are whole vectors, and whether a row may have one element of a channel; the option is that of these kernels only.
#if defined(KERNEL_FORWARD) || defined(KERNEL_BACKWARD)
constexpr bool WHOLE_RUNS = VECTOR_CHANNELS == 1 && VX == VY, MAYBE_COLUMNS = VECTOR_CHANNELS > 2;
#else
constexpr bool WHOLE_RUNS = false, MAYBE_COLUMNS = true;
#endif

template <class Body, class Flush>
__device__ __forceinline__ void walk(int rows, int run, int lane, int team, Body body, Flush flush) {
  if (WHOLE_RUNS || run % VX == 0) deal<VX>(rows, run, lane, team, body, flush);
  else if (VX > 2 && run % (VX / 2) == 0) deal<(VX + 1) / 2>(rows, run, lane, team, body, flush);
  else deal<1>(rows, run, lane, team, body, flush);
}

// Lanes that `vectors` of a line are dealt to: the most of which at least `busy` have one.
__device__ __forceinline__ int lanes_for(int vectors, float busy) {
  int shift = 5;
  while (shift > 0 && (float)vectors < busy * (float)(((vectors + (1 << shift) - 1) >> shift) << shift)) --shift;
  return 1 << shift;
}

// Elements of a row that a thread sums up side by side: more take registers, of which `backward` has few.
#if defined(KERNEL_BACKWARD) && !SINGLE
constexpr int COLUMNS = 2;
#else
constexpr int COLUMNS = VX < 4 ? VX : 4;
#endif

// Sums over `rows` rows of two values of each of nc channels, of `samples` samples of `most_samples` (the batch decides no order
// of a sum), where a row has one element of a channel: to set(n nc + c, sums), by warps that hold some columns and every so
// many rows. begin(n, c) looks up what the columns c, ..., c + K - 1 need; body(n, r, c, a, b) adds the values of K elements to
// a and b, which are added to float64 sums every SHORT_RUN rows; where begin() returned false, exactly(n, r, c, a, b) adds
// them to float64 sums itself. With `more` the sums come on top of what at() reads. Called by the whole block.
template <int K, class Begin, class Body, class Exactly, class At, class Set>
__device__ __forceinline__ void sum_columns(int samples, int most_samples, int rows, int nc, bool more, Begin begin, Body body,
                                            Exactly exactly_of, At at, Set set) {
  const int vectors = nc / K, lanes = lanes_for(vectors, 0.85f), slots_of_warp = 32 / lanes, lines = (vectors + lanes - 1) / lanes;
  const int units = samples * lines, warps = blockDim.x >> 5, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int sharing = max(1, warps / (most_samples * lines));  // warps that share a unit
  const int share = warp % sharing, at_once = warps / sharing, place = warp / sharing;
  const Divisor by_lines(lines);
  for (int first = 0; first < units; first += at_once) {
    const int unit = first + place, n = by_lines.quotient(unit);
    const int v = (unit - n * lines) * lanes + (lane & (lanes - 1)), c = v * K;
    const bool mine = place < at_once && unit < units && v < vectors;
    double sum_a[K] = {}, sum_b[K] = {};
    if (mine) {
      int r = share * slots_of_warp + lane / lanes;
      const int step = sharing * slots_of_warp;
      if (begin(n, c)) {
        while (r < rows) {
          real a[K] = {}, b[K] = {};
          for (int u = 0; u < SHORT_RUN && r < rows; ++u, r += step) body(n, r, c, a, b);
#pragma unroll
          for (int k = 0; k < K; ++k) {
            sum_a[k] += exactly(a[k]);
            sum_b[k] += exactly(b[k]);
          }
        }
      } else {
#pragma unroll 1
        for (; r < rows; r += step) exactly_of(n, r, c, sum_a, sum_b);
      }
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      for (int offset = 16; offset >= lanes; offset >>= 1) {
        sum_a[k] += __shfl_xor_sync(0xffffffffu, sum_a[k], offset);
        sum_b[k] += __shfl_xor_sync(0xffffffffu, sum_b[k], offset);
      }
    }
    for (int other = 0; other < sharing; ++other) {  // one after the other, in order
      if (other) __syncthreads();
      if (mine && lane < lanes && share == other) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const Pair before = other || more ? at(n * nc + c + k) : Pair{0, 0};
          set(n * nc + c + k, {before.a + sum_a[k], before.b + sum_b[k]});
        }
      }
    }
  }
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

// Op: Input (where a row's elements come from), Values<K> (K of them), Entry (what a channel of a sample needs), Group and
// Scale (the parts of it that its group and its channel need), grouping, and group(unit), scale(c), entry(group, scale),
// slow(entry), load(values, from, element, n, r, q, aligned), fast(entry, values, k); for slow entries the same in float64,
// ExactGroup, exact_group(unit) and exact(group, c, values, k). all_slow() tells that no entry is fast, rows_aligned() that
// vectors of a row are aligned where those of the result are, UNROLL how many a thread loads at once, FEW_REGISTERS that
// many entries can be kept.
//
// VECTOR_CHANNELS: channels that an aligned vector of the output lies in at most. 1, 2 (a channel's run is at least a
// vector), or 16 for any number.
constexpr int ENTRIES = VECTOR_CHANNELS < VY ? VECTOR_CHANNELS : VY;
// 16-bit elements in float64 arithmetic (float64 weights): eight entries would be 96 registers. They are looked up one by one;
// so are the four of float32, and those of integers, where erfc takes the registers.
#if ACTIVATION == GELU && (REAL_IS_DOUBLE || X_DTYPE > FLOAT64)
constexpr bool KEPT = ENTRIES <= 2;
#else
constexpr bool KEPT = !(REAL_IS_DOUBLE && ENTRIES > 4);
#endif
// Whether every vector of a column of vectors has the same channels, wherever rows are aligned.
constexpr bool IN_LINES = KEPT && ENTRIES != 2;

// The entries of the vector at `place`, of its sample; `here`: elements of it in its first channel, where there may be two.
template <class Op>
__device__ __forceinline__ void look_up(const Op& op, Place place, int here, const Box& box, typename Op::Entry (&entry)[ENTRIES]) {
  typename Op::Group group;
  int unit = -1;  // whose it is
#pragma unroll
  for (int k = 0; k < ENTRIES; ++k) {
    const int other = op.grouping.unit(place.n, place.c);
    if (other != unit) group = op.group(unit = other);
    entry[k] = op.entry(group, op.scale(place.c));
    if (k + 1 < ENTRIES) {
      if (ENTRIES == 2) place.i = here < VY ? box.ncol - 1 : place.i - 1;  // to the next channel, if it gets there
      place.step(box);
    }
  }
}

// A vector that is filled element by element in a loop: the new one comes in at the top, the others move down, so that no
// register is chosen at run time.
__device__ __forceinline__ void push(uint4& vector, y_t element) {
  if constexpr (sizeof(y_t) == 8) {
    const unsigned long long bits = bits_of<unsigned long long>(element);
    vector = make_uint4(vector.z, vector.w, (unsigned)bits, (unsigned)(bits >> 32));
  } else if constexpr (sizeof(y_t) == 4) {
    vector = make_uint4(vector.y, vector.z, vector.w, bits_of<unsigned>(element));
  } else {
    vector = make_uint4(vector.x >> 16 | vector.y << 16, vector.y >> 16 | vector.z << 16, vector.z >> 16 | vector.w << 16,
                        vector.w >> 16 | (unsigned)element << 16);
  }
}

// Elements first, ..., last - 1 of a row one by one, of which some may go to float64; `place`: that of the first; `whole`: they
// are a vector. Where it is the exception: a loop of a few registers, which others need to have more blocks on a
// multiprocessor.
template <class Op>
__device__ __forceinline__ void apply_slowly(const Op& op, Place place, int first, int last, bool whole, const Box& box,
                                             const typename Op::Input& from, y_t* to) {
  uint4 vector = {};
#pragma unroll 1
  for (int k = first; k < last; ++k) {
    const int unit = op.grouping.unit(place.n, place.c);
    const typename Op::Entry one = op.entry(op.group(unit), op.scale(place.c));
    typename Op::template Values<1> values;
    op.load(values, from, k, place.n, place.r, place.c * box.ncol + place.i, true);
    const y_t element = op.slow(one) ? from_double<Y_DTYPE>(op.exact(op.exact_group(unit), place.c, values, 0))
                                     : from_real<Y_DTYPE>(op.fast(one, values, 0));
    if (whole) push(vector, element);
    else to[k] = element;
    place.step(box);
  }
  if (whole) {
    Pack<y_t, VY> pack;
    pack.word = vector;
    store_pack<y_t, VY>(to + first, pack, true);
  }
}

// A vector of which some or all elements may go to float64: where that is usual, as in groups of single elements.
template <class Op>
__device__ __forceinline__ void mixed_vector(const Op& op, Place place, const Box& box,
                                             const typename Op::template Values<VY>& values, Pack<y_t, VY>& pack) {
  typename Op::Group group;
  typename Op::ExactGroup exact_group;
  int unit = -1;  // whose they are
#pragma unroll
  for (int k = 0; k < VY; ++k) {
    const int other = op.grouping.unit(place.n, place.c);
    if (other != unit) {
      group = op.group(other);
      exact_group = op.exact_group(other);
      unit = other;
    }
    const typename Op::Entry one = op.entry(group, op.scale(place.c));
    if (op.slow(one)) pack.element[k] = from_double<Y_DTYPE>(op.exact(exact_group, place.c, values, k));
    else pack.element[k] = from_real<Y_DTYPE>(op.fast(one, values, k));
    place.step(box);
  }
}

// ---- in lines: `lanes` neighbouring threads go through vectors that have the same entries, which are looked up once

// Units of work for teams of `lanes` threads: the `lines` of each of `classes`, which have entries of their own, are dealt to
// `slots` units of at least `least` lines each where there are as many; so many that the last round leaves few teams idle.
struct Units {
  int lanes, lane, team, teams, slots, count;
  __device__ __forceinline__ Units(int lanes, int classes, int lines, int least)
      : lanes(lanes), lane(threadIdx.x & (lanes - 1)), team(threadIdx.x / lanes), teams(blockDim.x / lanes) {
    slots = max(1, min(lines / least, (4 * teams + classes - 1) / classes));
    count = classes * slots;
  }
};

// A vector of a line, of which some elements may go to float64.
template <class Op>
__device__ __forceinline__ void store_slowly(const Op& op, const Place& at, int q, y_t* to, bool aligned, const Box& box) {
  const typename Op::Input from = op.input(at.n, at.r);
  if constexpr (SINGLE) {
    typename Op::template Values<VY> values;
    op.load(values, from, q, at.n, at.r, q, aligned);
    Pack<y_t, VY> pack;
    mixed_vector(op, at, box, values, pack);
    store_pack<y_t, VY>(to, pack, true);
  } else {
    apply_slowly(op, at, q, q + VY, true, box, from, to - q);
  }
}

// Vectors v, v + step, ... below `end`, which have the same entries; where(v, body) calls body(place, element of the row,
// address of the result). Those of which elements go to float64 are left to a second going through, SLOW, and true is returned.
template <bool SLOW, class Op, class Where>
__device__ __forceinline__ bool line(const Op& op, const typename Op::Entry (&entry)[ENTRIES], int v, int end, int step, bool aligned,
                                     const Box& box, Where where) {
  bool plain = aligned && !op.all_slow();
#pragma unroll
  for (int k = 0; k < ENTRIES; ++k) plain = plain && !op.slow(entry[k]);
  if constexpr (SLOW) {
    if (plain) return false;
#pragma unroll 1
    for (; v < end; v += step) {
      where(v, [&](const Place& at, int q, y_t* to) { store_slowly(op, at, q, to, aligned, box); });
    }
  } else {
    if (!plain) return true;
    constexpr int UNROLL = Op::UNROLL;
    for (; v < end; v += UNROLL * step) {
      typename Op::template Values<VY> values[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        if (v + u * step < end)
          where(v + u * step, [&](const Place& at, int q, y_t*) { op.load(values[u], op.input(at.n, at.r), q, at.n, at.r, q, true); });
      }
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        if (v + u * step >= end) break;
        Pack<y_t, VY> pack;
#pragma unroll
        for (int k = 0; k < VY; ++k) pack.element[k] = from_real<Y_DTYPE>(op.fast(entry[ENTRIES == VY ? k : 0], values[u], k));
        where(v + u * step, [&](const Place&, int, y_t* to) { store_pack<y_t, VY>(to, pack, true); });
      }
    }
  }
  return false;
}

// Of rows that begin at vectors: those of a channel where each lies in one, else those at the same place in each row. Of a
// channel more lanes are left idle, for neighbours that write whole sectors between them.
template <bool SLOW, class Op> __device__ __forceinline__ bool apply_in_lines(const Op& op, const Global<y_t>& out, const Box& box) {
  typename Op::Entry entry[ENTRIES];
  const int vectors = (ENTRIES == 1 ? box.ncol : box.width) / VY, lanes = lanes_for(vectors, ENTRIES == 1 ? 0.75f : 0.85f);
  const int lines_of_vectors = (vectors + lanes - 1) / lanes;
  const bool aligned = op.rows_aligned();
  bool left = false;
  if constexpr (ENTRIES == 1) {
    const Units units(lanes, box.ns * box.nr * box.nc, lines_of_vectors, 4);
    const Divisor by_slots(units.slots), by_channels(box.nc), by_rows(box.nr);
    for (int unit = units.team; unit < units.count; unit += units.teams) {
      const int run = by_slots.quotient(unit), slot = unit - run * units.slots, s = by_channels.quotient(run);
      const int n = by_rows.quotient(s), r = s - n * box.nr, c = run - s * box.nc, q0 = c * box.ncol;
      const Place place = {n, r, c, 0};
      look_up(op, place, VY, box, entry);
      y_t* to = out.row(n, r) + q0;
      left |= line<SLOW>(op, entry, slot * lanes + units.lane, vectors, units.slots * lanes, aligned, box,
                         [&](int v, auto body) { body(Place{n, r, c, v * VY}, q0 + v * VY, to + v * VY); });
    }
  } else {
    const Divisor by_columns(box.ncol), by_lines(lines_of_vectors);
    // Rows are single where samples are: then lines go over the samples, and only the channels' part of an entry is kept.
#ifdef KERNEL_BACKWARD
    constexpr bool by_sample = SINGLE;  // the kernel's option
#else
    const bool by_sample = box.nr == 1;
#endif
    const Units units(lanes, by_sample ? lines_of_vectors : box.ns * lines_of_vectors, by_sample ? box.ns : box.nr, 8);
    const Divisor by_slots(units.slots);
    for (int unit = units.team; unit < units.count; unit += units.teams) {
      const int column = by_slots.quotient(unit), slot = unit - column * units.slots;
      const int n = by_sample ? 0 : by_lines.quotient(column), v = (column - n * lines_of_vectors) * lanes + units.lane;
      if (v >= vectors) continue;
      const int q = v * VY, c = by_columns.quotient(q);
      Place place = {n, 0, c, q - c * box.ncol};
      if (!by_sample) {
        look_up(op, place, VY, box, entry);
        left |= line<SLOW>(op, entry, slot, box.nr, units.slots, aligned, box, [&](int r, auto body) {
          body(Place{n, r, c, place.i}, q, out.row(n, r) + q);
        });
        continue;
      }
      typename Op::Scale scale[ENTRIES];
      int group_of[ENTRIES];  // of sample 0
      bool one_group = true;
      const bool look = !(SLOW && op.all_slow());
      if (look) {
        Place next = place;
#pragma unroll
        for (int k = 0; k < ENTRIES; ++k) {
          group_of[k] = op.grouping.of(next.c);
          scale[k] = op.scale(next.c);
          one_group = one_group && group_of[k] == group_of[0];
          next.step(box);
        }
      }
      for (place.n = slot; place.n < box.ns; place.n += units.slots) {
        if (look) {
          const int of_sample = place.n * op.grouping.groups;
          typename Op::Group group = op.group(of_sample + group_of[0]);
#pragma unroll
          for (int k = 0; k < ENTRIES; ++k) {
            if (!one_group) group = op.group(of_sample + group_of[k]);
            entry[k] = op.entry(group, scale[k]);
          }
        }
        left |= line<SLOW>(op, entry, 0, 1, 1, aligned, box, [&](int, auto body) { body(place, q, out.row(place.n, 0) + q); });
      }
    }
  }
  return left;
}

// Wherever vectors of the output begin and end, in the order of memory. An entry is looked up once a vector, or for as long as
// a thread stays in its channels; eight large ones are not kept, but looked up one by one, and neither are those beside eight
// values in float64 (kept, a thread needed more than the 128 registers that it has: spills on sm_80 to sm_89).
template <class Op> __device__ __forceinline__ void apply_anywhere(const Op& op, const Global<y_t>& out, const Box& box) {
  constexpr bool KEEP = KEPT && !(REAL_IS_DOUBLE && VY == 8) && (ENTRIES <= 4 || Op::FEW_REGISTERS);
  typename Op::Entry entry[ENTRIES];
  int known = -1;  // sample and position in a row that the entries belong to
  const int segments = box.segments(), length = box.segment_length();
  const int head0 = elements_past_16_bytes(out.origin), step = (int)((out.sn | out.so) & (VY - 1));
  const bool aligned = head0 == 0 && (segments == 1 || step == 0) && length % VY == 0;
  const int vectors = aligned ? length / VY : (length + 2 * VY - 2) / VY, count = segments * vectors;
  const Divisor by_rows(box.nr), by_width(box.width), by_columns(box.ncol);
  // A step of whole rows, if it leaves few threads without work: 255 of 256 for rows of 30 channels of 2 bytes.
  int stride = blockDim.x;
  if (ENTRIES > 2) {
    const int rows_of_vectors = box.flat ? box.width / min(box.width & -box.width, VY) : vectors;
    const int whole = stride / rows_of_vectors * rows_of_vectors;
    if (8 * whole >= 7 * stride) stride = whole;
  }
  Stepper at(threadIdx.x, stride, vectors);
  for (int v = threadIdx.x < stride ? threadIdx.x : count; v < count; v += stride, at.next()) {
    int s = at.row;
    Place place;
    place.n = box.ns == 1 || box.flat ? 0 : by_rows.quotient(s);
    place.r = box.flat ? 0 : s - place.n * box.nr;
    y_t* to = out.row(place.n, place.r);
    const typename Op::Input from = op.input(place.n, place.r);
    const int e = at.place * VY - elements_past_16_bytes(to), first = max(e, 0), last = min(e + VY, length);
    int q = first;
    if (box.flat) {
      s = by_width.quotient(first);
      q = first - s * box.width;
      place.n = box.ns == 1 ? 0 : by_rows.quotient(s);
      place.r = s - place.n * box.nr;
    }
    place.c = by_columns.quotient(q);
    place.i = q - place.c * box.ncol;
    // Elements of the vector in its first channel.
    const int here = ENTRIES == 2 ? box.ncol - place.i : VY;
    bool plain = first == e && last == e + VY;
    if (KEEP && plain) {
      // The entries of a vector that ends in another sample are not kept.
      const bool one_sample = box.ns == 1 || (box.nr - place.r) * box.width - q >= VY;
      const int position = ENTRIES == 1 ? place.n * box.nc + place.c : one_sample ? place.n * box.width + q : -1;
      if (position < 0 || position != known) {
        known = position;
        look_up(op, place, here, box, entry);
      }
#pragma unroll
      for (int k = 0; k < ENTRIES; ++k) plain = plain && !op.slow(entry[k]);
    }
    if (plain) {
      typename Op::template Values<VY> values;
      op.load(values, from, e, place.n, place.r, q, op.aligned_at(from, e));
      Pack<y_t, VY> pack;
      Place next = place;
      typename Op::Group group;
      int unit = -1;  // whose it is
#pragma unroll
      for (int k = 0; k < VY; ++k) {
        typename Op::Entry one;
        if constexpr (KEEP) {
          one = ENTRIES == 2 && k >= here ? entry[ENTRIES - 1] : entry[ENTRIES == VY ? k : 0];
        } else {
          const int other = op.grouping.unit(next.n, next.c);
          if (other != unit) group = op.group(unit = other);
          one = op.entry(group, op.scale(next.c));
          plain = plain && !op.slow(one);
          next.step(box);
        }
        pack.element[k] = from_real<Y_DTYPE>(op.fast(one, values, k));
      }
      if (plain) store_pack<y_t, VY>(to + e, pack, true);
    }
    if (!plain) {
      apply_slowly(op, place, first, last, first == e && last == e + VY, box, from, to);
    }
  }
}

template <class Op> __device__ __forceinline__ void apply(const Op& op, const Global<y_t>& out, const Box& box) {
  constexpr bool ALWAYS = IN_LINES && VECTOR_CHANNELS == 1;
  if (ALWAYS || (IN_LINES && out.rows_aligned() && box.width % VY == 0)) {
    if constexpr (IN_LINES)
      if (op.all_slow() || apply_in_lines<false>(op, out, box)) apply_in_lines<true>(op, out, box);
  } else if constexpr (!ALWAYS) {
    apply_anywhere(op, out, box);
  }
}
