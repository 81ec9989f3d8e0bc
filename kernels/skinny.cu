// Multiply a few rows by a large matrix at the speed of its memory: out[r, o] = x[r, :] . weight[o, :], on tensor cores
// (mma.sync with the matrix as the first operand), sums in float32. Needs element.cuh before it, float16 or bfloat16,
// and TILES: rows / 8, rounded up.
//
// A block takes BLOCKS_M * 16 * warps_m output channels. Its warps share the input channels in turns of 64 (128 bytes
// of each weight row); so do the `splits` blocks of a cluster. Every thread copies its own weights ahead, STAGES turns
// deep, into a queue of shared memory that no other thread reads, so the loop has no barrier; the first turns are under
// way before the kernel that makes x has ended. The parts are added in a fixed order.

#ifndef EMULATED  // tests/model/emulation.hpp has these for the CPU
#if defined(FLOAT16)
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif

__device__ __forceinline__ void multiply(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void copy_ahead(u32 to, const void* from, int bytes) {  // zeros beyond `bytes` of 16
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void end_turn() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void await_turns() {  // all but the last N
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ uint4 read_shared(u32 from) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from)
               : "memory");
  return x;
}

__device__ __forceinline__ float read_cluster(u32 from, int rank) {  // another block's shared memory
  u32 there;
  float x;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(from), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
  return x;
}

__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#endif

constexpr int TURN = 64;  // input channels

// `gate` > 0: the matrix is two, one of `gate` rows above the other, and out = activated(first) * second. A NORMED
// kernel takes the normalisation of x, as add_norm's of tokens.cu; `shift` null: by the root mean square.
struct Task {
  void* out;
  const Element *x, *weight, *bias, *residual;
  int rows, num_out, num_in, activation, gate, wide;  // wide: out is float32
  const Element *scale, *shift;
  float epsilon;
};

constexpr int PAD = 32;  // elements between two rows of x in shared memory, so that neighbours lie in other banks
constexpr int CHUNK = 256;  // channels of a warp's read: `num_in` is a multiple where x is normalised

// Normalise x into `to` [rows, num_in + PAD], shared, by all threads of the block; `sums` has room for two floats a
// chunk. Numbers are added in a fixed order.
template <int THREADS>
__device__ __forceinline__ void normalise(const Task& task, Element* to, float* sums) {
  const int chunks = task.num_in / CHUNK, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int pitch = task.num_in + PAD;
  float* squares = sums + task.rows * chunks;
  auto mean_of = [&](const float* parts, int row) {
    float x = 0.0f;
    for (int i = 0; i < chunks; i++) x += parts[row * chunks + i];
    return x / task.num_in;
  };
  for (int chunk = warp; chunk < task.rows * chunks; chunk += THREADS / 32) {
    const int row = chunk / chunks, i = chunk % chunks * CHUNK + lane * 8;
    const Vector<8> x = load<8>(task.x + u64(row) * task.num_in + i);
    store<8>(to + row * pitch + i, x);
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; e++) sum += widen(x.at[e]);
    sum = warp_sum(sum);
    if (lane == 0) sums[chunk] = sum;
  }
  __syncthreads();
  for (int chunk = warp; chunk < task.rows * chunks; chunk += THREADS / 32) {
    const int row = chunk / chunks, i = chunk % chunks * CHUNK + lane * 8;
    const float mean = task.shift ? mean_of(sums, row) : 0.0f;
    const Vector<8> x = load<8>(to + row * pitch + i);
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; e++) sum += (widen(x.at[e]) - mean) * (widen(x.at[e]) - mean);
    sum = warp_sum(sum);
    if (lane == 0) squares[chunk] = sum;
  }
  __syncthreads();
  for (int chunk = warp; chunk < task.rows * chunks; chunk += THREADS / 32) {
    const int row = chunk / chunks, i = chunk % chunks * CHUNK + lane * 8;
    const Vector<8> scale = load<8>(task.scale + i);
    Vector<8> x = load<8>(to + row * pitch + i), shift;
    if (task.shift) shift = load<8>(task.shift + i);
    const float mean = task.shift ? mean_of(sums, row) : 0.0f;
    const float factor = rsqrtf(mean_of(squares, row) + task.epsilon);
#pragma unroll
    for (int e = 0; e < 8; e++) {
      x.at[e] = narrow((widen(x.at[e]) - mean) * factor * widen(scale.at[e]) +
                       (task.shift ? widen(shift.at[e]) : 0.0f));
    }
    store<8>(to + row * pitch + i, x);
  }
  __syncthreads();
}

