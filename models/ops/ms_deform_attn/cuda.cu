// Multi-scale deformable attention on CUDA: forward and backward for float64, float32, float16 and bfloat16 values.
//
// Knows nothing of PyTorch, and includes nothing: NVRTC compiles it (build.py), launch.py calls its entries through the
// driver. Layouts and the rule of interpolation are those of cpu.cpp. Sums, locations, weights and all gradients are float32 (float64
// for float64); only value, output and the output's gradient have 16 bits.
//
// A row is one head of one query of one image. LANES threads share a row, each holds VECTOR neighbouring channels (16
// bytes). A block first turns the locations of all its rows into cell numbers and shares in shared memory, so that each
// is read from memory, and worked out, once instead of once per channel. Points are taken CHUNK at a time.

#ifdef __CUDACC__
#define KERNEL(name, ...) extern "C" __global__ void __launch_bounds__(kThreads) name(__VA_ARGS__)
// Written out, so that no header is needed.
__device__ inline float half_to_float(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ inline unsigned short float_to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif  // otherwise a test has included an emulation of what is used here

namespace {

using Long = long long;

constexpr int kThreads = 256;
constexpr int kMaxLevels = 32;  // as in launch.py
constexpr int kBand = 4;        // rows of a map that one warp owns in the ordered backward
constexpr unsigned kAll = 0xffffffffu;

struct Problem {
  Long batch, length;
  int queries, rows, heads, channels, levels, points;
  int height[kMaxLevels], width[kMaxLevels], start[kMaxLevels];
};

struct Half {
  unsigned short bits;
};
struct BFloat {
  unsigned short bits;
};

template <typename T>
struct Traits {
  using Wide = float;
};
template <>
struct Traits<double> {
  using Wide = double;
};
template <typename T>
using Wide = typename Traits<T>::Wide;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(Half x) { return half_to_float(x.bits); }
__device__ inline float widen(BFloat x) { return __uint_as_float(unsigned(x.bits) << 16); }

__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(double x, double& out) { out = x; }
__device__ inline void narrow(float x, Half& out) { out.bits = float_to_half(x); }
__device__ inline void narrow(float x, BFloat& out) {  // to the nearest, ties to even
  const unsigned bits = __float_as_uint(x);
  out.bits = x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fc0;
}

template <typename T, int VECTOR>
__device__ inline void load(const T* source, Wide<T> (&out)[VECTOR]) {
  if constexpr (VECTOR == 1) {
    out[0] = widen(*source);
  } else {
    static_assert(VECTOR * sizeof(T) == 16);
    union {
      uint4 raw;
      T item[VECTOR];
    } pack;
    pack.raw = __ldg(reinterpret_cast<const uint4*>(source));
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) out[i] = widen(pack.item[i]);
  }
}

template <typename T, int VECTOR>
__device__ inline void store(const Wide<T> (&in)[VECTOR], T* target) {
  if constexpr (VECTOR == 1) {
    narrow(in[0], *target);
  } else {
    union {
      uint4 raw;
      T item[VECTOR];
    } pack;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) narrow(in[i], pack.item[i]);
    *reinterpret_cast<uint4*>(target) = pack.raw;
  }
}

// 16 bytes can be added with one request from compute capability 9.0 and CUDA 12.1 on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDACC_VER_MAJOR__ * 10 + __CUDACC_VER_MINOR__ >= 121
constexpr bool kAddQuads = true;
#else
constexpr bool kAddQuads = false;
#endif

// target += factor * g, safely among threads.
template <typename W, int VECTOR>
__device__ inline void add(W* target, W factor, const W (&g)[VECTOR]) {
  if constexpr (kAddQuads && VECTOR % 4 == 0) {
#pragma unroll
    for (int i = 0; i < VECTOR; i += 4)
      atomicAdd(reinterpret_cast<float4*>(target + i),
                make_float4(factor * g[i], factor * g[i + 1], factor * g[i + 2], factor * g[i + 3]));
  } else {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) atomicAdd(target + i, factor * g[i]);
  }
}

// Cells around a point, as numbers in the whole value, -1 outside the map; top left first.
struct Cells {
  int at[4];
};

template <typename W>
struct Place {
  int column, line;  // of the top left cell
  W right, down;     // from there to the point, in cells
};

// location * size - 0.5, rounded as in the published kernel, whose float product is rounded before the difference. At
// the published initialisation all points lie at cells' centres, where rounding decides between two gradients.
__device__ inline float in_cells(float location, int size) {
  return __fsub_rn(__fmul_rn(location, float(size)), 0.5f);
}
__device__ inline double in_cells(double location, int size) { return location * size - 0.5; }

