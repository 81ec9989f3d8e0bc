"""The other process of the two-process tests: `python peer.py KIND ROLE DIRECTORY`, which talks over a socket."""

import os
import sys
import time
from pathlib import Path

from dejavu.device import open_device
from dejavu.device.handles import connect, receive_message, send_message

NBYTES = 1 << 20


def export(device, connection):
    """Export filled memory, then wait to be killed."""
    with device.allocate_exportable(NBYTES) as buffer, device.create_stream() as stream:
        device.fill(buffer, 0x5A, stream=stream)
        stream.synchronize()
        send_message(connection, b"exported", (buffer.export_fd(),))
        time.sleep(60)


def reply(device, connection):
    """Wait for odd flag values and answer with the even ones, in memory that the parent exported."""
    _, fds = receive_message(connection)
    with device.import_fd(fds[0], NBYTES) as buffer, device.create_stream() as stream:
        os.close(fds[0])
        send_message(connection, b"mapped")
        for step in range(20):
            device.wait_flag(buffer.view(0, 4), 2 * step + 1, stream=stream)
            device.copy(buffer.view(512, 64), buffer.view(256, 64), stream=stream)
            device.write_flag(buffer.view(4, 4), 2 * step + 2, stream=stream)
        stream.synchronize(30)
        send_message(connection, b"done")


def lend(device, connection):
    """Hand out memory and an event by their 64-byte handles; the event marks the memory's filling."""
    with (
        device.allocate(NBYTES) as buffer,
        device.create_event(interprocess=True) as event,
        device.create_stream() as stream,
    ):
        device.fill(buffer, 0x33, stream=stream)
        event.record(stream)
        send_message(connection, buffer.ipc_handle() + event.ipc_handle())
        receive_message(connection)  # the parent has finished
        stream.synchronize(30)


if __name__ == "__main__":
    kind, role, path = sys.argv[1:]
    with open_device("cuda" if kind == "cuda" else "cpu") as opened, connect(Path(path), 30) as line:
        {"export": export, "reply": reply, "lend": lend}[role](opened, line)
