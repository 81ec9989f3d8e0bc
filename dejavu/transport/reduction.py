"""The sum of a tensor over the ranks of a tensor group, on the GPU, without the host: two to four in every layer.

Ranks of one host add up through memory that they have mapped of each other, by kernels that wait for the others'
kernels: small messages in one shot, larger ones in two; both add in the order of ranks, in float32. Between hosts sums
take NCCL.

Ranks that share a GPU take turns on it, and a kernel that waits holds it until its time slice ends: a sum then takes
milliseconds instead of microseconds. That is for tests; NCCL refuses it altogether.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from dejavu.device.base import DEFAULT_DEADLINE_S, Buffer, Closing, Device
from dejavu.errors import DeadlineError, DejavuError, TransferError
from dejavu.transport.carrier import UnavailableError
from dejavu.transport.ipc_line import Exchange, this_host
from dejavu.transport.nccl_group import NcclGroup, missing
from dejavu.transport.sum_plan import MAX_RANKS, SumPlan, Way

if TYPE_CHECKING:
    from torch import Tensor

    from dejavu.device.cuda_sums import SumKernels

ONE_SHOT_BYTES = 1 << 20  # where two shots become faster on 2 H200: docs/notes.md
TWO_SHOT_BYTES = 32 << 20  # of one launch
SHARED_ONE_SHOT_BYTES = 4 << 20  # where ranks share a GPU, and each wait costs a time slice


class GroupSum(Closing):
    """Sum tensors over a group of ranks; every rank calls it with the same shapes in the same order.

    All calls of a group queue on one stream at a time: torch's current one. They may be captured, and graphs replayed,
    as long as all ranks do so in the same order.
    """

    def __init__(
        self,
        device: Device,
        exchange: Exchange,
        rank: int,
        *,
        plan: SumPlan | None = None,
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> None:
        """Meet the other ranks of `exchange`, an allgather of bytes, who all do so at once; `rank` is the place there.

        Without a `plan` it is chosen by where the ranks are. A kernel that waits longer than `deadline_s` for a peer
        gives up; the next `check` raises DeadlineError. UnavailableError where the ranks have no way to sum.
        """
        self._device = device
        self._exchange = exchange
        self._error: Exception | None = None
        self._own: Buffer | None = None
        self._mapped: list[Buffer] = []
        self._kernels: SumKernels | None = None
        self._nccl: NcclGroup | None = None
        places = meet(device, exchange)
        self.plan = plan or choose_plan(places)
        if self.plan.two_shot_bytes:
            self._open(rank, deadline_s)
        else:
            self._nccl = NcclGroup(device, exchange, rank)

    def __call__(self, tensor: "Tensor") -> None:
        """Queue the sum of a contiguous float32, float16 or bfloat16 tensor, in place, on torch's current stream.

        Its bytes and its address are multiples of 16. Raises what `check` raises.
        """
        self.check()
        assert tensor.is_contiguous()
        assert (tensor.data_ptr() | tensor.nbytes) % 16 == 0, "sums take whole vectors of 16 bytes"
        if tensor.nbytes == 0:
            return
        way = self.plan.way(tensor.nbytes)
        if way is Way.NCCL:
            assert self._nccl is not None
            self._nccl.sum(tensor)
        else:
            self._sum_here(way, tensor)

    def check(self) -> None:
        """Raise the error of an abort, or DeadlineError where a kernel gave up: its tensor holds no sum."""
        if self._error is not None:
            raise TransferError(str(self._error)) from self._error
        if self._kernels is not None and self._kernels.is_late:
            raise DeadlineError("a rank of the tensor group did not take part in a sum in time: it has stopped")

    def abort(self, error: Exception) -> None:
        """End all waits, queued ones too, for a rank that has died; what is summed is void. Callable by any thread."""
        self._error = self._error or error
        if self._kernels is not None:
            self._kernels.stop()
        if self._nccl is not None:
            self._nccl.abort()

    def describe(self) -> str:
        """Say which way sums go, for people."""
        plan = self.plan
        kernels = f"one shot up to {plan.one_shot_bytes >> 10} KiB, two shots beyond"
        return f"sums of {plan.size} ranks: {kernels if plan.two_shot_bytes else 'nccl'}"

    def close(self) -> None:
        """Free the memory, once the other ranks do so too, and have unmapped it; at once after an abort."""
        if self._kernels is not None:
            self._device.compute_stream.synchronize()
            self._kernels.close()
            self._kernels = None
        for memory in self._mapped:
            memory.close()
        self._mapped.clear()
        if self._nccl is not None and self._error is None:
            self._nccl.close()
        if self._own is not None:
            if self._error is None:
                self._exchange(b"")
            self._own.close()
            self._own = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self.abort(TransferError(f"this rank has failed: {error}"))
        self.close()

    def _sum_here(self, way: Way, tensor: "Tensor") -> None:
        assert self._kernels is not None
        dtype, stream, plan = str(tensor.dtype)[6:], self._device.compute_stream.handle, self.plan
        address, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if way is Way.ONE_SHOT:
            grid = plan.one_shot_grid(tensor.nbytes)
            self._kernels.one_shot(dtype, address, tensor.nbytes, (grid.blocks, grid.threads), stream)
            return
        for start in range(address, end, plan.two_shot_bytes):
            nbytes = min(plan.two_shot_bytes, end - start)
            grid = plan.two_shot_grid(nbytes)
            self._kernels.two_shot(dtype, start, nbytes, grid.share, (grid.blocks, grid.threads), stream)

    def _open(self, rank: int, deadline_s: float) -> None:
        """Map every other rank's memory; all ranks succeed, or all raise."""
        device, plan = self._device, self.plan
        self._own = device.allocate(plan.nbytes)
        with device.create_stream("sums") as stream:
            device.fill(self._own, 0, stream=stream)
            stream.synchronize(DEFAULT_DEADLINE_S)
        handles = self._exchange(self._own.ipc_handle())
        memories, reason = [self._own] * plan.size, ""
        try:
            for peer in (peer for peer in range(plan.size) if peer != rank):
                memories[peer] = device.open_ipc(handles[peer], plan.nbytes)
                self._mapped.append(memories[peer])
        except DejavuError as error:
            reason = f"rank {rank} cannot map the memory of rank {len(self._mapped)} ({error})"
        if reason := next(filter(None, (each.decode() for each in self._exchange(reason.encode()))), ""):
            with suppress(DejavuError):
                self.close()
            raise UnavailableError(f"the tensor group has no way to sum: {reason}")
        self._kernels = make_kernels(device, rank, memories, plan, deadline_s)


