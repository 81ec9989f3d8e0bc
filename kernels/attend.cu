// Token generation's attention: from each row's new token to its blocks of the pool, with the rotation of Q and K and
// the append of K and V in the same launch. Needs element.cuh before it, and from the host HEAD_DIM, HEADS, KV_HEADS,
// BLOCK_SIZE, NUM_LAYERS.
//
// The host cuts the rows into items, runs of tokens of one row (flash-decoding). One block takes an item for one K/V
// head and up to 4 of the query heads that share it. The last one of a row to arrive adds the parts, in the items'
// order, so results don't depend on which it was.

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
constexpr u64 TOKEN = KV_HEADS * HEAD_DIM;
constexpr u64 PLANE = BLOCK_SIZE * TOKEN;  // K or V of one block and layer
constexpr int PARTIAL = HEAD_DIM + 2;      // accumulated values, their largest score, the sum of the weights
#define LOWEST __int_as_float(0xff800000)  // minus infinity

struct Item {
  int row, start, stop, share;  // tokens [start, stop) of a row; share = first item of the row | items of it << 16
};

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

extern "C" __global__ void __launch_bounds__(THREADS)
    attend(Element* out, const Element* qkv, Element* pool, const int* context, const int* offsets, const int* tables,
           const Item* items, const float2* rotation, const float* slopes, float* partials, int* arrivals, int layer,
           float scale) {
  release_next();
  const Item item = items[blockIdx.y];  // the host's words were complete before the first kernel of the step
  if (item.row < 0) return;
  const int kv_head = blockIdx.x / PARTS, part = blockIdx.x % PARTS;
  const int first_head = kv_head * GROUP + part * TOGETHER;
  const int num_heads = min(TOGETHER, GROUP - part * TOGETHER);
  const int position = context[item.row];
  const int* table = tables + offsets[item.row];
  const int lane = threadIdx.x % LANES, stream = threadIdx.x / LANES;
  const float2* turns = rotation + u64(position) * (HEAD_DIM / 2);
  Element* const base = pool + u64(layer) * 2 * PLANE + u64(kv_head) * HEAD_DIM;
  await_previous();

  __shared__ __align__(16) Element fresh[2][(HEAD_DIM + 7) / 8 * 8];  // the new token's K and V
  const Element* row = qkv + u64(item.row) * (HEADS + 2 * KV_HEADS) * HEAD_DIM;
  if (item.stop > position) {
    Element* target = base + u64(table[position / BLOCK_SIZE]) * NUM_LAYERS * 2 * PLANE + position % BLOCK_SIZE * TOKEN;
    for (int i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
      const Element key = narrow(rotated(row + (HEADS + kv_head) * HEAD_DIM, turns, i));
      const Element value = row[(HEADS + KV_HEADS + kv_head) * HEAD_DIM + i];
      fresh[0][i] = key;
      fresh[1][i] = value;
      if (part == 0) {
        target[i] = key;
        target[PLANE + i] = value;
      }
    }
    __syncthreads();
  }

  float query[TOGETHER][VECTORS][SIZE], sum[TOGETHER][VECTORS][SIZE], largest[TOGETHER], total[TOGETHER];
#pragma unroll
  for (int h = 0; h < TOGETHER; h++) {
    largest[h] = LOWEST;
    total[h] = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
#pragma unroll
      for (int e = 0; e < SIZE; e++) {
        const int i = (lane + v * LANES) * SIZE + e;
        const bool inside = h < num_heads && i < HEAD_DIM;
        query[h][v][e] = inside ? rotated(row + (first_head + h) * HEAD_DIM, turns, i) * scale * 1.44269504f : 0.0f;
        sum[h][v][e] = 0.0f;
      }
    }
  }

  int blocks[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) blocks[u] = table[min(item.start + stream + u * STREAMS, item.stop - 1) / BLOCK_SIZE];
  for (int begin = item.start + stream; begin - stream < item.stop; begin += STREAMS * UNROLL) {
    Vector<SIZE> keys[UNROLL][VECTORS], values[UNROLL][VECTORS];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int token = min(begin + u * STREAMS, item.stop - 1);
      const Element* key = base + u64(blocks[u]) * NUM_LAYERS * 2 * PLANE + u64(token % BLOCK_SIZE) * TOKEN;
      const Element* value = key + PLANE;
      if (token == position) {
        key = fresh[0];
        value = fresh[1];
      }
#pragma unroll
      for (int v = 0; v < VECTORS; v++) {
        const int i = (lane + v * LANES) * SIZE;
        if (i >= HEAD_DIM) break;
        keys[u][v] = load<SIZE>(key + i);
        values[u][v] = load<SIZE>(value + i);
      }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {  // the next round's blocks, behind this round's loads
      blocks[u] = table[min(begin + (UNROLL + u) * STREAMS, item.stop - 1) / BLOCK_SIZE];
    }
#pragma unroll
    for (int h = 0; h < TOGETHER; h++) {
      float score[UNROLL], top = largest[h];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        score[u] = 0.0f;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
          if ((lane + v * LANES) * SIZE >= HEAD_DIM) break;
#pragma unroll
          for (int e = 0; e < SIZE; e++) score[u] += query[h][v][e] * widen(keys[u][v].at[e]);
        }
#pragma unroll
        for (int mask = LANES / 2; mask > 0; mask /= 2) score[u] += __shfl_xor_sync(~0u, score[u], mask);
        const int token = begin + u * STREAMS;
#ifdef ALIBI
        score[u] += slopes[first_head + min(h, num_heads - 1)] * float(token - position) * 1.44269504f;
#endif
        if (token >= item.stop) score[u] = LOWEST;
        top = fmaxf(top, score[u]);
      }
      const float shift = top == LOWEST ? 0.0f : top;
      const float fade = exp2f(largest[h] - shift);
      largest[h] = top;
      total[h] *= fade;
      float weight[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        weight[u] = exp2f(score[u] - shift);
        total[h] += weight[u];
      }
