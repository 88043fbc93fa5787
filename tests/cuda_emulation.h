// Just enough of CUDA to run the kernels of ms_deform_attn_cuda.cu on a CPU, for tests of their logic where there is no
// GPU: indices, barriers, shuffles, what is read and written. Says nothing of speed, of races, or of what nvcc makes.
//
// Each thread of a block is a coroutine; it gives way at barriers and shuffles until its fellows have arrived. Blocks
// run one after the other, so `static` serves as shared memory.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

using std::floor;
using std::min;

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)
#define LAUNCH(kernel, grid, block, stream, ...) emulation::launch(grid, block, [&] { kernel(__VA_ARGS__); })

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
struct cudaFuncAttributes {};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t status) { return status ? "invalid value" : "no error"; }

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float4 {  // the emulation is of a GPU that cannot add these at once
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline uint4 __ldg(const uint4* source) { return *source; }

struct __half {
  _Float16 number;
};
inline __half __ushort_as_half(uint16_t bits) {
  __half half;
  std::memcpy(&half, &bits, 2);
  return half;
}
inline uint16_t __half_as_ushort(__half half) {
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline float __half2float(__half half) { return float(half.number); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
template <typename T>
T atomicAdd(T* target, T x) {
  const T before = *target;
  *target += x;
  return before;
}

namespace emulation {

struct Barrier {
  int size = 0, arrived = 0, generation = 0;
};
struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
};
inline std::vector<Thread> threads;
inline std::vector<Barrier> warps;
inline Barrier block;
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;
inline double slots[1024];

inline void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) swapcontext(&threads[current].context, &scheduler);
}

inline void run() {
  body();
  threads[current].done = true;
}

inline void launch(unsigned grid, unsigned count, std::function<void()> function) {
  body = function;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
    threads = std::vector<Thread>(count);
    warps.assign(count / 32, Barrier{32});
    block = Barrier{int(count)};
    for (Thread& thread : threads) {
      thread.stack.resize(64 << 10);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = &scheduler;
      makecontext(&thread.context, run, 0);
    }
    for (unsigned left = count; left;) {
      for (current = 0; current < count; ++current) {
        if (threads[current].done) continue;
        threadIdx.x = current;
        swapcontext(&scheduler, &threads[current].context);
        left -= threads[current].done;
      }
    }
  }
}

template <typename T>
T exchange(T x, unsigned source) {
  slots[current] = double(x);
  wait(warps[current / 32]);
  const T result = T(slots[current / 32 * 32 + source]);
  wait(warps[current / 32]);  // none may overwrite its slot before all have read
  return result;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block); }
template <typename T>
T __shfl_xor_sync(unsigned, T x, int distance) {
  return emulation::exchange(x, emulation::current % 32 ^ unsigned(distance));
}
template <typename T>
T __shfl_sync(unsigned, T x, int source) {
  return emulation::exchange(x, unsigned(source));
}
inline unsigned __ballot_sync(unsigned, bool hit) {
  unsigned mask = 0;
  emulation::slots[emulation::current] = hit;
  emulation::wait(emulation::warps[emulation::current / 32]);
  for (unsigned lane = 0; lane < 32; ++lane)
    mask |= unsigned(emulation::slots[emulation::current / 32 * 32 + lane] != 0) << lane;
  emulation::wait(emulation::warps[emulation::current / 32]);
  return mask;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
