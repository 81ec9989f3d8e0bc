// Copies any number of pieces in one launch; both sides may be device, pinned host, or mapped peer memory.
//
// One warp copies one part of one piece: `splits` warps share a piece. Each part moves the widest vectors that the two
// addresses allow: they must lie equally far from a multiple of the vector's size. The table may lie in pinned host
// memory: a block reads the rows of its warps in one transaction.

typedef unsigned long long u64;

constexpr unsigned WARPS = 8;
constexpr unsigned UNROLL = 4;  // loads in flight per lane

struct __align__(32) Piece {
  u64 source, target, nbytes, unused;
};

constexpr unsigned ROW_WORDS = sizeof(Piece) / sizeof(u64);

template <typename Vector>
__device__ void copy_range(u64 target, u64 source, u64 begin, u64 end, unsigned lane) {
  Vector* to = reinterpret_cast<Vector*>(target);
  const Vector* from = reinterpret_cast<const Vector*>(source);
  u64 i = begin + lane;
  for (; i + 32 * (UNROLL - 1) < end; i += 32 * UNROLL) {
    Vector held[UNROLL];
#pragma unroll
    for (unsigned k = 0; k < UNROLL; k++) held[k] = from[i + 32 * k];
#pragma unroll
    for (unsigned k = 0; k < UNROLL; k++) to[i + 32 * k] = held[k];
  }
  for (; i < end; i += 32) to[i] = from[i];
}

template <typename Vector>
__device__ void copy_part(const Piece& piece, unsigned part, unsigned splits, unsigned lane) {
  const u64 width = sizeof(Vector);
  const u64 to_boundary = (0 - piece.target) & (width - 1);
  const u64 head = to_boundary < piece.nbytes ? to_boundary : piece.nbytes;
  const u64 vectors = (piece.nbytes - head) / width;
  copy_range<Vector>(piece.target + head, piece.source + head, part * vectors / splits, (part + 1) * vectors / splits,
                     lane);
  if (part > 0) return;
  const u64 tail = head + vectors * width;  // head and tail are shorter than a vector, so a warp covers each at once
  copy_range<unsigned char>(piece.target, piece.source, 0, head, lane);
  copy_range<unsigned char>(piece.target, piece.source, tail, piece.nbytes, lane);
}

extern "C" __global__ void copy_pieces(const u64* table, u64 count, unsigned splits) {
  // The warps of a block work on at most WARPS neighbouring rows, whose words fit one warp's read.
  __shared__ Piece rows[WARPS];
  static_assert(WARPS * ROW_WORDS <= 32, "one warp reads all rows of a block at once");
  const u64 first_row = u64(blockIdx.x) * WARPS / splits;
  const u64 end_row = (u64(blockIdx.x) * WARPS + WARPS - 1) / splits + 1;
  const u64 words = ((end_row < count ? end_row : count) - first_row) * ROW_WORDS;
  if (threadIdx.x < words) reinterpret_cast<u64*>(rows)[threadIdx.x] = table[first_row * ROW_WORDS + threadIdx.x];
  __syncthreads();

  const u64 warp = u64(blockIdx.x) * WARPS + threadIdx.x / 32;
  const unsigned lane = threadIdx.x % 32;
  if (warp >= count * splits) return;
  const Piece piece = rows[warp / splits - first_row];
  const unsigned part = warp % splits;
  const u64 skew = piece.source ^ piece.target;
  if (skew % 16 == 0) {
    copy_part<uint4>(piece, part, splits, lane);
  } else if (skew % 8 == 0) {
    copy_part<uint2>(piece, part, splits, lane);
  } else if (skew % 4 == 0) {
    copy_part<unsigned>(piece, part, splits, lane);
  } else if (skew % 2 == 0) {
    copy_part<unsigned short>(piece, part, splits, lane);
  } else {
    copy_part<unsigned char>(piece, part, splits, lane);
  }
}