#pragma unroll
      for (int v = 0; v < VECTORS; v++) {
        if ((lane + v * LANES) * SIZE >= HEAD_DIM) break;
#pragma unroll
        for (int e = 0; e < SIZE; e++) {
          float x = sum[h][v][e] * fade;
#pragma unroll
          for (int u = 0; u < UNROLL; u++) x += weight[u] * widen(values[u][v].at[e]);
          sum[h][v][e] = x;
        }
      }
    }
  }

  // Every stream holds a softmax of its own: bring those of a block together.
  __shared__ float held[STREAMS][TOGETHER][PARTIAL];
#pragma unroll
  for (int h = 0; h < TOGETHER; h++) {
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      if ((lane + v * LANES) * SIZE >= HEAD_DIM) break;
#pragma unroll
      for (int e = 0; e < SIZE; e++) held[stream][h][(lane + v * LANES) * SIZE + e] = sum[h][v][e];
    }
    if (lane == 0) {
      held[stream][h][HEAD_DIM] = largest[h];
      held[stream][h][HEAD_DIM + 1] = total[h];
    }
  }
  __syncthreads();
  const int first_item = item.share & 0xFFFF, num_items = item.share >> 16;
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
    if (num_items == 1) {
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
  if (num_items == 1) return;

  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  int* arrived = arrivals + item.row * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) is_last = atomicAdd(arrived, 1) == num_items - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  if (threadIdx.x == 0) *arrived = 0;  // for the next layer
  for (int index = threadIdx.x; index < num_heads * HEAD_DIM; index += THREADS) {
    const int h = index / HEAD_DIM, i = index % HEAD_DIM;
    const float* partial = partials + (u64(first_item) * HEADS + first_head + h) * PARTIAL;
    float top = LOWEST, weights = 0.0f, x = 0.0f;
    for (int n = 0; n < num_items; n++) {
      const float* other = partial + u64(n) * HEADS * PARTIAL;
      const float higher = fmaxf(top, __ldcg(other + HEAD_DIM));
      const float fade = exp2f(top - higher), factor = exp2f(__ldcg(other + HEAD_DIM) - higher);
      x = x * fade + factor * __ldcg(other + i);
      weights = weights * fade + factor * __ldcg(other + HEAD_DIM + 1);
      top = higher;
    }
    out[(u64(item.row) * HEADS + first_head + h) * HEAD_DIM + i] = narrow(x / weights);
  }
}