template <int BLOCKS_M, int WARPS_M, int WARPS_K, int STAGES, bool NORMED>
__device__ __forceinline__ void skinny(const Task& task) {
  constexpr int PIECES = BLOCKS_M * 4;  // of 16 bytes, of a thread and turn
  constexpr int THREADS = 32 * WARPS_M * WARPS_K;
  constexpr int CHANNELS = BLOCKS_M * 16;                                            // of a warp
  constexpr int AHEAD = NORMED ? 1 : TILES == 1 && THREADS < 512 ? 4 : TILES <= 2 ? 2 : 1;  // turns that x is read ahead
  DYNAMIC_MEMORY(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  const int warp_m = warp % WARPS_M, warp_k = warp / WARPS_M;
  const int splits = gridDim.y, split = blockIdx.y;
  const int halves = task.gate ? 2 : 1;
  const int tile = CHANNELS * WARPS_M / halves;  // output channels of the block
  const int first = blockIdx.x * tile + warp_m * (CHANNELS / halves);
  const int last = task.num_out - 1;
  const Element* weights[BLOCKS_M][2];
#pragma unroll
  for (int m = 0; m < BLOCKS_M; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int within = (halves == 2 ? m / 2 : m) * 16 + half * 8 + row;
      const u64 channel = min(first + within, last) + (halves == 2 ? (m & 1) * task.gate : 0);
      weights[m][half] = task.weight + channel * task.num_in + quad * 8;
    }
  }
  const int stride = TURN * WARPS_K * splits;
  const int begin = TURN * (split * WARPS_K + warp_k);
  const u32 queue = u32(__cvta_generic_to_shared(memory)) + warp * (STAGES * PIECES * 512) + lane * 16;

  auto fetch = [&](int turn) {
    const int channel = begin + turn * stride;
    if (channel < task.num_in) {
      const u32 to = queue + (turn % STAGES) * (PIECES * 512);
#pragma unroll
      for (int m = 0; m < BLOCKS_M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
          for (int k = 0; k < 2; k++) {
            const int left = task.num_in - (channel + k * 32 + quad * 8);
            copy_ahead(to + ((m * 2 + half) * 2 + k) * 512, weights[m][half] + (left > 0 ? channel + k * 32 : 0),
                       left > 0 ? 16 : 0);
          }
        }
      }
    }
    end_turn();
  };

#pragma unroll
  for (int turn = 0; turn < STAGES - 1; turn++) fetch(turn);
  release_next();
  // The first output that this thread is going to write, so that what is added to it is here by then.
  const int mine_row = (split * THREADS + threadIdx.x) / tile;
  const int mine_channel = blockIdx.x * tile + (split * THREADS + threadIdx.x) % tile;
  const bool is_mine = mine_row < task.rows && mine_channel <= last;
  const u64 mine = u64(mine_row) * task.num_out + mine_channel;
  const float bias = task.bias && is_mine ? widen(task.bias[mine_channel]) : 0.0f;
  await_previous();

  constexpr int QUEUES = WARPS_M * WARPS_K * STAGES * PIECES * 512;  // bytes, before the normalised x
  Element* const normalised = reinterpret_cast<Element*>(memory + QUEUES);
  const int pitch = NORMED ? task.num_in + PAD : task.num_in;
  if (NORMED) {
    normalise<THREADS>(task, normalised, reinterpret_cast<float*>(normalised + task.rows * pitch));
  }
  const Element* const source = NORMED ? normalised : task.x;
  uint4 x[AHEAD][TILES][2];
  auto read = [&](uint4(&to)[TILES][2], int channel) {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      const bool inside = n * 8 + row < task.rows;
      const Element* from = source + u64(n * 8 + row) * pitch + channel + quad * 8;
#pragma unroll
      for (int k = 0; k < 2; k++) {
        to[n][k] = make_uint4(0, 0, 0, 0);
        if (inside && channel + k * 32 + quad * 8 < task.num_in) {
          to[n][k] = *reinterpret_cast<const uint4*>(from + k * 32);
        }
      }
    }
  };
