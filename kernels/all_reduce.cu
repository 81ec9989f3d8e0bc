// Sums a tensor over the ranks of a tensor group, in place, through memory that the ranks have mapped of each other.
//
// Every rank runs the same kernels in the same order, on one stream; each call is an epoch. The count of epochs lies in
// device memory and the kernel advances it, so a captured graph can be replayed. Every rank adds in the order of ranks,
// in float32, so all get the same bits.
//
// A rank's exported memory: the epoch, the number of blocks that have finished, and whether the host said stop; flags of the two-shot sum; lines of
// the one-shot sum, [2 slots][source rank][line]; parts and results of the two-shot sum, [source rank][vector].
//
// One shot: each rank stores its tensor into every other rank's lines. A line is 16 bytes, two words of data each with
// the epoch behind it, and 8 bytes arrive whole: who sees the epoch has the data, without a flag or a fence. Two slots
// are enough: a rank writes slot e % 2 in epoch e, after it has seen the others in epoch e - 1, which they began after
// they had read that slot in epoch e - 2.
//
// Two shots: each rank adds up one share of the tensor, whose parts the others store into its memory, and stores the
// result into theirs; flags per block say when. One slot is enough: a rank ends an epoch only when it has the others'
// results, which they stored after they had read its parts; and it stores results only when it has their parts, which
// they stored after they had read its earlier results.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 MAX_RANKS = 8;
constexpr u32 MAX_BLOCKS = 256;
constexpr u32 EPOCH_WORD = 0, FINISHED_WORD = 1, STOPPED_WORD = 2, FLAGS_WORD = 64;  // of a rank's memory
constexpr u32 STOP_WORD = 0, LATE_WORD = 1;                        // words of the host's memory
constexpr u32 SPINS = 256;                                         // looks before a wait begins to sleep
constexpr u32 PATIENCE = 4096;                                     // looks between two at the host's memory

struct Group {
  u64 memory[MAX_RANKS];  // of each rank, as mapped here
  u64 host;               // pinned: stop and late
  u64 lines, line_stride, slot_stride;     // bytes: offset, from source to source, from slot to slot
  u64 parts, results, share_stride;        // bytes: offsets, from source to source
  u64 deadline_ns;
  u32 rank, size;
};

struct __align__(16) Vector {
  u32 word[4];
};

__device__ __forceinline__ Vector load_volatile(u64 from) {
  Vector v;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_volatile(u64 to, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ void release_flag(u64 to, u32 value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

__device__ __forceinline__ u32 acquire_flag(u64 from) {
  u32 value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

__device__ __forceinline__ u64 now_ns() {
  u64 ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

// Numbers: one word holds one float32 or two 16-bit numbers.

struct Float32 {
  static constexpr u32 PER_WORD = 1;
  static __device__ __forceinline__ void add(float* sum, u32 word) { sum[0] += __uint_as_float(word); }
  static __device__ __forceinline__ u32 round(const float* sum) { return __float_as_uint(sum[0]); }
};

struct Float16 {
  static constexpr u32 PER_WORD = 2;
  static __device__ __forceinline__ void add(float* sum, u32 word) {
    float low, high;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high)
        : "r"(word));
    sum[0] += low;
    sum[1] += high;
  }
  static __device__ __forceinline__ u32 round(const float* sum) {
    u32 word;
    asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }"
        : "=r"(word)
        : "f"(sum[0]), "f"(sum[1]));
    return word;
  }
};

struct BFloat16 {
  static constexpr u32 PER_WORD = 2;
  static __device__ __forceinline__ void add(float* sum, u32 word) {
    sum[0] += __uint_as_float(word << 16);
    sum[1] += __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ u32 round(const float* sum) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(sum[1]), "f"(sum[0]));
    return word;
  }
};

// Waits: they end when the host says stop, and tell it when they took longer than the deadline.

struct Patience {
  u32 looks = 0;
  u64 begin_ns = 0;

  // Say whether to give up; called after each look that found nothing.
  __device__ __forceinline__ bool gives_up(const Group& group) {
    if (++looks > SPINS) __nanosleep(100);
    return looks % PATIENCE == 0 && look_at_host(group);
  }

  __device__ __noinline__ bool look_at_host(const Group& group) {
    volatile u32* host = reinterpret_cast<volatile u32*>(group.host);
    const u64 now = now_ns();
    if (begin_ns == 0) begin_ns = now;
    if (now - begin_ns > group.deadline_ns) host[LATE_WORD] = host[STOP_WORD] = 1;
    if (host[STOP_WORD] == 0) return false;
    reinterpret_cast<volatile u32*>(group.memory[group.rank])[STOPPED_WORD] = 1;
    return true;
  }
};

// A call, and whether it has nothing to wait for, since the host has said stop.
struct Call {
  u32 epoch;
  bool is_stopped;

  __device__ __forceinline__ explicit Call(const Group& group) {
    const Vector words = load_volatile(group.memory[group.rank]);
    epoch = words.word[EPOCH_WORD] + 1;
    if (epoch == 0) epoch = 1;  // 0 is what memory holds that was never written
    is_stopped = words.word[STOPPED_WORD] != 0;
  }
};

// The last block of a call advances the epoch; none reads it any more.
__device__ __forceinline__ void finish(const Group& group, u32 epoch) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  volatile u32* words = reinterpret_cast<volatile u32*>(group.memory[group.rank]);
  if (atomicInc(const_cast<u32*>(words) + FINISHED_WORD, gridDim.x - 1) == gridDim.x - 1) words[EPOCH_WORD] = epoch;
}

