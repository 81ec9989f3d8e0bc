// Token generation's attention: from each row's new token to its blocks of the pool, with the rotation of Q and K and
// the append of K and V in the same launch. Needs element.cuh before it, and from the host HEAD_DIM, HEADS, KV_HEADS,
// BLOCK_SIZE, NUM_LAYERS.
//
// Every row is cut into items, runs of at most `longest` tokens (flash-decoding). One block takes an item for one K/V
// head and up to 4 of the query heads that share it. The last one of a row to arrive adds the parts, in the items'
// order, so results don't depend on which it was. Earlier tokens' K and V are no kernel's of this step, so the first
// of them are read before the kernel that makes Q has ended.

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int GROUP = HEADS / KV_HEADS;
constexpr int PARTS = (GROUP + 3) / 4;                 // blocks that share a K/V head
constexpr int TOGETHER = (GROUP + PARTS - 1) / PARTS;  // query heads of a block
constexpr int SIZE = vector_size(HEAD_DIM);
__host__ __device__ constexpr int power_of_two(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}
constexpr int LANES = power_of_two(HEAD_DIM / SIZE) < 32 ? power_of_two(HEAD_DIM / SIZE) : 32;  // that share a token
constexpr int VECTORS = (HEAD_DIM / SIZE + LANES - 1) / LANES;                                  // of a lane
constexpr int STREAMS = THREADS / LANES;  // tokens that a block looks at side by side
constexpr int UNROLL = TOGETHER * VECTORS > 4 ? 2 : 4;
constexpr int ROUND = STREAMS * UNROLL;
constexpr u64 TOKEN = KV_HEADS * HEAD_DIM;
constexpr u64 PLANE = BLOCK_SIZE * TOKEN;  // K or V of one block and layer
constexpr int PARTIAL = HEAD_DIM + 2;      // accumulated values, their largest score, the sum of the weights
constexpr float LOG2E = 1.44269504f;
#define LOWEST __int_as_float(0xff800000)  // minus infinity

struct Item {
  int row, start, stop, first, count;  // tokens [start, stop) of a row, which is cut into `count` items from `first` on
};

// Find the item of an index, in the order of the rows; row -1 where there are fewer. A warp does this together.
__device__ __forceinline__ void find_item(Item* item, const int* context, int num_rows, int longest, int index) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) item->row = -1;
  __syncwarp();
  int before = 0;
  for (int begin = 0; begin < num_rows; begin += 32) {
    const int row = begin + lane;
    const int length = row < num_rows ? context[row] + 1 : 0;  // none of a padded row, whose context is -1
    const int count = (length + longest - 1) / longest;
    int end = count;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, end, distance);
      if (lane >= distance) end += other;
    }
    const int first = before + end - count;
    if (index >= first && index < first + count) {
      const int each = (length + count - 1) / count;
      *item = {row, (index - first) * each, min(length, (index - first + 1) * each), first, count};
    }
    before += __shfl_sync(~0u, end, 31);
  }
}

// The rotated or plain element i of a head of qkv.
__device__ __forceinline__ float rotated(const Element* head, const float2* turns, int i) {
  const float x = widen(head[i]);
#ifdef ROTARY
  constexpr int HALF = HEAD_DIM / 2;
  const float2 turn = turns[i % HALF];
  return i < HALF ? x * turn.x - widen(head[i + HALF]) * turn.y : x * turn.x + widen(head[i - HALF]) * turn.y;
#else
  return x;
#endif
}

// The softmax of what one stream of lanes has seen, for each query head of the block.
struct Softmax {
  float sum[TOGETHER][VECTORS][SIZE], largest[TOGETHER], total[TOGETHER];
};