#pragma unroll
  for (int ahead = 0; ahead < AHEAD; ahead++) read(x[ahead], begin + ahead * stride);
  const float residual = task.residual && is_mine ? widen(task.residual[mine]) : 0.0f;

  float sum[BLOCKS_M][TILES][4] = {};
  int turn = 0;
  for (int first_channel = begin; first_channel < task.num_in; first_channel += AHEAD * stride) {
#pragma unroll
    for (int ahead = 0; ahead < AHEAD; ahead++, turn++) {
      const int channel = first_channel + ahead * stride;
      if (channel >= task.num_in) break;
      fetch(turn + STAGES - 1);
      await_turns<STAGES - 1>();
      const u32 at = queue + (turn % STAGES) * (PIECES * 512);
#pragma unroll
      for (int k = 0; k < 2; k++) {
#pragma unroll
        for (int m = 0; m < BLOCKS_M; m++) {
          const uint4 upper = read_shared(at + (m * 4 + k) * 512), lower = read_shared(at + (m * 4 + 2 + k) * 512);
#pragma unroll
          for (int n = 0; n < TILES; n++) {
            // The order of the input channels is the same on both sides, which is all that a sum asks.
            multiply(sum[m][n], upper.x, lower.x, upper.y, lower.y, x[ahead][n][k].x, x[ahead][n][k].y);
            multiply(sum[m][n], upper.z, lower.z, upper.w, lower.w, x[ahead][n][k].z, x[ahead][n][k].w);
          }
        }
      }
      read(x[ahead], channel + AHEAD * stride);
    }
  }
  await_turns<0>();

  // Each warp leaves its sums in its own queue's memory as [rows][channels].
  constexpr int PITCH = CHANNELS + 4;
  static_assert(TILES * 8 * PITCH * 4 <= STAGES * PIECES * 512, "sums fit the queue");
  float* sums = reinterpret_cast<float*>(memory + warp * (STAGES * PIECES * 512));
  __syncwarp();
#pragma unroll
  for (int m = 0; m < BLOCKS_M; m++) {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        sums[(n * 8 + quad * 2 + (j & 1)) * PITCH + m * 16 + row + (j >> 1) * 8] = sum[m][n][j];
      }
    }
  }
  if (splits > 1) {
    meet_cluster();
  } else {
    __syncthreads();
  }
  const u32 shared = u32(__cvta_generic_to_shared(memory));
  auto total = [&](int r, int owner, int channel) {
    float x = 0.0f;
    for (int s = 0; s < splits; s++) {
#pragma unroll
      for (int k = 0; k < WARPS_K; k++) {
        const u32 at = (k * WARPS_M + owner) * (STAGES * PIECES * 512) + (r * PITCH + channel) * 4;
        x += splits > 1 ? read_cluster(shared + at, s) : *reinterpret_cast<const float*>(memory + at);
      }
    }
    return x;
  };
  for (int index = split * THREADS + threadIdx.x; index < tile * task.rows; index += THREADS * splits) {
    const int r = index / tile, within = index % tile, out = blockIdx.x * tile + within;
    if (out > last) continue;
    const int owner = within / (CHANNELS / halves), channel = within % (CHANNELS / halves);
    const int place = halves == 2 ? channel / 16 * 32 + channel % 16 : channel;
    float y = total(r, owner, place);
    const bool is_first = index == split * THREADS + threadIdx.x;
    if (task.bias) y += is_first ? bias : widen(task.bias[out]);
    y = activated(y, task.activation);
    if (halves == 2) {
      const float up = total(r, owner, place + 16);
      y *= up + (task.bias ? widen(task.bias[task.gate + out]) : 0.0f);
    }
    const u64 to = u64(r) * task.num_out + out;
    if (task.residual) y += is_first ? residual : widen(task.residual[to]);
    if (task.wide) {
      reinterpret_cast<float*>(task.out)[to] = y;
    } else {
      reinterpret_cast<Element*>(task.out)[to] = narrow(y);
    }
  }
  if (splits > 1) meet_cluster();  // until all have read this block's sums
}

#define KERNEL(name, blocks_m, warps_m, warps_k, stages, normed)                                                       \
  extern "C" __global__ void                                                                                         \
      __launch_bounds__(32 * warps_m * warps_k, blocks_m == 1 && warps_m * warps_k <= 8 ? 3 : 2)                       \
      name(void* out, const Element* x, const Element* weight, const Element* bias, const Element* residual, int rows, \
           int num_out, int num_in, int activation, int gate, int wide, const Element* scale, const Element* shift,  \
           float epsilon) {                                                                                          \
    skinny<blocks_m, warps_m, warps_k, stages, normed>(Task{out, x, weight, bias, residual, rows, num_out, num_in,   \
                                                            activation, gate, wide, scale, shift, epsilon});         \
  }

#if TILES == 1
#define VARIANT(name, blocks_m, warps_m, warps_k, stages)      \
  KERNEL(name, blocks_m, warps_m, warps_k, stages, false)      \
  KERNEL(name##_normed, blocks_m, warps_m, warps_k, stages, true)
#else
#define VARIANT(name, blocks_m, warps_m, warps_k, stages) KERNEL(name, blocks_m, warps_m, warps_k, stages, false)
#endif

VARIANTS
