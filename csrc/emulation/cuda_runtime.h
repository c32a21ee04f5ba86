// Stands in for the CUDA runtime, so that the very .cu files also compile for the host and run in
// tests on machines without a GPU. Blocks run one after another, in an order shuffled by a seed;
// the threads of a block are fibers, which switch at __syncthreads and at warp shuffles, as real
// threads may. Not for speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define CUDART_VERSION 13000
#define __CUDACC__
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// `__shared__ Shared<T> x;` (csrc/cuda/multi_tensor_apply.cuh) becomes the emulation's Shared. What
// was declared otherwise does not compile: the emulation would not know of it.
#define __shared__ static emulation::

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct int4 {
  int x, y, z, w;
};

enum cudaError_t { cudaSuccess, cudaErrorNoDevice, cudaErrorNoKernelImageForDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;
struct cudaFuncAttributes {};

inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// A small device: lists of a few chunks already take every block more than once round the loop.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 3;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

namespace emulation {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 << 10;

// Threads wait here until all that are expected have come.
struct Barrier {
  unsigned arrived = 0;
  unsigned generation = 0;

  void ReleaseIf(unsigned expected) {
    if (arrived > 0 && arrived >= expected) {
      arrived = 0;
      ++generation;
    }
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
};

struct Block {
  std::function<void()> body;
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  std::vector<double> exchanged;
  Barrier barrier;
  ucontext_t scheduler;
  unsigned alive = 0;
  unsigned current = 0;
  bool progressed = false;  // any fiber, in this round of the scheduler
};

// Bytes that kernels have read from and written to tensors.
struct Traffic {
  uint64_t read = 0;
  uint64_t written = 0;
};
inline Traffic traffic;
inline uint64_t launches = 0;
inline int driver_version = CUDART_VERSION;  // a test may make it older

// Shared memory of a block. Blocks do not run at the same time, so one copy serves them all; nan of
// every type is in it when a block begins, and tells of a read before the first write.
struct SharedMemory {
  void* address;
  size_t bytes;

  void Poison() const { std::memset(address, 0xff, bytes); }
};
inline std::vector<SharedMemory> shared_memories;

template <typename T>
class Shared {
 public:
  Shared() {
    shared_memories.push_back({&value_, sizeof(value_)});
    shared_memories.back().Poison();
  }
  operator T&() { return value_; }
  Shared& operator=(T value) {
    value_ = value;
    return *this;
  }

 private:
  T value_;
};

template <typename T, size_t kSize>
class Shared<T[kSize]> {
 public:
  Shared() {
    shared_memories.push_back({&values_, sizeof(values_)});
    shared_memories.back().Poison();
  }
  T& operator[](size_t i) { return values_[i]; }

 private:
  T values_[kSize];
};

inline Block* block = nullptr;
inline dim3 thread_index, block_index, grid_size;

// AddressSanitizer has to know on which stack the program runs: it is told before and after each
// switch.
#ifdef __SANITIZE_ADDRESS__
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_bytes = 0;

inline void SwitchTo(Fiber& fiber) {
  void* own_stack = nullptr;
  __sanitizer_start_switch_fiber(&own_stack, fiber.stack.get(), kStackBytes);
  swapcontext(&block->scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(own_stack, nullptr, nullptr);
}

// What the last thread on this stack left there is forgotten once, here, and not at each switch:
// that is what AddressSanitizer's own swapcontext does where it knows the size of the stack.
inline void PrepareStack(Fiber& fiber) {
  __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);
  fiber.context.uc_stack = {};
}

inline void EnterFiber() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
}

inline void SwitchToScheduler(Fiber& fiber) {
  void* own_stack = nullptr;
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &own_stack, scheduler_stack,
                                 scheduler_stack_bytes);
  swapcontext(&fiber.context, &block->scheduler);
  __sanitizer_finish_switch_fiber(own_stack, &scheduler_stack, &scheduler_stack_bytes);
}
#else
inline void SwitchTo(Fiber& fiber) { swapcontext(&block->scheduler, &fiber.context); }
inline void PrepareStack(Fiber&) {}
inline void EnterFiber() {}
inline void SwitchToScheduler(Fiber& fiber) { swapcontext(&fiber.context, &block->scheduler); }
#endif

inline void Yield() { SwitchToScheduler(block->fibers[block->current]); }

inline void Wait(Barrier& barrier, unsigned expected) {
  const unsigned generation = barrier.generation;
  ++barrier.arrived;
  block->progressed = true;
  barrier.ReleaseIf(expected);
  while (barrier.generation == generation) Yield();
}

inline void RunFiber() {
  EnterFiber();
  block->body();
  Fiber& fiber = block->fibers[block->current];
  fiber.done = true;
  block->progressed = true;
  --block->alive;
  block->barrier.ReleaseIf(block->alive);  // a thread that has returned is not waited for
  Yield();
}

// One block, thread after thread until each waits or is done, round after round.
inline void RunBlock(Block& state, unsigned threads) {
  block = &state;
  for (const SharedMemory& memory : shared_memories) memory.Poison();
  state.warps.assign((threads + kWarpSize - 1) / kWarpSize, Barrier());
  state.exchanged.assign(threads, 0.0);
  state.barrier = Barrier();
  state.alive = threads;
  for (Fiber& fiber : state.fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, RunFiber, 0);
    PrepareStack(fiber);
  }
  while (state.alive > 0) {
    state.progressed = false;
    for (unsigned i = 0; i < threads; ++i) {
      if (state.fibers[i].done) continue;
      state.current = i;
      thread_index.x = i;
      SwitchTo(state.fibers[i]);
    }
    if (!state.progressed) {
      std::fprintf(stderr, "emulation: the threads of a block wait for each other forever\n");
      std::abort();
    }
  }
}

inline uint64_t& Seed() {
  static uint64_t seed = 0;
  return seed;
}

template <typename... Args>
void Launch(void (*kernel)(Args...), unsigned blocks, unsigned threads, const Args&... args) {
  ++launches;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), std::mt19937_64(Seed()++));
  static Block state;
  state.fibers.resize(threads);
  state.body = [&] { kernel(args...); };
  grid_size.x = blocks;
  for (unsigned index : order) {
    block_index.x = index;
    RunBlock(state, threads);
  }
}

}  // namespace emulation

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulation::driver_version;
  return cudaSuccess;
}

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_size

inline void __syncthreads() { emulation::Wait(emulation::block->barrier, emulation::block->alive); }

inline bool __syncthreads_or(bool holds) {
  std::vector<double>& holds_of = emulation::block->exchanged;
  holds_of[threadIdx.x] = holds;
  __syncthreads();
  const bool any = std::any_of(holds_of.begin(), holds_of.end(), [](double x) { return x != 0; });
  __syncthreads();
  return any;
}

// Nothing is reordered here: fences have nothing to do.
inline void __threadfence() {}

inline double __shfl_down_sync(unsigned mask, double x, int offset) {
  using namespace emulation;
  if (mask != 0xffffffffu) std::abort();  // only whole warps are emulated
  const unsigned thread = threadIdx.x;
  Barrier& warp = block->warps[thread / kWarpSize];
  block->exchanged[thread] = x;
  Wait(warp, kWarpSize);
  const unsigned source = thread % kWarpSize + offset < kWarpSize ? thread + offset : thread;
  const double result = block->exchanged[source];
  Wait(warp, kWarpSize);
  return result;
}

inline unsigned atomicAdd(unsigned* to, unsigned value) {
  const unsigned before = *to;
  *to += value;
  return before;
}

template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}
