"""The `ipc` carrier: a rank stores messages straight into the memory of another rank of its host.

A receive posts where its bytes belong: a memory that the sender has mapped, and a table of pieces. The sender joins
that table with its own and queues one copy, or one kernel, on a stream of its own, and behind it the write of a flag
in memory of the receiver, for which the receiver's streams wait. The host matches posts with sends, and never touches
data. Posts travel on a local socket, whose other end's death both sides notice.

Known limit: on CUDA, where a producer's stream was cancelled after its work was queued, its void bytes are sent.
"""

import os
import selectors
import threading
import time
from contextlib import suppress
from functools import partial
from itertools import count

from dejavu.device.base import Buffer, Device, Stream
from dejavu.device.handles import close_all
from dejavu.device.pieces import Pieces
from dejavu.errors import DejavuError, PeerLostError, TransferError
from dejavu.transport.carrier import PEER_MESSAGE_BYTES, Carrier, Gathering, Transfer, UnavailableError, check_message
from dejavu.transport.ipc_line import Exchange, connect_ranks
from dejavu.transport.ipc_memory import Exports, Imports
from dejavu.transport.ipc_messages import Kind, Post, Register, pack_number, split_kind, unpack_number
from dejavu.transport.ipc_state import Copying, Peer, SendQueue, Unready
from dejavu.transport.ipc_transfers import WORD_BYTES, IpcReceive, IpcSend, Word, flags_of
from dejavu.transport.lanes import Lanes
from dejavu.transport.message import join
from dejavu.transport.progress import Gate, Gates
from dejavu.transport.staging import cancelled, is_short, move, wrap
from dejavu.transport.waiting import rest

NUM_WORDS = 8192  # of one rank: how many receives can be under way
WORDS_BYTES = NUM_WORDS * WORD_BYTES
CLOSE_S = 5.0  # how long a close waits for peers to keep off this rank's memory
FAREWELL_S = 1.0  # how long a line may have ended before its process does
AWAITED_PAUSES_S = 1e-4, 5e-3  # between looks, where a post or a stream waits for the thread
PAUSES_S = 2e-3, 2e-2  # where it only looks after copies
LINGER_S = 0.5  # how long it goes on looking, so that the next send need not wake it


