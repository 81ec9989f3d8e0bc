"""The ceilings: plain transfers of the same bytes over the same link, without any of this project's carriers."""

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dejavu.device import Buffer, Device, Event, Stream
from dejavu.device.cpu_copy import array_at

from .timing import World

CHUNK_BYTES = 1 << 30  # of one blocking call
BLOCK_BYTES = 4096


class Copied:
    """Follow copies on a stream by the event behind them."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self._event: Event = device.create_event()
        self._event.record(stream)

    @property
    def done(self) -> bool:
        """Ask the event."""
        return self._event.query()

    def wait(self, deadline_s: float | None = None) -> None:
        """Block until the copies are done."""
        self._event.synchronize(deadline_s)
        self._event.close()


class Plain:
    """Be a load of one plain transfer."""

    num_pieces = 1
    num_copies = 1
    can_gate = False
    is_driven = False
    arrival = -1

    def __init__(self, world: Any, nbytes: int, window: int) -> None:
        self.world = world
        self.nbytes = nbytes
        self.window = window
        self.stream = world.device.create_stream("ceiling")

    def prepare(self, index: int) -> list[Any]:
        """Post nothing beforehand."""
        return []

    def start(self, index: int) -> list[Any]:
        """Transfer at once, blocking."""
        if self.world.rank == 0:
            self.send()
        else:
            self.receive()
        return []

    def send(self) -> None:
        """Do rank 0's part."""

    def receive(self) -> None:
        """Do the other rank's part."""

    def close(self) -> None:
        """Give the stream back."""
        self.stream.close()


