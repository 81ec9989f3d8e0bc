// Numbers of the model's type, and how kernels of one stream overlap. Put before every source that names it; the host
// defines FLOAT16 or BFLOAT16, or neither for float32. No CUDA header is needed, so NVRTC needs no include path.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef EMULATED  // tests/model/emulation.hpp has these for the CPU
#if defined(FLOAT16) || defined(BFLOAT16)
struct __align__(2) Element {
  u16 bits;
};
#else
typedef float Element;
#endif

__device__ __forceinline__ float widen(Element x) {
#if defined(FLOAT16)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#elif defined(BFLOAT16)
  return __uint_as_float(u32(x.bits) << 16);
#else
  return x;
#endif
}

__device__ __forceinline__ Element narrow(float x) {
#if defined(FLOAT16)
  Element y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#elif defined(BFLOAT16)
  Element y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  return x;
#endif
}

// Programmatic dependent launch: the next kernel may begin, and load what no kernel writes, while this one runs. Before
// it touches anything that a kernel before it wrote or reads, it waits until all of them are complete. Every kernel
// waits, so what is two kernels back is complete too.
__device__ __forceinline__ void await_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void release_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

#define DYNAMIC_MEMORY(name) extern __shared__ __align__(128) u8 name[]
#endif

template <int BYTES>
struct Word;
template <>
struct Word<16> {
  typedef uint4 Type;
};
template <>
struct Word<8> {
  typedef uint2 Type;
};
template <>
struct Word<4> {
  typedef u32 Type;
};
template <>
struct Word<2> {
  typedef u16 Type;
};

// The most elements that divide `width` and fill at most 16 bytes: what one load takes from rows of this width.
__host__ __device__ constexpr int vector_size(int width) {
  int size = 16 / int(sizeof(Element));
  while (width % size) size /= 2;
  return size;
}

template <int N>
union Vector {
  typename Word<N * sizeof(Element)>::Type word;
  Element at[N];
};

template <int N>
__device__ __forceinline__ Vector<N> load(const Element* from) {
  Vector<N> x;
  x.word = *reinterpret_cast<const typename Word<N * sizeof(Element)>::Type*>(from);
  return x;
}

template <int N>
__device__ __forceinline__ void store(Element* to, const Vector<N>& x) {
  *reinterpret_cast<typename Word<N * sizeof(Element)>::Type*>(to) = x.word;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}

enum Activation { NONE, RELU, GELU, GELU_TANH, SILU };

__device__ __forceinline__ float activated(float x, int activation) {
  switch (activation) {
    case RELU:
      return x > 0.0f ? x : 0.0f;
    case GELU:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case GELU_TANH:
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case SILU:
      return x / (1.0f + expf(-x));
    default:
      return x;
  }
}
