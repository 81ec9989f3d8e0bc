"""Stream a KV cache to a rank that holds it in other blocks: `mpirun -n 2 python examples/stream_cache.py`."""

import torch
from mpi4py import MPI

from dejavu.device import open_device
from dejavu.kv import CacheSide, KVPool, PoolLayout, RankCache, Resharding, RowMap, Selection, stream_in, stream_out
from dejavu.transport.registry import open_carrier

# Both ranks describe both sides: 4 layers, 2 heads of 8 float32; blocks of 16 tokens on rank 0, of 5 on rank 1.
sides = [RankCache(rank, PoolLayout(8, 0, 4, size, 0, 2, 8, 4)) for rank, size in enumerate((16, 5))]
resharding = Resharding(*(CacheSide((side,), {}) for side in sides))
prompt = Selection.of({"a request": (0, 20)})
rank = MPI.COMM_WORLD.Get_rank()
with open_device("cpu") as device, open_carrier("mpi", device, MPI.COMM_WORLD) as carrier:
    rows = RowMap(num_microbatches=1, num_rows=1, max_blocks=4, block_size=(16, 5)[rank])
    with KVPool(device, sides[rank], rows, torch.float32) as pool:
        pool.admit("a request", 0, 0, blocks=[3, 1] if rank == 0 else [6, 0, 2, 5])
        pool.tensor[:] = 1.0 if rank == 0 else 0.0
        stream = stream_out if rank == 0 else stream_in
        handle = stream(carrier, pool, resharding, prompt, transfer=1, stream=device.compute_stream)
        handle.wait()  # on rank 1, the tokens are valid now
        if rank == 1:
            print(f"{handle.nbytes} bytes, {pool.length('a request')} tokens, sum {pool.tensor.sum().item():.0f}")
