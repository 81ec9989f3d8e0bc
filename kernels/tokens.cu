// What happens to each token's vector by itself: embedding, residual addition with normalisation, activation, and the
// append of a prompt's K and V. Needs element.cuh before it.

constexpr int THREADS = 256;

// out[t] = (base ? base[t] : table[ids[t]]) + (places ? places[max(0, positions[t]) + offset] : 0), `width` elements
extern "C" __global__ void __launch_bounds__(THREADS)
    embed(Element* out, const Element* base, const int* ids, const Element* table, const int* positions,
          const Element* places, int width, int offset) {
  release_next();
  await_previous();
  const u64 token = blockIdx.x;
  const Element* from = base ? base + token * width : table + u64(ids[token]) * width;
  const int position = positions[token] > 0 ? positions[token] : 0;
  const Element* place = places + u64(position + offset) * width;
  for (int i = threadIdx.x; i < width; i += THREADS) {
    float x = widen(from[i]);
    if (places) x += widen(place[i]);
    out[token * width + i] = narrow(x);
  }
}

// out[t, i] = activated(x[t, i]) * (gated ? x[t, width + i] : 1), SIZE of them a thread
template <int SIZE>
__device__ __forceinline__ void activate_vector(Element* out, const Element* x, int width, int gated, int activation) {
  const int i = (blockIdx.x * THREADS + threadIdx.x) * SIZE;
  if (i >= width) return;
  const u64 token = blockIdx.y;
  const Element* row = x + token * width * (gated ? 2 : 1) + i;
  const Vector<SIZE> first = load<SIZE>(row);
  Vector<SIZE> second, y;
  if (gated) second = load<SIZE>(row + width);
#pragma unroll
  for (int e = 0; e < SIZE; e++) {
    y.at[e] = narrow(activated(widen(first.at[e]), activation) * (gated ? widen(second.at[e]) : 1.0f));
  }
  store<SIZE>(out + token * width + i, y);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    activate(Element* out, const Element* x, int width, int gated, int activation) {
  release_next();
  await_previous();
  constexpr int MOST = 16 / int(sizeof(Element));
  if (width % MOST == 0) {
    activate_vector<MOST>(out, x, width, gated, activation);
  } else {
    activate_vector<1>(out, x, width, gated, activation);
  }
}

#ifdef HIDDEN
constexpr int SIZE = vector_size(HIDDEN);
constexpr int VECTORS = (HIDDEN / SIZE + NORM_THREADS - 1) / NORM_THREADS;  // of one thread

__device__ __forceinline__ float block_sum(float x, float (&shared)[NORM_THREADS / 32]) {  // `shared` for this sum alone
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < NORM_THREADS / 32; i++) total += shared[i];
  return total;
}

// x = hidden[t] (+ partial[t] + bias, stored back to hidden[t]); out[t] = norm(x) * weight + shift, where out is given.
// One block takes one token. `shift` null and RMS: root mean square; else mean and variance.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    add_norm(Element* out, Element* hidden, const Element* partial, const Element* bias, const Element* weight,
             const Element* shift, float epsilon) {
  release_next();
  __shared__ float sums[NORM_THREADS / 32], square_sums[NORM_THREADS / 32];
  Vector<SIZE> scales[VECTORS], shifts[VECTORS];
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const int i = (threadIdx.x + v * NORM_THREADS) * SIZE;
    if (i >= HIDDEN) break;
    if (weight) scales[v] = load<SIZE>(weight + i);
    if (shift) shifts[v] = load<SIZE>(shift + i);
  }
  await_previous();
  Element* row = hidden + u64(blockIdx.x) * HIDDEN;
  float x[VECTORS][SIZE], sum = 0.0f;
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const int i = (threadIdx.x + v * NORM_THREADS) * SIZE;
    const bool inside = i < HIDDEN;
    Vector<SIZE> held;
    if (inside) held = load<SIZE>(row + i);