class PlainCopy(Plain):
    """Copy device memory to device memory, or pinned host memory, or both ways at once: one copy call each way."""

    can_gate = True
    arrival = 0

    def __init__(self, world: World, nbytes: int, window: int, direction: str) -> None:
        super().__init__(world, nbytes, window)
        self._pairs: list[tuple[Buffer, Buffer, Stream]] = []
        self._other = world.device.create_stream("ceiling-back")
        if direction == "both":
            self._pairs = [self._pair("out", nbytes // 2, self.stream), self._pair("in", nbytes // 2, self._other)]
        else:
            self._pairs = [self._pair(direction, nbytes, self.stream)]

    def _pair(self, direction: str, nbytes: int, stream: Stream) -> tuple[Buffer, Buffer, Stream]:
        device = self.world.device
        here, host = device.allocate(nbytes), device.allocate_host(nbytes)
        device.fill(here, 1, stream=stream)
        array_at(host.address, (nbytes,)).fill(1)  # by the host: a device sets host memory byte by byte
        stream.synchronize()
        return (host, here, stream) if direction == "out" else (here, host, stream)

    def start(self, index: int) -> list[Any]:
        """Queue the copies; those on the second stream wait for the gate, too."""
        device = self.world.device
        if len(self._pairs) > 1:
            with device.create_event() as begun:
                begun.record(self.stream)
                begun.wait(self._other)
        for target, source, stream in self._pairs:
            device.copy(target, source, stream=stream)
        return [Copied(device, stream) for _, _, stream in self._pairs]

    def close(self) -> None:
        """Free the memories."""
        for target, source, _ in self._pairs:
            target.close()
            source.close()
        self._other.close()
        super().close()


class PlainPeerCopy(Plain):
    """Copy from rank 0's memory into the other rank's: a peer copy between GPUs, a memcpy in shared memory on a CPU."""

    can_gate = True
    arrival = 0

    def __init__(self, world: Any, nbytes: int, window: int) -> None:
        super().__init__(world, nbytes, window)
        device = world.device
        self._own = device.allocate(nbytes)
        device.fill(self._own, 1, stream=device.compute_stream)
        device.synchronize()
        handle = world.comm.bcast(self._own.ipc_handle(), root=1)
        self._there = device.open_ipc(handle, nbytes) if world.rank == 0 else None

    def start(self, index: int) -> list[Any]:
        """Queue the copy."""
        if self._there is None:
            return []
        self.world.device.copy(self._there, self._own, stream=self.stream)
        return [Copied(self.world.device, self.stream)]

    def close(self) -> None:
        """Unmap, and free what nobody maps any more."""
        if self._there is not None:
            self._there.close()
        self.world.share()
        self._own.close()
        super().close()


class PlainMpi(Plain):
    """Send by one blocking MPI call, from host memory to host memory."""

    def __init__(self, world: Any, nbytes: int, window: int) -> None:
        super().__init__(world, nbytes, window)
        self._data = np.ones(nbytes, dtype=np.uint8)

    def send(self) -> None:
        """Send it all."""
        for first in range(0, self.nbytes, CHUNK_BYTES):
            self.world.comm.Send(self._data[first : first + CHUNK_BYTES], dest=1)

    def receive(self) -> None:
        """Receive it all."""
        for first in range(0, self.nbytes, CHUNK_BYTES):
            self.world.comm.Recv(self._data[first : first + CHUNK_BYTES], source=0)


class PlainSocket(Plain):
    """Send over one blocking TCP connection, from host memory to host memory."""

    def __init__(self, world: Any, nbytes: int, window: int) -> None:
        super().__init__(world, nbytes, window)
        self._data = np.ones(nbytes, dtype=np.uint8).data
        self._socket = connect(world)

    def send(self) -> None:
        """Send it all."""
        self._socket.sendall(self._data)

    def receive(self) -> None:
        """Receive it all."""
        got = 0
        while got < self.nbytes:
            got += self._socket.recv_into(self._data[got:])

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()
        super().close()


def connect(world: Any) -> socket.socket:
    """Connect the two ranks, by the loopback where they share a host."""
    hosts = world.comm.allgather(socket.gethostname())
    if world.rank == 0:
        with socket.create_server(("127.0.0.1" if hosts[0] == hosts[1] else "", 0)) as server:
            place = "127.0.0.1" if hosts[0] == hosts[1] else hosts[0], server.getsockname()[1]
            world.comm.bcast(place, root=0)
            connection, _ = server.accept()
    else:
        connection = socket.create_connection(world.comm.bcast(None, root=0))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class PlainFile(Plain):
    """Write or read one file by plain calls, with direct I/O and fsync where the store uses them."""

    arrival = 0

    def __init__(self, world: World, nbytes: int, window: int, direction: str, store: Any) -> None:
        super().__init__(world, nbytes, window)
        self._size = -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES
        self._memory = world.device.allocate_host(self._size)
        self._data = array_at(self._memory.address, (self._size,)).data
        self._path: Path = store.directory.parent / "plain"
        self._flags = os.O_DIRECT if store.io == "direct" else 0
        self._fsync = store.fsync
        self._direction = direction
        array_at(self._memory.address, (self._size,)).fill(1)
        self._write()

    def start(self, index: int) -> list[Any]:
        """Write or read it all."""
        if self._direction == "out":
            self._write()
        else:
            self._read()
        return []

    def close(self) -> None:
        """Remove the file."""
        with suppress(FileNotFoundError):
            self._path.unlink()
        self._data.release()
        self._memory.close()
        super().close()

    def _write(self) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | self._flags, 0o600)
        try:
            done = 0
            while done < self._size:
                done += os.write(fd, self._data[done : done + CHUNK_BYTES])
            if self._fsync:
                os.fsync(fd)
        finally:
            os.close(fd)

    def _read(self) -> None:
        fd = os.open(self._path, os.O_RDONLY | self._flags)
        try:
            done = 0
            while done < self._size:
                done += os.readv(fd, [self._data[done : done + CHUNK_BYTES]])
        finally:
            os.close(fd)


def make_ceiling(world: Any, transport: str, direction: str, nbytes: int, window: int, carrier: Any) -> Plain:
    """Make the plain transfer that a carrier is compared with; docs/benchmarks.md lists them."""
    if transport == "local":
        return PlainCopy(world, nbytes, window, direction)
    if transport == "disk":
        return PlainFile(world, nbytes, window, direction, carrier)
    if transport in ("ipc", "nccl"):
        return PlainPeerCopy(world, nbytes, window)
    return PlainSocket(world, nbytes, window) if transport == "tcp" else PlainMpi(world, nbytes, window)