def make_kernels(device: Device, rank: int, memories: list[Buffer], plan: SumPlan, deadline_s: float) -> "SumKernels":
    """Load the kernels."""
    from dejavu.device.cuda_sums import SumKernels

    return SumKernels(
        device,
        rank,
        memories,
        lines=plan.lines_offset,
        line_stride=plan.line_stride,
        slot_stride=plan.slot_stride,
        parts=plan.parts_offset,
        results=plan.results_offset,
        share_stride=plan.share_stride,
        deadline_ns=int(deadline_s * 1e9),
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Say where a rank of a group is, and what keeps it from using NCCL, if anything does."""

    host: str
    bus_id: str
    without_nccl: str | None = None


def meet(device: Device, exchange: Exchange) -> list[Place]:
    """Give the place of every rank."""
    here = this_host(), device.properties.bus_id, missing(device)
    return [Place(*json.loads(data)) for data in exchange(json.dumps(here).encode())]


def choose_plan(places: Sequence[Place]) -> SumPlan:
    """Choose by where the ranks are: all on one host or not, each with its own GPU or not."""
    size = len(places)
    if size > MAX_RANKS:
        raise UnavailableError(f"a tensor group has at most {MAX_RANKS} ranks, not {size}: use more pipeline stages")
    shares_gpu = len({(place.host, place.bus_id) for place in places}) < size
    if len({place.host for place in places}) == 1:
        return SumPlan(size, SHARED_ONE_SHOT_BYTES if shares_gpu else ONE_SHOT_BYTES, TWO_SHOT_BYTES)
    if reason := without_nccl(places):
        raise UnavailableError(f"a tensor group on several hosts sums by NCCL: {reason}")
    return SumPlan(size, 0, 0)


def without_nccl(places: Sequence[Place]) -> str | None:
    """Say what keeps the ranks from using NCCL, or None."""
    if len({(place.host, place.bus_id) for place in places}) < len(places):
        return "two ranks share a GPU, which NCCL cannot: give each rank its own"
    return next((place.without_nccl for place in places if place.without_nccl), None)