// False where the point touches no cell, also where its location is infinite or not a number.
template <typename W>
__device__ inline bool locate(W x, W y, int height, int width, Place<W>& place) {
  x = in_cells(x, width);
  y = in_cells(y, height);
  if (!(x > W(-1) && y > W(-1) && x < W(width) && y < W(height))) return false;
  const W left = floor(x), top = floor(y);
  place.column = int(left);
  place.line = int(top);
  place.right = x - left;
  place.down = y - top;
  return true;
}

template <typename W>
__device__ inline Cells cells_of(const Place<W>& place, int height, int width, int start) {
  const bool left = place.column >= 0, right = place.column < width - 1;
  const bool top = place.line >= 0, bottom = place.line < height - 1;
  const int first = start + place.line * width + place.column;
  return {{top && left ? first : -1, top && right ? first + 1 : -1, bottom && left ? first + width : -1,
           bottom && right ? first + width + 1 : -1}};
}

template <typename W>
__device__ inline void shares_of(W right, W down, W factor, W (&share)[4]) {
  share[0] = factor * (1 - down) * (1 - right);
  share[1] = factor * (1 - down) * right;
  share[2] = factor * down * (1 - right);
  share[3] = factor * down * right;
}

// float64 takes fewer points at a time: its shares are twice as wide.
template <typename W>
constexpr int kChunk = sizeof(W) == 8 ? 8 : 16;

template <typename T, int VECTOR, int LANES>
__device__ inline void forward_rows(const Problem& p, const T* value, const Wide<T>* locations,
                                    const Wide<T>* weights, T* out) {
  using W = Wide<T>;
  constexpr int ROWS = kThreads / LANES, CHUNK = kChunk<W>;
  struct alignas(16) Shares {
    W of[4];
  };
  struct alignas(16) Corners {
    int at[4];
  };
  __shared__ Corners corners[ROWS][CHUNK + 1];  // + 1: rows of one warp then start in different banks
  __shared__ Shares shares[ROWS][CHUNK + 1];

  const int local = threadIdx.x / LANES, lane = threadIdx.x % LANES, total = p.levels * p.points;
  const int first_row = int(blockIdx.x) * ROWS, row = first_row + local;
  const Long stride = Long(p.heads) * p.channels;

  for (int tile = 0; tile < p.channels; tile += LANES * VECTOR) {
    const int channel = tile + lane * VECTOR;
    const bool busy = row < p.rows && channel < p.channels;
    const T* head = value + row / (p.queries * p.heads) * p.length * stride + row % p.heads * Long(p.channels) + channel;
    W sum[VECTOR] = {};
    for (int begin = 0; begin < total; begin += CHUNK) {
      const int count = min(CHUNK, total - begin);
      __syncthreads();  // the chunk before has been used
      for (int i = threadIdx.x; i < ROWS * count; i += kThreads) {
        const int r = i / count, k = i % count, level = (begin + k) / p.points;
        if (first_row + r >= p.rows) break;
        const Long index = Long(first_row + r) * total + begin + k;
        Place<W> place;
        Corners corner = {{-1, -1, -1, -1}};
        if (locate(locations[2 * index], locations[2 * index + 1], p.height[level], p.width[level], place)) {
          const Cells cells = cells_of(place, p.height[level], p.width[level], p.start[level]);
          for (int j = 0; j < 4; ++j) corner.at[j] = cells.at[j];
          shares_of(place.right, place.down, weights[index], shares[r][k].of);
        }
        corners[r][k] = corner;
      }
      __syncthreads();
      if (!busy) continue;
#pragma unroll 2
      for (int k = 0; k < count; ++k) {
        const Corners corner = corners[local][k];
        const Shares share = shares[local][k];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (corner.at[j] < 0) continue;
          W cell[VECTOR];
          load<T, VECTOR>(head + corner.at[j] * stride, cell);
#pragma unroll
          for (int i = 0; i < VECTOR; ++i) sum[i] += share.of[j] * cell[i];
        }
      }
    }
    if (busy) store<T, VECTOR>(sum, out + Long(row) * p.channels + channel);
  }
}