class IpcCarrier(Carrier):
    """Move messages between ranks of one host, from memory to memory.

    A receive's memory has to be exportable (`allocate_exportable`, `allocate_host_exportable`, or `allocate`); it is
    introduced to a peer by its first receive, and stays mapped there until `unregister` or `close`. A peer that closed
    its carrier, or died, fails the transfers with it, now and later; its death is noticed at once.
    """

    name = "ipc"

    def __init__(
        self, device: Device, rank: int, exchange: Exchange, *, gathering: Gathering = Gathering.PACKED
    ) -> None:
        """Connect the ranks of this host; all ranks of `exchange`, an allgather of bytes, make theirs at once."""
        self.device = device
        self.rank = rank
        self.gathering = gathering
        self._words = device.allocate_host_exportable(WORDS_BYTES)
        self._free_words = [Word(self._words, i) for i in range(NUM_WORDS)]
        self._numbers = count(1)
        self._exports = Exports()
        self._lanes = Lanes(device, "ipc")
        self._waits = Lanes(device, "ipc-wait")
        self._gates = Gates(device)
        self._gated: dict[IpcSend, list[tuple[Gate, Stream]]] = {}
        self._copying: list[Copying] = []
        self._queue = SendQueue()
        self._unready: list[Unready] = []
        self._lock = threading.RLock()
        self._is_slow_to_wake = device.properties.kind == "cpu"  # the thread: cores are few, and busy
        if device.properties.kind != "cpu":
            self.message_bytes = PEER_MESSAGE_BYTES
        self._is_closing = False
        self._is_alert = False  # the thread is not asleep without a limit
        self._connect(exchange)
        self._start()

    def unavailable(self, peer: int) -> str | None:
        """Say why this carrier cannot reach a rank, or None."""
        return self._reasons.get(peer)

    def send(self, peer: int, key: int, memory: Buffer, pieces: Pieces, *, stream: Stream) -> Transfer:
        """Store a message into the place that the peer posts under `key`."""
        check_message(memory, pieces)
        there = self._reach(peer)
        with self._lock:
            if self._is_slow_to_wake and key not in there.posts:
                self._catch_up(there)
            self._refuse_lost(there)
            if key in there.sends:
                raise TransferError(f"key {key} is already being sent to rank {peer}: wait for that message first")
            send = IpcSend(peer, key, memory, pieces, self._lanes.mark(stream))
            send.on_cancel, send.on_order = self._cancel_send, self._order_send
            self._queue.add(send)
            post = there.posts.pop(key, None)
            if post is None:
                there.sends[key] = send
            else:
                self._copy(there, send, post)
        return send

    def receive(self, peer: int, key: int, memory: Buffer, pieces: Pieces, *, stream: Stream) -> Transfer:
        """Offer a place for the message of `key`."""
        check_message(memory, pieces)
        there = self._reach(peer)
        with self._lock:
            self._refuse_lost(there)
            memory_id = self._introduce(there, memory)
            if not self._free_words:
                raise TransferError(f"{NUM_WORDS} receives are under way: wait for some of them first")
            word = self._free_words.pop()
            number = next(self._numbers) & 0xFFFFFFFF
            receive = IpcReceive(self._waits, number, peer, word, (memory, pieces))
            receive.on_cancel, receive.on_end = self._cancel_receive, self._forget_receive
            there.receives[number] = receive
            offsets = pieces.shifted(memory.address - memory.memory.address, 0)
            post = Post(number, key, memory_id, word.index, word.value & 0xFFFFFFFF, offsets)
            self._offer(Unready(there, receive, post, self._lanes.mark(stream)))
        return receive

    def unregister(self, memory: Buffer) -> None:
        """Have the peers unmap a memory, into which nothing is being received: before it is freed for good."""
        with self._lock:
            memory_id = self._exports.forget(memory.memory)
            for peer in self._peers.values():
                if memory_id in peer.introduced:
                    peer.introduced.discard(memory_id)
                    peer.line.say(pack_number(Kind.UNREGISTER, memory_id))

    def close(self) -> None:
        """End what still runs, once no peer writes here any more; the peers need not close at the same time."""
        if self._is_closing:
            return
        self._withdraw()
        with self._lock:
            for peer in self._peers.values():
                peer.line.say(pack_number(Kind.GOODBYE, 0))
        self._is_closing = True
        self._wake()
        self._thread.join()
        for peer in self._peers.values():
            self._lose(peer, TransferError("the carrier was closed before the transfer had ended"))
        self._lanes.close()
        self._waits.close()
        self._tend()
        self._release()

    # Set-up and end

    def _connect(self, exchange: Exchange) -> None:
        fd = self._words.export_fd()
        try:
            lines, self._reasons = connect_ranks(exchange, self.rank, self.device.properties.kind, fd)
        finally:
            os.close(fd)
        self._peers = {
            rank: Peer(rank, line, self.device.import_host_fd(line.words_fd, WORDS_BYTES), Imports(self.device, rank))
            for rank, line in lines.items()
        }

    def _start(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._bell, selectors.EVENT_READ, self._hush)
        for peer in self._peers.values():
            self._selector.register(peer.line.socket, selectors.EVENT_READ, partial(self._hear, peer))
            if peer.line.pidfd is not None:
                self._selector.register(peer.line.pidfd, selectors.EVENT_READ, partial(self._bury, peer))
        self._thread = threading.Thread(target=self._serve, name="carrier-ipc", daemon=True)
        self._thread.start()

    def _withdraw(self) -> None:
        """Have the peers keep off, and let this rank's copies end; what hangs is left to the lanes' end."""
        with self._lock:
            receives = [receive for peer in self._peers.values() for receive in list(peer.receives.values())]
            sends = [send for peer in self._peers.values() for send in list(peer.sends.values())]
            sends += self._queue.held
        for transfer in (*receives, *sends):
            transfer.cancel()
        end_s = time.monotonic() + CLOSE_S
        for waiting in (*receives, *(item.send for item in list(self._copying))):
            with suppress(DejavuError):
                waiting.wait(max(0.0, end_s - time.monotonic()))

    def _release(self) -> None:
        self._selector.close()
        os.close(self._bell)
        for peer in self._peers.values():
            peer.line.close()
            peer.words.close()
            peer.imports.close()
        self._gates.close()
        self._free_words.clear()
        self._words.close()

    # Posting, called with the lock held

    def _catch_up(self, peer: Peer) -> None:
        """Take what has come before the thread wakes to do it; the end of the line is left to the thread."""
        with suppress(PeerLostError):
            self._listen(peer)

    def _reach(self, rank: int) -> Peer:
        assert not self._is_closing, "the carrier was closed"
        if rank not in self._peers:
            reason = self._reasons.get(rank, "it is this rank, or no rank of the job")
            raise UnavailableError(f"ipc cannot reach rank {rank}: {reason}")
        return self._peers[rank]

    def _refuse_lost(self, peer: Peer) -> None:
        if peer.lost is not None:
            raise TransferError(str(peer.lost)) from peer.lost

    def _introduce(self, peer: Peer, memory: Buffer) -> int:
        memory_id = self._exports.identify(memory.memory)
        if memory_id not in peer.introduced:
            register, fd = self._exports.introduce(memory.memory)
            peer.line.say(register.pack(), fd)
            peer.introduced.add(memory_id)
        return memory_id

    def _offer(self, item: Unready) -> None:
        """Send a post now, or when the work that still uses its memory is done."""
        try:
            is_ready = item.event.query()
        except Exception as error:  # of the caller's stream
            self._lanes.recycle(item.event)
            item.receive.finish(error)
            return
        if is_ready:
            self._lanes.recycle(item.event)
            self._say_post(item)
        else:
            self._unready.append(item)
            self._wake()

    def _say_post(self, item: Unready) -> None:
        message, fd = item.post.pack()
        item.peer.line.say(message, fd)
        if item.peer.line.has_more_to_say:
            self._wake()

    def _copy(self, peer: Peer, send: IpcSend, post: Post) -> None:
        """Queue the copies of a send whose place is known, and the flag behind them; or hold it back."""
        if not self._queue.may_start(send):
            self._queue.hold(Copying(peer, send, post))
            self._wake()
            return
        try:
            place = peer.imports.find(post.memory_id)
            if post.pieces.total_bytes != send.nbytes:
                raise TransferError(
                    f"key {send.key} is {send.nbytes} bytes at rank {self.rank} and {post.pieces.total_bytes} bytes at "
                    f"rank {peer.rank}: make both sides' lists from one plan"
                )
            post.pieces.check(place.nbytes, send.nbytes)
            joined = join(send.pieces, post.pieces)
        except TransferError as error:
            self._lanes.recycle(send.ready)
            self._fail_send(send, error)
            peer.line.say(pack_number(Kind.FAIL, post.number, str(error)))
            return
        arrived, gate = flags_of(peer.words, post.word)

        def work(lane: Stream) -> None:
            move(self.device, place, send.memory, joined, self.gathering, stream=lane)
            self.device.write_flag(arrived, post.value, stream=lane)
            self.device.write_flag(gate, post.value, stream=lane)

        short = is_short(self.device, joined, self.gathering)
        copies = self._lanes.run(send.nbytes, send.ready, work, (send, post, place), is_short=short)
        send.start(copies)
        item = Copying(peer, send, post)
        if copies.done:
            self._conclude(item)
        else:
            self._copying.append(item)
            self._wake(at_once=send in self._gated)

    # Ends, called back by transfers

    def _forget_receive(self, word: Word) -> None:
        self._free_words.append(word)

    def _cancel_receive(self, receive: IpcReceive) -> None:
        with self._lock:
            waiting = next((item for item in self._unready if item.receive is receive), None)
            peer = self._peers[receive.peer]
            if waiting is not None:
                self._unready.remove(waiting)
                self._lanes.recycle(waiting.event)
            if waiting is not None or peer.lost is not None:
                receive.finish(cancelled())
            else:
                peer.line.say(pack_number(Kind.CANCEL, receive.number))
                self._wake()

    def _cancel_send(self, send: IpcSend) -> None:
        with self._lock:
            if send.copies is not None:
                send.copies.cancel()
            elif held := self._queue.take(lambda item: item.send is send):
                self._drop(held[0], cancelled())
                held[0].peer.line.say(pack_number(Kind.FAIL, held[0].post.number, "the sender cancelled"))
            elif self._peers[send.peer].sends.pop(send.key, None) is not None:
                self._lanes.recycle(send.ready)
                self._fail_send(send, cancelled())

    def _order_send(self, send: IpcSend, stream: Stream, deadline_s: float | None) -> None:
        with self._lock:
            copies, gate = send.copies, None
            if copies is None and not send.done:
                gate = self._gates.take()
                self._gated.setdefault(send, []).append((gate, stream))
                word, value = gate.word, gate.value
        if copies is not None:
            copies.order(stream)
        elif gate is not None:
            self.device.wait_flag(word, value, stream=stream, deadline_s=deadline_s)

    def _drop(self, item: Copying, error: BaseException) -> None:
        """End a send that was held back."""
        self._lanes.recycle(item.send.ready)
        self._fail_send(item.send, error)

    def _fail_send(self, send: IpcSend, error: BaseException) -> None:
        self._queue.end(send)
        send.fail(error)
        self._open_gates(send)

    def _open_gates(self, send: IpcSend) -> None:
        self._gates.release(self._gated.pop(send, []), send.error)

    # The thread

    def _serve(self) -> None:
        self.device.free_bytes()  # any such call makes a CUDA device current in the thread
        moved_s = time.monotonic()
        while not self._is_closing:
            with self._lock:
                quiet_s = time.monotonic() - moved_s
                self._is_alert = quiet_s < LINGER_S or self._is_busy()
                pauses_s = AWAITED_PAUSES_S if self._unready or self._gated or self._queue else PAUSES_S
            heard = self._selector.select(rest(quiet_s, *pauses_s) if self._is_alert else None)
            with self._lock:
                for selected, _ in heard:
                    selected.data()
                if self._tend() or heard:
                    moved_s = time.monotonic()
        self._say_rest()

    def _is_busy(self) -> bool:
        is_ending = any(peer.ended_s is not None and peer.lost is None for peer in self._peers.values())
        has_more = any(peer.line.has_more_to_say for peer in self._peers.values())
        return bool(self._copying or self._unready or self._queue or is_ending or has_more)

    def _tend(self) -> bool:
        """Look after what is under way; tells whether anything moved on."""
        ended = [item for item in self._copying if item.send.copies is not None and item.send.copies.done]
        for item in ended:
            self._copying.remove(item)
            self._conclude(item)
        for item in self._queue.take(lambda item: self._queue.may_start(item.send)):
            self._copy(item.peer, item.send, item.post)
        waiting, self._unready = self._unready, []
        for unready in waiting:
            self._offer(unready)
        for peer in self._peers.values():
            peer.line.flush()
            if peer.ended_s is not None and time.monotonic() - peer.ended_s > FAREWELL_S:
                self._lose(peer, PeerLostError(f"rank {peer.rank} has left its line"))
            for receive in list(peer.receives.values()):
                if receive.done:
                    del peer.receives[receive.number]
        return bool(ended) or len(waiting) > len(self._unready)

    def _conclude(self, item: Copying) -> None:
        """Tell a receiver what its flag does not: that the copies failed, or that they have stopped."""
        copies = item.send.copies
        assert copies is not None
        self._queue.end(item.send)
        if item.is_withdrawn:
            item.send.fail(TransferError(f"rank {item.peer.rank} has cancelled its receive of key {item.post.key}"))
            item.peer.line.say(pack_number(Kind.WITHDRAWN, item.post.number))
        elif copies.error is not None:
            item.peer.line.say(pack_number(Kind.FAIL, item.post.number, f"the sender failed: {copies.error}"))
        self._open_gates(item.send)

    def _say_rest(self) -> None:
        end_s = time.monotonic() + FAREWELL_S
        while any(peer.line.has_more_to_say for peer in self._peers.values()) and time.monotonic() < end_s:
            time.sleep(PAUSES_S[0])
            for peer in self._peers.values():
                peer.line.flush()

    def _wake(self, *, at_once: bool = True) -> None:
        """Have the thread look; one that is alert does so soon anyway."""
        if (at_once or not self._is_alert) and threading.current_thread() is not self._thread:
            self._is_alert = True
            os.eventfd_write(self._bell, 1)

    def _hush(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)

    def _hear(self, peer: Peer) -> None:
        try:
            self._listen(peer)
        except PeerLostError as error:
            self._selector.unregister(peer.line.socket)
            peer.ended_s = time.monotonic()
            if peer.line.pidfd is None:
                self._lose(peer, error)

    def _listen(self, peer: Peer) -> None:
        """Take the messages that have come; PeerLostError at the end of the line."""
        try:
            while peer.lost is None and (heard := peer.line.hear()) is not None:
                message, fds = heard
                try:
                    self._take(peer, *split_kind(message), fds)
                finally:
                    close_all(fds)
        except PeerLostError:
            raise
        except TransferError as error:
            self._lose(peer, error)

    def _bury(self, peer: Peer) -> None:
        assert peer.line.pidfd is not None
        self._selector.unregister(peer.line.pidfd)
        self._lose(peer, PeerLostError(f"the process of rank {peer.rank} has ended"))

    def _take(self, peer: Peer, kind: Kind, body: bytes, fds: list[int]) -> None:
        if kind is Kind.POST:
            self._take_post(peer, Post.unpack(body, fds))
        elif kind is Kind.REGISTER:
            peer.imports.add(Register.unpack(body), fds)
        else:
            self._take_number(peer, kind, *unpack_number(body))

    def _take_number(self, peer: Peer, kind: Kind, number: int, text: str) -> None:
        if kind is Kind.CANCEL:
            self._take_cancel(peer, number)
        elif kind is Kind.UNREGISTER:
            peer.imports.remove(number)
        elif kind is Kind.GOODBYE:
            self._lose(peer, PeerLostError(f"rank {peer.rank} has closed its ipc carrier"))
        elif number in peer.receives:
            error = cancelled() if kind is Kind.WITHDRAWN else TransferError(text)
            peer.receives.pop(number).finish(error)

    def _take_post(self, peer: Peer, post: Post) -> None:
        if post.word >= NUM_WORDS:
            raise TransferError(f"rank {peer.rank} names flag {post.word}, which it does not have")
        send = peer.sends.pop(post.key, None)
        if send is not None:
            self._copy(peer, send, post)
        elif post.key in peer.posts:
            reason = f"key {post.key} is already awaited from rank {self.rank}: wait for that message first"
            peer.line.say(pack_number(Kind.FAIL, post.number, reason))
        else:
            peer.posts[post.key] = post

    def _take_cancel(self, peer: Peer, number: int) -> None:
        for item in self._copying:
            if item.peer is peer and item.post.number == number:
                item.is_withdrawn = True
                return
        for item in self._queue.take(lambda item: item.peer is peer and item.post.number == number):
            self._drop(item, TransferError(f"rank {peer.rank} has cancelled its receive of key {item.post.key}"))
        peer.posts = {key: post for key, post in peer.posts.items() if post.number != number}
        peer.line.say(pack_number(Kind.WITHDRAWN, number))

    def _lose(self, peer: Peer, error: DejavuError) -> None:
        """Fail what is under way with a peer that is gone: nothing of it writes here any more."""
        if peer.lost is not None:
            return
        peer.lost = wrap(error)
        for item in [item for item in self._unready if item.peer is peer]:
            self._unready.remove(item)
            self._lanes.recycle(item.event)
        for receive in list(peer.receives.values()):
            receive.finish(peer.lost)
        for held in self._queue.take(lambda item: item.peer is peer):
            self._drop(held, peer.lost)
        for send in list(peer.sends.values()):
            self._lanes.recycle(send.ready)
            self._fail_send(send, peer.lost)
        for box in (peer.receives, peer.sends, peer.posts):
            box.clear()
