"""Mailboxes: hidden states from one stage's GPU into the next one's on the same host, without the hosts in between.

A mailbox is a ring in the receiver's device memory, which the sender has mapped. The sender's stream waits until the
place is free, copies, and writes a flag; the receiver's stream waits for the flag, computes with the hidden states
where they lie, and writes one back. The hosts only queue: they know each message's size, so each finds its place alone.

Behind a wait that is not over yet, the driver takes about 1000 operations before it blocks the host that queues more.
"""

from types import TracebackType
from typing import TYPE_CHECKING

from dejavu.device.base import DEFAULT_DEADLINE_S, FLAG_BYTES, IPC_HANDLE_BYTES, Buffer, Closing, Device, Stream
from dejavu.errors import DejavuError, TransferError
from dejavu.transport.carrier import UnavailableError
from dejavu.transport.ipc_line import Exchange
from dejavu.transport.ring import Ring, Slot, aligned

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SENDER, RECEIVER = 0, 1
WORD_MASK = 0xFFFFFFFF


class Mailbox(Closing):
    """Hold what both sides have: memory of their own that the other one has mapped, and the other's mapped here."""

    name = "mailbox"

    def __init__(self, device: Device, exchange: Exchange, side: int, nbytes: int, stream: Stream | None) -> None:
        """Meet the other side over `exchange`, an allgather of two; UnavailableError, on both, where one cannot map.

        Work is queued on `stream`, or where that is None on the device's compute stream of the moment.
        """
        self._device = device
        self._exchange = exchange
        self._given_stream = stream
        self._used: Stream | None = None
        self._error: Exception | None = None
        self._there: Buffer | None = None
        self._own = device.allocate(nbytes + FLAG_BYTES)
        with device.create_stream("mailbox") as work:
            device.fill(self._own, 0, stream=work)
            work.synchronize(DEFAULT_DEADLINE_S)
            self._meet(side, work)

    def abort(self, error: Exception) -> None:
        """End the waits of the stream, for another side that has died; what arrives is void. Callable by any thread."""
        self._error = self._error or error
        if self._used is not None:
            self._used.cancel(error)

    def close(self) -> None:
        """Give the memory back, as the other side does at the same time; alone after an abort. Waits for the stream.

        A compute stream that an abort has given its error goes on without it: it outlives the mailbox.
        """
        if self._used is not None and self._error is None:
            self._used.synchronize(DEFAULT_DEADLINE_S)
        elif self._used is not None and self._given_stream is None:
            self._used.renew()
        if self._there is not None:
            self._there.close()
        if self._error is None:
            self._exchange(b"")
        self._own.close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self.abort(TransferError(f"this rank has failed: {error}"))
        self.close()

    @property
    def _stream(self) -> Stream:
        self._used = self._given_stream or self._device.compute_stream
        return self._used

    def _meet(self, side: int, stream: Stream) -> None:
        """Map the other side's memory, whose last word is the flag that this side writes."""
        introduction = self._own.ipc_handle() + self._own.nbytes.to_bytes(8, "little")
        answer, reason = self._exchange(introduction)[1 - side], ""
        try:
            size = int.from_bytes(answer[IPC_HANDLE_BYTES:], "little")
            self._there = self._device.open_ipc(answer[:IPC_HANDLE_BYTES], size)
            # A copy, since a stream's write of a word is no access for which a driver connects two GPUs.
            self._device.copy(self._other_flag, self._own_flag, stream=stream)
            stream.synchronize(DEFAULT_DEADLINE_S)
        except DejavuError as error:
            reason = str(error)
        if reason := next(filter(None, (each.decode() for each in self._exchange(reason.encode()))), ""):
            self.close()
            raise UnavailableError(f"a stage cannot write into the next one's memory ({reason}): use nccl or mpi")

    @property
    def _own_flag(self) -> Buffer:
        return self._own.view(self._own.nbytes - FLAG_BYTES, FLAG_BYTES)

    @property
    def _other_flag(self) -> Buffer:
        assert self._there is not None
        return self._there.view(self._there.nbytes - FLAG_BYTES, FLAG_BYTES)


class MailboxOut(Mailbox):
    """Be the side that sends; its own memory is the flag by which it learns what has been taken out."""

    def __init__(self, device: Device, exchange: Exchange, *, stream: Stream | None = None) -> None:
        super().__init__(device, exchange, SENDER, 0, stream)
        assert self._there is not None
        self._ring = Ring(self._there.nbytes - FLAG_BYTES)
        self._free, self._ready = self._own_flag, self._other_flag

    def send(self, hidden: "Tensor") -> None:
        """Queue a contiguous tensor's way into the mailbox; it stays unchanged until the stream has passed this."""
        assert self._there is not None
        slot, stream = self._ring.place(hidden.nbytes), self._stream
        if slot.after:
            self._device.wait_flag(self._free, slot.after & WORD_MASK, stream=stream)
        self._device.copy(self._there.view(slot.offset, hidden.nbytes), hidden, stream=stream)
        self._device.write_flag(self._ready, slot.number & WORD_MASK, stream=stream)


class MailboxIn(Mailbox):
    """Be the side that receives, into its own memory."""

    def __init__(
        self,
        device: Device,
        exchange: Exchange,
        max_tokens: int,
        hidden_size: int,
        dtype: "torch.dtype",
        *,
        stream: Stream | None = None,
    ) -> None:
        """Make room for two messages of `max_tokens` tokens, or many shorter ones."""
        self._row_bytes = hidden_size * dtype.itemsize
        self._hidden_size, self._dtype = hidden_size, dtype
        capacity = 2 * aligned(max_tokens * self._row_bytes)
        super().__init__(device, exchange, RECEIVER, capacity, stream)
        self._ring = Ring(capacity)
        self._whole = self._own.view(0, capacity).tensor()
        self._ready, self._free = self._own_flag, self._other_flag
        self._held: Slot | None = None

    def receive(self, num_tokens: int) -> "Tensor":
        """Give the next hidden states [num_tokens, hidden_size], for what is queued from now on until `release`.

        They lie in the mailbox and are not changed.
        """
        assert self._held is None, "release what was received before"
        self._held = self._ring.place(num_tokens * self._row_bytes)
        self._device.wait_flag(self._ready, self._held.number & WORD_MASK, stream=self._stream)
        flat = self._whole[self._held.offset : self._held.offset + num_tokens * self._row_bytes]
        return flat.view(self._dtype).view(num_tokens, self._hidden_size)

    def release(self) -> None:
        """Let the sender use the place again once the stream has passed this."""
        assert self._held is not None
        self._device.write_flag(self._free, self._held.number & WORD_MASK, stream=self._stream)
        self._held = None