// grad_value is added to, unless it is null; the other two are overwritten.
template <typename T, int VECTOR, int LANES>
__device__ inline void backward_rows(const Problem& p, const T* grad_out, const T* value, const Wide<T>* locations,
                                     const Wide<T>* weights, Wide<T>* grad_value, Wide<T>* grad_locations,
                                     Wide<T>* grad_weights) {
  using W = Wide<T>;
  constexpr int ROWS = kThreads / LANES, CHUNK = kChunk<W>;
  struct alignas(16) Corners {
    int at[4];
  };
  struct alignas(16) Point {
    W right, down, weight, unused;
  };
  struct Gradient {
    W weight, x, y;
  };
  __shared__ Corners corners[ROWS][CHUNK + 1];
  __shared__ Point points[ROWS][CHUNK + 1];
  __shared__ Gradient gradients[ROWS][CHUNK];

  const int local = threadIdx.x / LANES, lane = threadIdx.x % LANES, total = p.levels * p.points;
  const int first_row = int(blockIdx.x) * ROWS, row = first_row + local;
  const Long stride = Long(p.heads) * p.channels;

  for (int begin = 0; begin < total; begin += CHUNK) {
    const int count = min(CHUNK, total - begin);
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * count; i += kThreads) {
      const int r = i / count, k = i % count, level = (begin + k) / p.points;
      Corners corner = {{-1, -1, -1, -1}};
      Point point = {0, 0, 0, 0};
      if (first_row + r < p.rows) {  // beyond, the lanes go through the motions: all of a warp must shuffle
        const Long index = Long(first_row + r) * total + begin + k;
        Place<W> place;
        if (locate(locations[2 * index], locations[2 * index + 1], p.height[level], p.width[level], place)) {
          const Cells cells = cells_of(place, p.height[level], p.width[level], p.start[level]);
          for (int j = 0; j < 4; ++j) corner.at[j] = cells.at[j];
          point = {place.right, place.down, weights[index], 0};
        }
      }
      corners[r][k] = corner;
      points[r][k] = point;
      gradients[r][k] = {0, 0, 0};
    }
    __syncthreads();

    for (int tile = 0; tile < p.channels; tile += LANES * VECTOR) {
      const int channel = tile + lane * VECTOR;
      const bool busy = row < p.rows && channel < p.channels;
      const Long head =
          row / (p.queries * p.heads) * p.length * stride + row % p.heads * Long(p.channels) + channel;
      W g[VECTOR] = {};
      if (busy) load<T, VECTOR>(grad_out + Long(row) * p.channels + channel, g);
      for (int k = 0; k < count; ++k) {
        const Corners corner = corners[local][k];
        const Point point = points[local][k];
        W share[4], dot[4] = {};
        shares_of(point.right, point.down, W(1), share);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (!busy || corner.at[j] < 0) continue;
          W cell[VECTOR];
          load<T, VECTOR>(value + head + corner.at[j] * stride, cell);
#pragma unroll
          for (int i = 0; i < VECTOR; ++i) dot[j] += g[i] * cell[i];
          if (grad_value) add<W, VECTOR>(grad_value + head + corner.at[j] * stride, point.weight * share[j], g);
        }
        W weight = share[0] * dot[0] + share[1] * dot[1] + share[2] * dot[2] + share[3] * dot[3];
        W x = (1 - point.down) * (dot[1] - dot[0]) + point.down * (dot[3] - dot[2]);
        W y = (1 - point.right) * (dot[2] - dot[0]) + point.right * (dot[3] - dot[1]);
#pragma unroll
        for (int distance = LANES / 2; distance > 0; distance /= 2) {
          weight += __shfl_xor_sync(kAll, weight, distance);
          x += __shfl_xor_sync(kAll, x, distance);
          y += __shfl_xor_sync(kAll, y, distance);
        }
        if (lane == 0) {
          Gradient& gradient = gradients[local][k];
          gradient.weight += weight;
          gradient.x += x;
          gradient.y += y;
        }
      }
    }

    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * count; i += kThreads) {
      const int r = i / count, k = i % count, level = (begin + k) / p.points;
      if (first_row + r >= p.rows) break;
      const Long index = Long(first_row + r) * total + begin + k;
      const W weight = points[r][k].weight;
      grad_weights[index] = gradients[r][k].weight;
      grad_locations[2 * index] = weight * W(p.width[level]) * gradients[r][k].x;
      grad_locations[2 * index + 1] = weight * W(p.height[level]) * gradients[r][k].y;
    }
  }
}

