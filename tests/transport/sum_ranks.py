"""A rank of a tensor group on GPUs, under mpirun: `python -m tests.transport.sum_ranks CASE`."""

import os
import signal
import sys
import time

import torch
from mpi4py import MPI

from dejavu.device import num_cuda_devices, open_device
from dejavu.errors import DeadlineError, TransferError
from dejavu.transport.mailbox import MailboxIn, MailboxOut
from dejavu.transport.reduction import GroupSum
from dejavu.transport.sum_plan import SumPlan

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size
KIB = 1024
PLANS = {
    "one-shot": SumPlan(SIZE, 1 << 20, 1 << 20),
    "two-shot": SumPlan(SIZE, 0, 1 << 20),  # longer messages are cut
    "few-blocks": SumPlan(SIZE, 64 * KIB, 256 * KIB, threads=128, one_shot_blocks=3, two_shot_blocks=5),
    "chosen": None,
}
SIZES = [16, 48, 1 * KIB, 10 * KIB, 80 * KIB + 16, 320 * KIB, 1 << 20, (3 << 20) + 4096 + 16]


def part(rank, nbytes, dtype, turn, device):
    generator = torch.Generator(device.torch_device).manual_seed(7919 * turn + 31 * rank + nbytes)
    return torch.randn(nbytes // dtype.itemsize, generator=generator, device=device.torch_device).to(dtype)


def expected(nbytes, dtype, turn, device):
    total = torch.zeros(nbytes // dtype.itemsize, device=device.torch_device)
    for rank in range(SIZE):
        total += part(rank, nbytes, dtype, turn, device).float()
    return total.to(dtype)


def check_sums(device, group):
    turn = 0
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for nbytes in [*SIZES, *reversed(SIZES)]:
            turn += 1
            tensor = part(RANK, nbytes, dtype, turn, device)
            group(tensor)
            assert torch.equal(tensor, expected(nbytes, dtype, turn, device)), (dtype, nbytes)
    group.check()


def check_replays(device, group):
    """Capture an odd number of sums of several sizes, and replay them on new contents, with eager ones in between."""
    sizes = [10 * KIB, 320 * KIB, 16]
    tensors = [torch.empty(nbytes // 2, dtype=torch.float16, device=device.torch_device) for nbytes in sizes]
    stream = torch.cuda.Stream(device.torch_device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for tensor in tensors:
            group(tensor)
    for turn in range(5):
        for tensor, nbytes in zip(tensors, sizes, strict=True):
            tensor.copy_(part(RANK, nbytes, torch.float16, turn, device))
        graph.replay()
        eager = part(RANK, 2 * KIB, torch.float16, turn, device)
        group(eager)
        for tensor, nbytes in zip(tensors, sizes, strict=True):
            assert torch.equal(tensor, expected(nbytes, torch.float16, turn, device)), (turn, nbytes)
        assert torch.equal(eager, expected(2 * KIB, torch.float16, turn, device)), turn


def sums(device):
    for name, plan in PLANS.items():
        start_s = time.monotonic()
        group = GroupSum(device, COMM.allgather, RANK, plan=plan)
        check_sums(device, group)
        check_replays(device, group)
        group.close()
        print(f"rank {RANK}: {name} is right, {time.monotonic() - start_s:.1f} s, {group.describe()}", flush=True)


def late(device):
    """Miss a sum: the others' kernels give up at the deadline."""
    group = GroupSum(device, COMM.allgather, RANK, plan=PLANS["one-shot"], deadline_s=0.5)
    tensor = torch.ones(5120, dtype=torch.float16, device=device.torch_device)
    if RANK > 0:
        start_s = time.monotonic()
        group(tensor)
        torch.cuda.synchronize()
        assert 0.3 < time.monotonic() - start_s < 10
        try:
            group(tensor)
        except DeadlineError:
            print("gave up in time", flush=True)
        else:
            raise AssertionError("the kernel did not give up")
    COMM.Barrier()
    group.abort(TransferError("the test is over"))
    group.close()


def death(device):
    """Kill the last rank while the others' replays, and a mailbox's stream, wait for it: an abort lets them go."""
    group = GroupSum(device, COMM.allgather, RANK, plan=PLANS["two-shot"])
    pids = COMM.allgather(os.getpid())
    COMM.Barrier()
    if RANK == SIZE - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while os.path.exists(f"/proc/{pids[-1]}") and not is_zombie(pids[-1]):
        time.sleep(0.01)
    tensor = torch.ones(5120, dtype=torch.float16, device=device.torch_device)
    for _ in range(50):
        group(tensor)
    time.sleep(0.2)
    assert not torch.cuda.current_stream().query(), "the kernels should still wait"
    start_s = time.monotonic()
    group.abort(TransferError("rank is lost"))
    torch.cuda.synchronize()
    print(f"let go after {(time.monotonic() - start_s) * 1e3:.1f} ms", flush=True)
    assert time.monotonic() - start_s < 5
    group.close()
    os._exit(0)


def is_zombie(pid):
    with open(f"/proc/{pid}/stat") as line:
        return line.read().rsplit(")", 1)[1].split()[0] == "Z"


def mailboxes(device):
    """Hand tensors from rank to rank in a ring of ranks, many more than fit at once, on streams of their own."""
    hidden_size, max_tokens = 512, 300
    comm = COMM.Split(0 if RANK < 2 else MPI.UNDEFINED)
    if comm == MPI.COMM_NULL:
        return
    if RANK == 0:
        outbox = MailboxOut(device, comm.allgather)
        held = []
        for number in range(200):
            tensor = torch.full((1 + 37 * number % max_tokens, hidden_size), number, dtype=torch.float16)
            tensor = tensor.to(device.torch_device)
            outbox.send(tensor)
            held.append(tensor)
        outbox.close()
    else:
        inbox = MailboxIn(device, comm.allgather, max_tokens, hidden_size, torch.float16)
        wrong = torch.zeros(1, device=device.torch_device)
        for number in range(200):
            hidden = inbox.receive(1 + 37 * number % max_tokens)
            wrong += (hidden != number).sum()
            inbox.release()
        assert int(wrong) == 0
        inbox.close()
    print(f"rank {RANK}: mailbox is right", flush=True)


CASES = {case.__name__: case for case in (sums, late, death, mailboxes)}

if __name__ == "__main__":
    local = RANK % num_cuda_devices()
    torch.cuda.set_device(local)
    with open_device("cuda", local) as opened:
        for name in sys.argv[1:]:
            CASES[name](opened)
            COMM.Barrier()
            if RANK == 0:
                print(f"passed {name}", flush=True)
