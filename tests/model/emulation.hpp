// Run the kernels of kernels/ on the CPU: every thread of a cluster is a fiber, barriers and warp exchanges switch
// between them, and copies ahead happen as late as they may. Put before the sources, which leave out what needs a GPU
// where EMULATED is defined. Slow, and blind to what is the device's own: memory order, overlap, limits.

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define EMULATED
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

struct Place {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

void yield();

struct Barrier {
  int size, arrived = 0, generation = 0;
  void wait() {
    const int now = generation;
    if (++arrived == size) {
      arrived = 0;
      generation++;
    } else {
      while (now == generation) yield();
    }
  }
};

struct Warp {
  Barrier barrier{32};
  unsigned slots[32][8];
};

struct Block {
  Place index;
  Barrier barrier{0};
  std::vector<Warp> warps;
  unsigned char* memory;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  ucontext_t context;
  Block* block;
  Place thread;
  std::deque<std::vector<Copy>> turns{1};  // the last is not closed yet
  bool is_done = false;
};

static ucontext_t scheduler;
static Fiber* current;
static Place grid_size;
static std::vector<Block>* cluster_blocks;
static Barrier cluster_barrier{0};
static const std::function<void()>* body;

inline void yield() { swapcontext(&current->context, &scheduler); }
inline void begin_fiber() {
  (*body)();
  current->is_done = true;
  yield();
}

#define threadIdx (current->thread)
#define blockIdx (current->block->index)
#define gridDim grid_size
#define DYNAMIC_MEMORY(name) unsigned char* const name = current->block->memory

inline void __syncthreads() { current->block->barrier.wait(); }
inline Warp& own_warp() { return current->block->warps[threadIdx.x / 32]; }
inline void __syncwarp() { own_warp().barrier.wait(); }
inline void __threadfence() {}

template <typename T>
T exchange(T x, int from) {
  static_assert(sizeof(T) == 4, "one register");
  Warp& warp = own_warp();
  std::memcpy(&warp.slots[threadIdx.x % 32][0], &x, 4);
  warp.barrier.wait();
  T y = x;
  if (from >= 0 && from < 32) std::memcpy(&y, &warp.slots[from][0], 4);
  warp.barrier.wait();
  return y;
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return exchange(x, int(threadIdx.x % 32) ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T x, int distance) {
  return exchange(x, int(threadIdx.x % 32) - distance);
}
template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
  return exchange(x, lane);
}
inline int atomicAdd(int* at, int more) { return std::exchange(*at, *at + more); }
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
inline float __int_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned __cvta_generic_to_shared(const void* at) {
  return unsigned(static_cast<const unsigned char*>(at) - current->block->memory);
}

// What the sources leave out
#if defined(FLOAT16)
struct __align__(2) Element {
  unsigned short bits;
};
inline float widen(Element x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return float(y);
}
inline Element narrow(float x) {
  const _Float16 y = _Float16(x);
  Element z;
  std::memcpy(&z, &y, 2);
  return z;
}
#else
typedef float Element;
inline float widen(Element x) { return x; }
inline Element narrow(float x) { return x; }
#endif
inline void await_previous() {}
inline void release_next() {}

inline void copy_ahead(unsigned to, const void* from, int bytes) {
  current->turns.back().push_back({current->block->memory + to, from, bytes});
}
inline void end_turn() { current->turns.emplace_back(); }
template <int N>
void await_turns() {
  while (int(current->turns.size()) - 1 > N) {
    for (const Copy& copy : current->turns.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    current->turns.pop_front();
  }
}
inline uint4 read_shared(unsigned from) {
  uint4 x;
  std::memcpy(&x, current->block->memory + from, 16);
  return x;
}
inline float read_cluster(unsigned from, int rank) {
  float x;
  std::memcpy(&x, (*cluster_blocks)[rank].memory + from, 4);
  return x;
}
inline void meet_cluster() { cluster_barrier.wait(); }

#if defined(FLOAT16)
inline float half_of(unsigned word, int half) {
  Element x{static_cast<unsigned short>(word >> 16 * half)};
  return widen(x);
}
// mma.m16n8k16: lane 4 g + t holds A[g, g + 8][2 t .., 2 t + 8 ..], B[2 t .., 2 t + 8 ..][g], C[g, g + 8][2 t, 2 t + 1]
inline void multiply(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  Warp& warp = own_warp();
  const int lane = threadIdx.x % 32;
  const unsigned own[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(warp.slots[lane], own, sizeof own);
  warp.barrier.wait();
  for (int j = 0; j < 4; j++) {
    const int row = lane / 4 + (j >> 1) * 8, column = lane % 4 * 2 + (j & 1);
    for (int k = 0; k < 16; k++) {
      const int a_lane = row % 8 * 4 + k % 8 / 2, b_lane = column * 4 + k % 8 / 2;
      sum[j] += half_of(warp.slots[a_lane][row / 8 + k / 8 * 2], k % 2) * half_of(warp.slots[b_lane][4 + k / 8], k % 2);
    }
  }
  warp.barrier.wait();
}
#endif

inline void run_cluster(std::vector<Block>& blocks, int num_threads, const std::function<void()>& work) {
  constexpr int STACK = 64 << 10;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  for (Block& block : blocks) {
    for (int i = 0; i < num_threads; i++) {
      auto fiber = std::make_unique<Fiber>();
      fiber->block = &block;
      fiber->thread = {unsigned(i), 0, 0};
      stacks.emplace_back(new char[STACK]);
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = stacks.back().get();
      fiber->context.uc_stack.ss_size = STACK;
      makecontext(&fiber->context, begin_fiber, 0);
      fibers.push_back(std::move(fiber));
    }
  }
  body = &work;
  cluster_blocks = &blocks;
  cluster_barrier = {int(fibers.size())};
  for (long round = 0, left = fibers.size(); left > 0; round++) {
    if (round > 10000000) std::abort();  // a barrier that not all reach
    for (auto& fiber : fibers) {
      if (fiber->is_done) continue;
      current = fiber.get();
      swapcontext(&scheduler, &fiber->context);
      left -= fiber->is_done;
    }
  }
}

template <typename... Arguments, size_t... Index>
void call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<Index...>) {
  kernel(*static_cast<Arguments*>(arguments[Index])...);
}

template <typename... Arguments>
void launch(void (*kernel)(Arguments...), void** arguments, int grid_x, int grid_y, int cluster, int num_threads,
            int shared_bytes) {
  grid_size = {unsigned(grid_x), unsigned(grid_y), 1};
  const std::function<void()> work = [&] { call(kernel, arguments, std::index_sequence_for<Arguments...>()); };
  for (int y = 0; y < grid_y; y += cluster) {
    for (int x = 0; x < grid_x; x++) {
      std::vector<Block> blocks(cluster);
      std::vector<std::vector<uint4>> memories(cluster, std::vector<uint4>(shared_bytes / 16 + 9));
      for (int i = 0; i < cluster; i++) {
        std::memset(memories[i].data(), 0xff, memories[i].size() * 16);  // not a number
        blocks[i].index = {unsigned(x), unsigned(y + i), 0};
        blocks[i].barrier = {num_threads};
        blocks[i].warps.resize(num_threads / 32);
        blocks[i].memory = reinterpret_cast<unsigned char*>(memories[i].data());
      }
      run_cluster(blocks, num_threads, work);
    }
  }
}

#define EMULATE(name)                                                                                             \
  extern "C" void launch_##name(void** arguments, int grid_x, int grid_y, int cluster, int threads, int shared) { \
    launch(name, arguments, grid_x, grid_y, cluster, threads, shared);                                            \
  }