// The value's gradient with sums in one fixed order: a warp owns kBand rows of one level's map, of one head of one
// image, looks through all points in their order, and adds those that touch its rows. A lane owns every 32nd channel.
template <typename T>
__device__ inline void ordered_sums(const Problem& p, int bands, const T* grad_out, const Wide<T>* locations,
                                    const Wide<T>* weights, Wide<T>* grad_value) {
  using W = Wide<T>;
  const int lane = threadIdx.x % 32;
  const Long task = Long(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (task >= p.batch * p.heads * bands) return;  // whole warps
  const Long b = task / bands / p.heads;
  const int n = int(task / bands % p.heads);
  int level = 0, band = int(task % bands);
  for (; band >= (p.height[level] + kBand - 1) / kBand; ++level) band -= (p.height[level] + kBand - 1) / kBand;
  const int height = p.height[level], width = p.width[level];
  const int first = band * kBand, last = min(first + kBand, height) - 1;
  const Long stride = Long(p.heads) * p.channels;
  W* map = grad_value + (b * p.length + p.start[level]) * stride + Long(n) * p.channels;

  const Long items = Long(p.queries) * p.points;
  for (Long begin = 0; begin < items; begin += 32) {
    const Long item = begin + lane;
    Place<W> place = {0, 0, 0, 0};
    W weight = 0;
    bool hit = false;
    if (item < items) {
      const Long row = (b * p.queries + item / p.points) * p.heads + n;
      const Long index = (row * p.levels + level) * p.points + item % p.points;
      hit = locate(locations[2 * index], locations[2 * index + 1], height, width, place) && place.line <= last &&
            place.line + 1 >= first;
      if (hit) weight = weights[index];
    }
    for (unsigned hits = __ballot_sync(kAll, hit); hits; hits &= hits - 1) {
      const int source = __ffs(int(hits)) - 1;
      const int column = __shfl_sync(kAll, place.column, source), line = __shfl_sync(kAll, place.line, source);
      const W right = __shfl_sync(kAll, place.right, source), down = __shfl_sync(kAll, place.down, source);
      W share[4];
      shares_of(right, down, __shfl_sync(kAll, weight, source), share);
      const Long row = (b * p.queries + (begin + source) / p.points) * p.heads + n;
      for (int c = lane; c < p.channels; c += 32) {
        const W g = widen(grad_out[row * p.channels + c]);
        for (int j = 0; j < 4; ++j) {
          const int y = line + j / 2, x = column + j % 2;
          if (y >= first && y <= last && x >= 0 && x < width) map[(Long(y) * width + x) * stride + c] += share[j] * g;
        }
      }
    }
  }
}

}  // namespace

// One entry for each type of value and number of lanes; launch.py names them, and computes their grids.
#define FORWARD(T, VECTOR, LANES, NAME)                                                                           \
  KERNEL(forward_##T##_##NAME, const Problem p, const T* value, const Wide<T>* locations, const Wide<T>* weights, \
         T* out) {                                                                                                \
    forward_rows<T, VECTOR, LANES>(p, value, locations, weights, out);                                            \
  }
#define BACKWARD(T, VECTOR, LANES, NAME)                                                                             \
  KERNEL(backward_##T##_##NAME, const Problem p, const T* grad_out, const T* value, const Wide<T>* locations,        \
         const Wide<T>* weights, Wide<T>* grad_value, Wide<T>* grad_locations, Wide<T>* grad_weights) {              \
    backward_rows<T, VECTOR, LANES>(p, grad_out, value, locations, weights, grad_value, grad_locations,              \
                                    grad_weights);                                                                   \
  }
#define ORDERED(T)                                                                             \
  KERNEL(ordered_##T, const Problem p, int bands, const T* grad_out, const Wide<T>* locations, \
         const Wide<T>* weights, Wide<T>* grad_value) {                                        \
    ordered_sums<T>(p, bands, grad_out, locations, weights, grad_value);                       \
  }
#define BOTH(T, VECTOR, LANES, NAME) FORWARD(T, VECTOR, LANES, NAME) BACKWARD(T, VECTOR, LANES, NAME)
#define ENTRIES(T)                \
  BOTH(T, 1, 32, single)          \
  BOTH(T, 16 / sizeof(T), 4, 4)   \
  BOTH(T, 16 / sizeof(T), 8, 8)   \
  BOTH(T, 16 / sizeof(T), 16, 16) \
  BOTH(T, 16 / sizeof(T), 32, 32) \
  ORDERED(T)

#ifdef VALUE  // a library has one type of value, so that the first use compiles no more than it needs
ENTRIES(VALUE)
#else
ENTRIES(float)
ENTRIES(double)
ENTRIES(Half)
ENTRIES(BFloat)
#endif