template <typename Number>
__device__ __forceinline__ void one_shot(const Group& group, uint2* data, u32 num_lines) {
  const Call call(group);
  const u32 epoch = call.epoch;
  const u64 slot = group.lines + (epoch & 1) * group.slot_stride;
  const u32 stride = gridDim.x * blockDim.x, first = blockIdx.x * blockDim.x + threadIdx.x;

  const u64 mine = slot + group.rank * group.line_stride;
  for (u32 line = first; line < num_lines; line += stride) {
    const uint2 own = data[line];
    for (u32 k = 1; k < group.size; k++) {
      const u32 peer = (group.rank + k) % group.size;
      store_volatile(group.memory[peer] + mine + line * 16ull, own.x, epoch, own.y, epoch);
    }
  }

  Patience patience;
  bool gave_up = call.is_stopped;
  const u64 here = group.memory[group.rank] + slot;
  for (u32 line = first; line < num_lines && !gave_up; line += stride) {
    const uint2 own = data[line];
    float low[Number::PER_WORD] = {}, high[Number::PER_WORD] = {};
    for (u32 source = 0; source < group.size; source++) {
      Vector v = {own.x, epoch, own.y, epoch};
      if (source != group.rank) {
        const u64 from = here + source * group.line_stride + line * 16ull;
        v = load_volatile(from);
        while ((v.word[1] != epoch || v.word[3] != epoch) && !gave_up) {
          gave_up = patience.gives_up(group);
          v = load_volatile(from);
        }
      }
      Number::add(low, v.word[0]);
      Number::add(high, v.word[2]);
    }
    data[line] = make_uint2(Number::round(low), Number::round(high));
  }
  finish(group, epoch);
}

// Tell every other rank that this block has stored what it is due in this phase.
__device__ __forceinline__ void say(const Group& group, u32 phase, const Call& call) {
  __syncthreads();
  if (threadIdx.x < group.size && threadIdx.x != group.rank) {
    const u32 word = FLAGS_WORD + (phase * MAX_BLOCKS + blockIdx.x) * MAX_RANKS + group.rank;
    release_flag(group.memory[threadIdx.x] + word * 4ull, call.epoch);
  }
}

// Wait until the same block of every other rank has said so; false where that was given up.
__device__ __forceinline__ bool hear(const Group& group, u32 phase, const Call& call) {
  bool gave_up = call.is_stopped;
  if (threadIdx.x < group.size && threadIdx.x != group.rank) {
    const u32 word = FLAGS_WORD + (phase * MAX_BLOCKS + blockIdx.x) * MAX_RANKS + threadIdx.x;
    Patience patience;
    while (!gave_up && acquire_flag(group.memory[group.rank] + word * 4ull) != call.epoch)
      gave_up = patience.gives_up(group);
  }
  return __syncthreads_or(gave_up) == 0;
}

__device__ __forceinline__ void store_plain(u64 to, const Vector& v) { *reinterpret_cast<Vector*>(to) = v; }

template <typename Number>
__device__ __forceinline__ void two_shot(const Group& group, Vector* data, u32 num_vectors, u32 share) {
  const Call call(group);
  const u64 place = u64(blockIdx.x) * share * 16;  // of this block, in each source's parts and results
  const u64 mine = group.rank * group.share_stride + place;
  auto begin = [&](u32 rank) { return min((blockIdx.x * group.size + rank) * share, num_vectors); };
  auto end = [&](u32 rank) { return min((blockIdx.x * group.size + rank + 1) * share, num_vectors); };

  for (u32 k = 1; k < group.size; k++) {
    const u32 peer = (group.rank + k) % group.size, first = begin(peer);
    for (u32 i = first + threadIdx.x; i < end(peer); i += blockDim.x)
      store_plain(group.memory[peer] + group.parts + mine + (i - first) * 16ull, data[i]);
  }
  say(group, 0, call);
  if (!hear(group, 0, call)) return;

  const u64 here = group.memory[group.rank];
  const u32 own = begin(group.rank);
  for (u32 i = own + threadIdx.x; i < end(group.rank); i += blockDim.x) {
    const Vector held = data[i];
    float sum[4][Number::PER_WORD] = {};
    for (u32 source = 0; source < group.size; source++) {
      Vector v = held;
      if (source != group.rank)
        v = load_volatile(here + group.parts + source * group.share_stride + place + (i - own) * 16ull);
#pragma unroll
      for (u32 w = 0; w < 4; w++) Number::add(sum[w], v.word[w]);
    }
    Vector total;
#pragma unroll
    for (u32 w = 0; w < 4; w++) total.word[w] = Number::round(sum[w]);
    data[i] = total;
    for (u32 k = 1; k < group.size; k++) {
      const u32 peer = (group.rank + k) % group.size;
      store_plain(group.memory[peer] + group.results + mine + (i - own) * 16ull, total);
    }
  }
  say(group, 1, call);
  if (!hear(group, 1, call)) return;

  for (u32 k = 1; k < group.size; k++) {
    const u32 peer = (group.rank + k) % group.size, first = begin(peer);
    for (u32 i = first + threadIdx.x; i < end(peer); i += blockDim.x)
      data[i] = load_volatile(here + group.results + peer * group.share_stride + place + (i - first) * 16ull);
  }
  finish(group, call.epoch);
}

#define KERNELS(name, Number)                                                                         \
  extern "C" __global__ void one_shot_##name(const __grid_constant__ Group group, uint2* data, u32 lines) {  \
    one_shot<Number>(group, data, lines);                                                             \
  }                                                                                                   \
  extern "C" __global__ void two_shot_##name(const __grid_constant__ Group group, Vector* data, u32 vectors, u32 share) { \
    two_shot<Number>(group, data, vectors, share);                                                    \
  }

KERNELS(float32, Float32)
KERNELS(float16, Float16)
KERNELS(bfloat16, BFloat16)
