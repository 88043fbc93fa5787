// Just enough of CUDA to run the kernels of cuda.cu on a CPU, for tests of their logic where there is no
// GPU: indices, barriers, shuffles, what is read and written. Says nothing of speed, of races, or of what NVRTC makes.
//
// Each thread of a block is a coroutine; it gives way at barriers and shuffles until its fellows have arrived. Blocks
// run one after the other, so `static` serves as shared memory.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

using std::floor;
using std::min;

#define __device__
#define __shared__ static
#define KERNEL(name, ...)                                    \
  void name(__VA_ARGS__);                                    \
  const bool name##_known = emulation::enter(#name, name);   \
  void name(__VA_ARGS__)

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

inline float half_to_float(unsigned short bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return float(half);
}
inline unsigned short float_to_half(float x) {
  const _Float16 half = _Float16(x);
  unsigned short bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
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

// Kernels by name, each with the arguments as the driver takes them: a pointer to every one.
using Launcher = std::function<void(unsigned grid, unsigned count, void** arguments)>;
inline std::map<std::string, Launcher> kernels;

template <typename... A>
bool enter(const char* name, void (*kernel)(A...)) {
  kernels[name] = [kernel](unsigned grid, unsigned count, void** arguments) {
    launch(grid, count, [=] {
      [&]<size_t... I>(std::index_sequence<I...>) {
        kernel(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
      }(std::index_sequence_for<A...>());
    });
  };
  return true;
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

// The part of the driver that driver.py calls, for one device with one module, which holds the kernels above. 1 is
// CUDA_ERROR_INVALID_VALUE, 500 CUDA_ERROR_NOT_FOUND.
namespace emulation {
inline int contexts = 0;  // that are current: a launch needs one
}
extern "C" {
int cuInit(unsigned) { return 0; }
int cuGetErrorString(int status, const char** text) {
  *text = status == 500 ? "named symbol not found" : "invalid argument";
  return 0;
}
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal != 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &emulation::contexts, device != 0; }
int cuCtxPushCurrent_v2(void* context) { return ++emulation::contexts, context != &emulation::contexts; }
int cuCtxPopCurrent_v2(void** context) { return *context = &emulation::contexts, emulation::contexts-- < 1; }
int cuModuleLoadData(void** module, const void* image) {
  *module = &emulation::kernels;
  return emulation::contexts < 1 || std::strcmp(static_cast<const char*>(image), "image");
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  const auto found = emulation::kernels.find(name);
  if (module != &emulation::kernels || found == emulation::kernels.end()) return 500;
  *function = &found->second;
  return 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void* stream, void** arguments, void** extra) {
  if (emulation::contexts < 1 || x < 1 || y != 1 || z != 1 || threads_y != 1 || threads_z != 1 || shared || extra ||
      stream != reinterpret_cast<void*>(0x7000000000))
    return 1;
  (*static_cast<emulation::Launcher*>(function))(x, threads, arguments);
  return 0;
}
}
