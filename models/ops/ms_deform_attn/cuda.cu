// Multi-scale deformable attention on CUDA: forward and backward for float64, float32, float16 and bfloat16 values.
//
// Knows nothing of PyTorch: C functions on plain pointers, called through ctypes (see build.py). Layouts and the rule
// of interpolation are those of ms_deform_attn_cpu.cpp. Sums, locations, weights and all gradients are float32 (float64
// for float64); only value, output and the output's gradient have 16 bits.
//
// A row is one head of one query of one image. LANES threads share a row, each holds VECTOR neighbouring channels (16
// bytes). A block first turns the locations of all its rows into cell numbers and shares in shared memory, so that each
// is read from memory, and worked out, once instead of once per channel. Points are taken CHUNK at a time.

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif  // otherwise a test has included an emulation of what is used here

namespace {

constexpr int kThreads = 256;
constexpr int kMaxLevels = 32;  // as in kernels.py
constexpr int kBand = 4;        // rows of a map that one warp owns in the ordered backward
constexpr unsigned kAll = 0xffffffffu;

struct Problem {
  int64_t batch, length;
  int queries, rows, heads, channels, levels, points;
  int height[kMaxLevels], width[kMaxLevels], start[kMaxLevels];
};

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
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
__device__ inline float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float widen(BFloat x) { return __uint_as_float(uint32_t(x.bits) << 16); }

__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(double x, double& out) { out = x; }
__device__ inline void narrow(float x, Half& out) { out.bits = __half_as_ushort(__float2half_rn(x)); }
__device__ inline void narrow(float x, BFloat& out) {  // to the nearest, ties to even
  const uint32_t bits = __float_as_uint(x);
  out.bits = x == x ? uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : uint16_t(0x7fc0);
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
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const Problem p, const T* value, const Wide<T>* locations, const Wide<T>* weights, T* out) {
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
  const int64_t stride = int64_t(p.heads) * p.channels;

  for (int tile = 0; tile < p.channels; tile += LANES * VECTOR) {
    const int channel = tile + lane * VECTOR;
    const bool busy = row < p.rows && channel < p.channels;
    const T* head = value + row / (p.queries * p.heads) * p.length * stride + row % p.heads * int64_t(p.channels) + channel;
    W sum[VECTOR] = {};
    for (int begin = 0; begin < total; begin += CHUNK) {
      const int count = min(CHUNK, total - begin);
      __syncthreads();  // the chunk before has been used
      for (int i = threadIdx.x; i < ROWS * count; i += kThreads) {
        const int r = i / count, k = i % count, level = (begin + k) / p.points;
        if (first_row + r >= p.rows) break;
        const int64_t index = int64_t(first_row + r) * total + begin + k;
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
    if (busy) store<T, VECTOR>(sum, out + int64_t(row) * p.channels + channel);
  }
}

// grad_value is added to, unless it is null; the other two are overwritten.
template <typename T, int VECTOR, int LANES>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const Problem p, const T* grad_out, const T* value, const Wide<T>* locations,
                    const Wide<T>* weights, Wide<T>* grad_value, Wide<T>* grad_locations, Wide<T>* grad_weights) {
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
  const int64_t stride = int64_t(p.heads) * p.channels;

  for (int begin = 0; begin < total; begin += CHUNK) {
    const int count = min(CHUNK, total - begin);
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * count; i += kThreads) {
      const int r = i / count, k = i % count, level = (begin + k) / p.points;
      Corners corner = {{-1, -1, -1, -1}};
      Point point = {0, 0, 0, 0};
      if (first_row + r < p.rows) {  // beyond, the lanes go through the motions: all of a warp must shuffle
        const int64_t index = int64_t(first_row + r) * total + begin + k;
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
      const int64_t head =
          row / (p.queries * p.heads) * p.length * stride + row % p.heads * int64_t(p.channels) + channel;
      W g[VECTOR] = {};
      if (busy) load<T, VECTOR>(grad_out + int64_t(row) * p.channels + channel, g);
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
      const int64_t index = int64_t(first_row + r) * total + begin + k;
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
__global__ void __launch_bounds__(kThreads)
    ordered_kernel(const Problem p, int bands, const T* grad_out, const Wide<T>* locations, const Wide<T>* weights,
                   Wide<T>* grad_value) {
  using W = Wide<T>;
  const int lane = threadIdx.x % 32;
  const int64_t task = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (task >= p.batch * p.heads * bands) return;  // whole warps
  const int64_t b = task / bands / p.heads;
  const int n = int(task / bands % p.heads);
  int level = 0, band = int(task % bands);
  for (; band >= (p.height[level] + kBand - 1) / kBand; ++level) band -= (p.height[level] + kBand - 1) / kBand;
  const int height = p.height[level], width = p.width[level];
  const int first = band * kBand, last = min(first + kBand, height) - 1;
  const int64_t stride = int64_t(p.heads) * p.channels;
  W* map = grad_value + (b * p.length + p.start[level]) * stride + int64_t(n) * p.channels;

  const int64_t items = int64_t(p.queries) * p.points;
  for (int64_t begin = 0; begin < items; begin += 32) {
    const int64_t item = begin + lane;
    Place<W> place = {0, 0, 0, 0};
    W weight = 0;
    bool hit = false;
    if (item < items) {
      const int64_t row = (b * p.queries + item / p.points) * p.heads + n;
      const int64_t index = (row * p.levels + level) * p.points + item % p.points;
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
      const int64_t row = (b * p.queries + (begin + source) / p.points) * p.heads + n;
      for (int c = lane; c < p.channels; c += 32) {
        const W g = widen(grad_out[row * p.channels + c]);
        for (int j = 0; j < 4; ++j) {
          const int y = line + j / 2, x = column + j % 2;
          if (y >= first && y <= last && x >= 0 && x < width) map[(int64_t(y) * width + x) * stride + c] += share[j] * g;
        }
      }
    }
  }
}

template <typename T, int VECTOR, int LANES>
void launch_forward(const Problem& p, cudaStream_t stream, const void* const* tensors) {
  using W = Wide<T>;
  constexpr int ROWS = kThreads / LANES;
  const unsigned blocks = unsigned((p.rows + ROWS - 1) / ROWS);
  LAUNCH((forward_kernel<T, VECTOR, LANES>), blocks, kThreads, stream, p, static_cast<const T*>(tensors[0]),
         static_cast<const W*>(tensors[1]), static_cast<const W*>(tensors[2]),
         static_cast<T*>(const_cast<void*>(tensors[3])));
}

template <typename T, int VECTOR, int LANES>
void launch_backward(const Problem& p, cudaStream_t stream, const void* const* tensors, bool ordered) {
  using W = Wide<T>;
  constexpr int ROWS = kThreads / LANES;
  const T *grad_out = static_cast<const T*>(tensors[0]), *value = static_cast<const T*>(tensors[1]);
  const W *locations = static_cast<const W*>(tensors[2]), *weights = static_cast<const W*>(tensors[3]);
  W* grad_value = static_cast<W*>(const_cast<void*>(tensors[4]));
  W* grad_locations = static_cast<W*>(const_cast<void*>(tensors[5]));
  W* grad_weights = static_cast<W*>(const_cast<void*>(tensors[6]));
  const unsigned blocks = unsigned((p.rows + ROWS - 1) / ROWS);
  LAUNCH((backward_kernel<T, VECTOR, LANES>), blocks, kThreads, stream, p, grad_out, value, locations, weights,
         ordered ? static_cast<W*>(nullptr) : grad_value, grad_locations, grad_weights);
  if (!ordered) return;
  int bands = 0;
  for (int level = 0; level < p.levels; ++level) bands += (p.height[level] + kBand - 1) / kBand;
  const int64_t warps = p.batch * p.heads * bands;
  const unsigned ordered_blocks = unsigned((warps + kThreads / 32 - 1) / (kThreads / 32));
  LAUNCH((ordered_kernel<T>), ordered_blocks, kThreads, stream, p, bands, grad_out, locations, weights, grad_value);
}

enum class Pass { kForward, kBackward, kOrderedBackward };

template <typename T, int VECTOR, int LANES>
void launch(const Problem& p, cudaStream_t stream, Pass pass, const void* const* tensors) {
  if (pass == Pass::kForward) {
    launch_forward<T, VECTOR, LANES>(p, stream, tensors);
  } else {
    launch_backward<T, VECTOR, LANES>(p, stream, tensors, pass == Pass::kOrderedBackward);
  }
}

// 16 bytes at a time where channels and addresses allow, with as few lanes as hold a row.
template <typename T>
void choose(const Problem& p, cudaStream_t stream, Pass pass, const void* const* tensors) {
  constexpr int VECTOR = 16 / sizeof(T);
  bool aligned = p.channels % VECTOR == 0;
  for (int i = 0; i < (pass == Pass::kForward ? 4 : 5); ++i)
    aligned = aligned && reinterpret_cast<uintptr_t>(tensors[i]) % 16 == 0;
  const int lanes = p.channels / VECTOR;
  if (!aligned) return launch<T, 1, 32>(p, stream, pass, tensors);
  if (lanes <= 4) return launch<T, VECTOR, 4>(p, stream, pass, tensors);
  if (lanes <= 8) return launch<T, VECTOR, 8>(p, stream, pass, tensors);
  if (lanes <= 16) return launch<T, VECTOR, 16>(p, stream, pass, tensors);
  launch<T, VECTOR, 32>(p, stream, pass, tensors);
}

// Makes the device current; the caller puts back what was.
cudaError_t enter(int device) {
  int before = device;
  const cudaError_t status = cudaGetDevice(&before);
  return status == cudaSuccess && before != device ? cudaSetDevice(device) : status;
}

int run(int type, int device, cudaStream_t stream, const int64_t* sizes, const int64_t* dimensions, Pass pass,
        const void* const* tensors) {
  const int64_t* d = dimensions;  // B, L, N, C, levels, Q, points
  const int64_t most = INT32_MAX - kThreads, rows = d[0] * d[5] * d[2];  // cells and rows are counted in 32 bits
  if (d[4] > kMaxLevels || d[1] > most || rows > most) return int(cudaErrorInvalidValue);
  Problem p = {d[0], d[1], int(d[5]), int(rows), int(d[2]), int(d[3]), int(d[4]), int(d[6]), {}, {}, {}};
  int start = 0;
  for (int level = 0; level < p.levels; ++level) {
    p.height[level] = int(sizes[2 * level]);
    p.width[level] = int(sizes[2 * level + 1]);
    p.start[level] = start;
    start += p.height[level] * p.width[level];
  }
  if (p.rows == 0) return 0;
  if (const cudaError_t status = enter(device); status != cudaSuccess) return int(status);
  switch (type) {  // as CUDA_TYPES in kernels.py
    case 0: choose<float>(p, stream, pass, tensors); break;
    case 1: choose<double>(p, stream, pass, tensors); break;
    case 2: choose<Half>(p, stream, pass, tensors); break;
    case 3: choose<BFloat>(p, stream, pass, tensors); break;
    default: return int(cudaErrorInvalidValue);
  }
  return int(cudaGetLastError());
}

}  // namespace

extern "C" int forward(int type, int device, cudaStream_t stream, const int64_t* sizes, const int64_t* dimensions,
                       const void* value, const void* locations, const void* weights, void* out) {
  const void* tensors[] = {value, locations, weights, out};
  return run(type, device, stream, sizes, dimensions, Pass::kForward, tensors);
}

extern "C" int backward(int type, int device, cudaStream_t stream, int ordered, const int64_t* sizes,
                        const int64_t* dimensions, const void* grad_out, const void* value, const void* locations,
                        const void* weights, void* grad_value, void* grad_locations, void* grad_weights) {
  const void* tensors[] = {grad_out, value, locations, weights, grad_value, grad_locations, grad_weights};
  return run(type, device, stream, sizes, dimensions, ordered ? Pass::kOrderedBackward : Pass::kBackward, tensors);
}

// 0 if the driver takes this code on the device: a build may succeed that is too new for the driver.
extern "C" int probe(int device) {
  if (const cudaError_t status = enter(device); status != cudaSuccess) return int(status);
  cudaFuncAttributes attributes;
  return int(cudaFuncGetAttributes(&attributes, forward_kernel<float, 4, 8>));
}

extern "C" const char* error_text(int status) { return cudaGetErrorString(cudaError_t(status)); }