// Take COUNT tokens of every stream, but for those that are not `inside`; `distance` is from the new token, for ALiBi.
template <int COUNT>
__device__ __forceinline__ void take(Softmax& seen, const float (&query)[TOGETHER][VECTORS][SIZE],
                                     const Vector<SIZE> (&keys)[COUNT][VECTORS],
                                     const Vector<SIZE> (&values)[COUNT][VECTORS], const float (&distance)[COUNT],
                                     const bool (&inside)[COUNT], const float* slopes, int lane) {
#pragma unroll
  for (int h = 0; h < TOGETHER; h++) {
    float score[COUNT], top = seen.largest[h];
#pragma unroll
    for (int u = 0; u < COUNT; u++) {
      score[u] = 0.0f;
#pragma unroll
      for (int v = 0; v < VECTORS; v++) {
        if ((lane + v * LANES) * SIZE >= HEAD_DIM) break;
#pragma unroll
        for (int e = 0; e < SIZE; e++) score[u] += query[h][v][e] * widen(keys[u][v].at[e]);
      }
#pragma unroll
      for (int mask = LANES / 2; mask > 0; mask /= 2) score[u] += __shfl_xor_sync(~0u, score[u], mask);
#ifdef ALIBI
      score[u] += slopes[h] * distance[u] * LOG2E;
#endif
      if (!inside[u]) score[u] = LOWEST;
      top = fmaxf(top, score[u]);
    }
    const float shift = top == LOWEST ? 0.0f : top;
    const float fade = exp2f(seen.largest[h] - shift);
    seen.largest[h] = top;
    seen.total[h] *= fade;
#pragma unroll
    for (int u = 0; u < COUNT; u++) {
      score[u] = exp2f(score[u] - shift);
      seen.total[h] += score[u];
    }
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      if ((lane + v * LANES) * SIZE >= HEAD_DIM) break;
#pragma unroll
      for (int e = 0; e < SIZE; e++) {
        float x = seen.sum[h][v][e] * fade;
#pragma unroll
        for (int u = 0; u < COUNT; u++) x += score[u] * widen(values[u][v].at[e]);
        seen.sum[h][v][e] = x;
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attend(Element* out, const Element* qkv, Element* pool, const int* context, const int* offsets, const int* tables,
           const int* longest, const float2* rotation, const float* slopes, float* partials, int* arrivals,
           int num_rows, int layer, float scale) {
  release_next();
  // The host's words were complete before the first kernel of the step.
  __shared__ Item shared_item;
  if (threadIdx.x < 32) find_item(&shared_item, context, num_rows, *longest, blockIdx.y);
  __syncthreads();
  const Item item = shared_item;
  if (item.row < 0) return;
  const int kv_head = blockIdx.x / PARTS, part = blockIdx.x % PARTS;
  const int first_head = kv_head * GROUP + part * TOGETHER;
  const int num_heads = min(TOGETHER, GROUP - part * TOGETHER);
  const int position = context[item.row];
  const int stop = min(item.stop, position);  // of the earlier tokens
  const int* table = tables + offsets[item.row];
  const int lane = threadIdx.x % LANES, stream = threadIdx.x / LANES;
  const float2* turns = rotation + u64(position) * (HEAD_DIM / 2);
  Element* const base = pool + u64(layer) * 2 * PLANE + u64(kv_head) * HEAD_DIM;

  Vector<SIZE> keys[UNROLL][VECTORS], values[UNROLL][VECTORS];
  int blocks[UNROLL];  // of the round to come
  auto look_up = [&](int begin) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++) blocks[u] = table[min(begin + stream + u * STREAMS, stop - 1) / BLOCK_SIZE];
  };
  auto fetch = [&](int begin) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int token = min(begin + stream + u * STREAMS, stop - 1);
      const Element* key = base + u64(blocks[u]) * NUM_LAYERS * 2 * PLANE + u64(token % BLOCK_SIZE) * TOKEN;
#pragma unroll
      for (int v = 0; v < VECTORS; v++) {
        const int i = (lane + v * LANES) * SIZE;
        if (i >= HEAD_DIM) break;
        keys[u][v] = load<SIZE>(key + i);
        values[u][v] = load<SIZE>(key + PLANE + i);
      }
    }
    look_up(begin + ROUND);
  };
  if (item.start < stop) {
    look_up(item.start);
    fetch(item.start);
  }
  await_previous();

  const Element* row = qkv + u64(item.row) * (HEADS + 2 * KV_HEADS) * HEAD_DIM;
  float query[TOGETHER][VECTORS][SIZE];
  Softmax seen;
#pragma unroll
  for (int h = 0; h < TOGETHER; h++) {
    seen.largest[h] = LOWEST;
    seen.total[h] = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
#pragma unroll
      for (int e = 0; e < SIZE; e++) {
        const int i = (lane + v * LANES) * SIZE + e;
        const bool inside = h < num_heads && i < HEAD_DIM;
        query[h][v][e] = inside ? rotated(row + (first_head + h) * HEAD_DIM, turns, i) * scale * LOG2E : 0.0f;
        seen.sum[h][v][e] = 0.0f;
      }
    }
  }
#ifdef ALIBI
  float own_slopes[TOGETHER];
#pragma unroll
  for (int h = 0; h < TOGETHER; h++) own_slopes[h] = slopes[first_head + min(h, num_heads - 1)];