#pragma unroll
    for (int e = 0; e < SIZE; e++) x[v][e] = inside ? widen(held.at[e]) : 0.0f;
    if (partial && inside) {
      const Vector<SIZE> more = load<SIZE>(partial + u64(blockIdx.x) * HIDDEN + i);
      Vector<SIZE> extra;
      if (bias) extra = load<SIZE>(bias + i);
#pragma unroll
      for (int e = 0; e < SIZE; e++) {
        held.at[e] = narrow(x[v][e] + widen(more.at[e]) + (bias ? widen(extra.at[e]) : 0.0f));
        x[v][e] = widen(held.at[e]);
      }
      store<SIZE>(row + i, held);
    }
#pragma unroll
    for (int e = 0; e < SIZE; e++) sum += x[v][e];
  }
  if (!out) return;
#ifdef RMS
  const float mean = 0.0f;
#else
  const float mean = block_sum(sum, sums) / HIDDEN;
#endif
  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    if ((threadIdx.x + v * NORM_THREADS) * SIZE >= HIDDEN) break;
#pragma unroll
    for (int e = 0; e < SIZE; e++) squares += (x[v][e] - mean) * (x[v][e] - mean);
  }
  const float factor = rsqrtf(block_sum(squares, square_sums) / HIDDEN + epsilon);
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const int i = (threadIdx.x + v * NORM_THREADS) * SIZE;
    if (i >= HIDDEN) break;
    Vector<SIZE> y;
#pragma unroll
    for (int e = 0; e < SIZE; e++) {
      y.at[e] = narrow((x[v][e] - mean) * factor * widen(scales[v].at[e]) + (shift ? widen(shifts[v].at[e]) : 0.0f));
    }
    store<SIZE>(out + u64(blockIdx.x) * HIDDEN + i, y);
  }
}
#endif

#ifdef HEAD_DIM
// Rotate the Q and K heads of each token of qkv [tokens, heads + 2 kv_heads, head_dim] in place (where `rotation` is
// given, [position, head_dim / 2] of cosine and sine), and copy K and V to their places in the pool: slots[t] is the
// token's K in layer 0 as a row of [.., kv_heads * head_dim]; `layer_rows` such rows lie between two layers. A negative
// slot stores nothing.
extern "C" __global__ void __launch_bounds__(THREADS)
    append(Element* qkv, Element* pool, const int* positions, const long long* slots, const float2* rotation, int heads,
           int kv_heads, int layer_rows, int layer, int block_size) {
  release_next();
  await_previous();
  constexpr int HALF = HEAD_DIM / 2;
  const u64 token = blockIdx.x;
  Element* row = qkv + token * (heads + 2 * kv_heads) * HEAD_DIM;
  const int width = kv_heads * HEAD_DIM;
  const long long slot = slots[token];
  Element* keys = pool + (slot + (long long)(layer)*layer_rows) * width;
  Element* values = keys + u64(block_size) * width;
  if (rotation) {
    const float2* turns = rotation + u64(positions[token]) * HALF;
    for (int i = threadIdx.x; i < (heads + kv_heads) * HALF; i += THREADS) {
      const int head = i / HALF, pair = i % HALF;
      Element* at = row + head * HEAD_DIM + pair;
      const float a = widen(at[0]), b = widen(at[HALF]);
      const float2 turn = turns[pair];
      const Element first = narrow(a * turn.x - b * turn.y), second = narrow(b * turn.x + a * turn.y);
      at[0] = first;
      at[HALF] = second;
      if (head >= heads && slot >= 0) {
        keys[(head - heads) * HEAD_DIM + pair] = first;
        keys[(head - heads) * HEAD_DIM + pair + HALF] = second;
      }
    }
  }
  if (slot < 0) return;
  constexpr int SIZE_OF_HEAD = vector_size(HEAD_DIM);
  const Element* from = row + heads * HEAD_DIM;
  for (int i = threadIdx.x * SIZE_OF_HEAD; i < width; i += THREADS * SIZE_OF_HEAD) {
    if (!rotation) store<SIZE_OF_HEAD>(keys + i, load<SIZE_OF_HEAD>(from + i));
    store<SIZE_OF_HEAD>(values + i, load<SIZE_OF_HEAD>(from + width + i));
  }
}
#endif