#else
  const float* own_slopes = nullptr;
#endif

  if (item.stop > position) {  // the new token is this item's: the first stream takes it, part 0 stores it
    Vector<SIZE> key[1][VECTORS], value[1][VECTORS];
    const u64 place = u64(table[position / BLOCK_SIZE]) * NUM_LAYERS * 2 * PLANE + u64(position % BLOCK_SIZE) * TOKEN;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      const int i = (lane + v * LANES) * SIZE;
      if (i >= HEAD_DIM) break;
#pragma unroll
      for (int e = 0; e < SIZE; e++) key[0][v].at[e] = narrow(rotated(row + (HEADS + kv_head) * HEAD_DIM, turns, i + e));
      value[0][v] = load<SIZE>(row + (HEADS + KV_HEADS + kv_head) * HEAD_DIM + i);
      if (stream == 0 && part == 0) {
        store<SIZE>(base + place + i, key[0][v]);
        store<SIZE>(base + place + PLANE + i, value[0][v]);
      }
    }
    const float distance[1] = {0.0f};
    const bool inside[1] = {stream == 0};
    take<1>(seen, query, key, value, distance, inside, own_slopes, lane);
  }
  for (int begin = item.start; begin < stop; begin += ROUND) {
    float distance[UNROLL];
    bool inside[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int token = begin + stream + u * STREAMS;
      distance[u] = float(token - position);
      inside[u] = token < stop;
    }
    take<UNROLL>(seen, query, keys, values, distance, inside, own_slopes, lane);
    if (begin + ROUND < stop) fetch(begin + ROUND);
  }

  // Every stream holds a softmax of its own: bring those of a block together.
  __shared__ float held[STREAMS][TOGETHER][PARTIAL];
#pragma unroll
  for (int h = 0; h < TOGETHER; h++) {
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      if ((lane + v * LANES) * SIZE >= HEAD_DIM) break;
#pragma unroll
      for (int e = 0; e < SIZE; e++) held[stream][h][(lane + v * LANES) * SIZE + e] = seen.sum[h][v][e];
    }
    if (lane == 0) {
      held[stream][h][HEAD_DIM] = seen.largest[h];
      held[stream][h][HEAD_DIM + 1] = seen.total[h];
    }
  }
  __syncthreads();
  for (int index = threadIdx.x; index < num_heads * HEAD_DIM; index += THREADS) {
    const int h = index / HEAD_DIM, i = index % HEAD_DIM;
    float top = LOWEST, weights = 0.0f, x = 0.0f;
#pragma unroll
    for (int s = 0; s < STREAMS; s++) top = fmaxf(top, held[s][h][HEAD_DIM]);
#pragma unroll
    for (int s = 0; s < STREAMS; s++) {
      const float factor = exp2f(held[s][h][HEAD_DIM] - top);
      x += factor * held[s][h][i];
      weights += factor * held[s][h][HEAD_DIM + 1];
    }
    if (item.count == 1) {
      out[(u64(item.row) * HEADS + first_head + h) * HEAD_DIM + i] = narrow(x / weights);
    } else {
      float* partial = partials + (u64(blockIdx.y) * HEADS + first_head + h) * PARTIAL;
      partial[i] = x;
      if (i == 0) {
        partial[HEAD_DIM] = top;
        partial[HEAD_DIM + 1] = weights;
      }
    }
  }
  if (item.count == 1) return;

  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  int* arrived = arrivals + item.row * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) is_last = atomicAdd(arrived, 1) == item.count - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  if (threadIdx.x == 0) *arrived = 0;  // for the next layer
  for (int index = threadIdx.x; index < num_heads * HEAD_DIM; index += THREADS) {
    const int h = index / HEAD_DIM, i = index % HEAD_DIM;
    const float* partial = partials + (u64(item.first) * HEADS + first_head + h) * PARTIAL;
    float top = LOWEST, weights = 0.0f, x = 0.0f;
#pragma unroll 4
    for (int n = 0; n < item.count; n++) {
      const float* other = partial + u64(n) * HEADS * PARTIAL;
      const float largest = __ldcg(other + HEAD_DIM), value = __ldcg(other + i), weight = __ldcg(other + HEAD_DIM + 1);
      const float higher = fmaxf(top, largest);
      const float fade = exp2f(top - higher), factor = exp2f(largest - higher);
      x = x * fade + factor * value;
      weights = weights * fade + factor * weight;
      top = higher;
    }
    out[(u64(item.row) * HEADS + first_head + h) * HEAD_DIM + i] = narrow(x / weights);
  }
}
