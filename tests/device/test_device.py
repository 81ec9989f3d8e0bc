"""What every device backend does alike: order, copies, pieces, flags, and memory shared between processes."""

import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from dejavu.device import Location, make_pieces, num_cuda_devices, open_device, pieces_from
from dejavu.device.handles import accept, listen, private_directory, receive_message, send_message
from dejavu.errors import CapacityError, DeadlineError, TransferError

PEER = Path(__file__).with_name("peer.py")
PEER_BYTES = 1 << 20


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and num_cuda_devices() == 0:
        pytest.skip("no CUDA device, or no cuda-python")
    with open_device(request.param) as opened:
        yield opened


@pytest.fixture
def stream(device):
    with device.create_stream("test") as made:
        yield made


def random_bytes(nbytes, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8))


def filled(device, contents, stream):
    """Give device memory with these bytes."""
    buffer = device.allocate(contents.numel())
    device.copy(buffer, contents, stream=stream)
    stream.synchronize(10)
    return buffer


def contents_of(device, place, nbytes, stream):
    with device.allocate_host(nbytes) as host:
        device.copy(host, place, stream=stream)
        stream.synchronize(10)
        return host.tensor().clone()


class Gate:
    """A flag that holds a stream back until the test opens it."""

    def __init__(self, device):
        self.device = device
        self.flag = device.allocate_host(4)
        self.flag.tensor().zero_()
        self.opener = device.create_stream("opener")

    def hold(self, stream, deadline_s=20.0):
        self.device.wait_flag(self.flag, 1, stream=stream, deadline_s=deadline_s)

    def open(self):
        self.device.write_flag(self.flag, 1, stream=self.opener)
        self.opener.synchronize(10)


@pytest.fixture
def gate(device):
    made = Gate(device)
    yield made
    made.open()
    made.opener.close()
    device.synchronize()
    made.flag.close()


class TestOrder:
    def test_a_stream_keeps_its_order_and_does_not_block_the_caller(self, device, stream, gate):
        with device.allocate_host(1024) as buffer:
            buffer.tensor().fill_(7)
            gate.hold(stream)
            for value in range(50):
                device.fill(buffer, value, stream=stream)
            assert not stream.query()
            assert (buffer.tensor() == 7).all()
            gate.open()
            stream.synchronize(10)
            assert stream.query()
            assert (buffer.tensor() == 49).all()

    def test_streams_run_beside_each_other(self, device, stream, gate):
        with device.create_stream("free") as free, device.allocate(64) as buffer:
            gate.hold(stream)
            device.fill(buffer, 1, stream=free)
            free.synchronize(10)
            assert not stream.query()
            gate.open()

    def test_an_event_orders_another_stream_behind_it(self, device, stream, gate):
        with (
            device.create_stream("second") as second,
            device.create_event() as event,
            device.allocate_host(64) as buffer,
        ):
            gate.hold(stream)
            device.fill(buffer, 1, stream=stream)
            event.record(stream)
            event.wait(second)
            device.fill(buffer, 2, stream=second)
            assert not event.query()
            assert not second.query()
            gate.open()
            second.synchronize(10)
            assert event.query()
            assert (buffer.tensor() == 2).all()

    def test_a_wait_takes_the_mark_made_before_it(self, device, stream, gate):
        with device.create_stream("second") as second, device.create_event() as event:
            event.record(stream)
            event.wait(second)
            gate.hold(stream)
            event.record(stream)  # the later mark, which is held, is not waited for
            second.synchronize(10)
            assert not event.query()

    def test_an_event_that_was_never_recorded_holds_nobody(self, device, stream):
        with device.create_event() as event:
            assert event.query()
            event.synchronize(1)
            event.wait(stream)
            stream.synchronize(10)

    def test_elapsed_time_between_events(self, device, stream, gate):
        with device.create_event(timing=True) as start, device.create_event(timing=True) as end:
            start.record(stream)
            gate.hold(stream)
            end.record(stream)
            start.synchronize(10)
            time.sleep(0.05)
            gate.open()
            end.synchronize(10)
            assert 45 < end.elapsed_ms(start) < 5000

    def test_a_held_event_misses_its_deadline(self, device, stream, gate):
        with device.create_event() as event:
            gate.hold(stream)
            event.record(stream)
            with pytest.raises(DeadlineError):
                event.synchronize(0.05)
            with pytest.raises(DeadlineError):
                stream.synchronize(0.05)

    def test_the_compute_stream_orders_torch_before_copies(self, device, stream):
        source = torch.zeros(1 << 20, dtype=torch.uint8, device=device.torch_device)
        target = torch.zeros_like(source)
        with device.create_event() as computed:
            for _ in range(5):
                source += 1
            computed.record(device.compute_stream)
            computed.wait(stream)
            device.copy(target, source, stream=stream)
            stream.synchronize(10)
        assert (target == 5).all()

    def test_a_graph_replays_its_work_on_the_contents_of_the_moment(self, device, stream):
        with (
            device.allocate(4096) as target,
            device.allocate_host(4096) as source,
            device.capture(lambda: device.copy(target, source, stream=stream), stream=stream) as graph,
        ):
            for value in (1, 2):
                source.tensor().fill_(value)
                graph.replay(stream=stream)
                assert (contents_of(device, target, 4096, stream) == value).all()


class TestFailure:
    def test_a_flag_that_nobody_writes_ends_in_a_deadline(self, device, gate):
        with device.create_stream("dead") as stream:
            gate.hold(stream, deadline_s=0.1)
            start_s = time.monotonic()
            with pytest.raises(DeadlineError, match="flag"):
                stream.synchronize(10)
            assert 0.08 < time.monotonic() - start_s < 5

    def test_an_event_behind_a_dead_flag_ends_in_its_deadline_too(self, device, gate):
        with device.create_stream("dead") as stream, device.create_event() as event:
            gate.hold(stream, deadline_s=0.1)
            event.record(stream)
            with pytest.raises(DeadlineError, match="flag"):
                event.synchronize(10)

    def test_cancel_ends_a_wait_with_its_error(self, device, gate):
        with device.create_stream("cancelled") as stream:
            gate.hold(stream)
            error = TransferError("rank 3 is dead")
            threading.Timer(0.05, stream.cancel, (error,)).start()
            with pytest.raises(TransferError) as raised:
                stream.synchronize(10)
            assert raised.value is error
            with pytest.raises(TransferError):
                stream.query()

    def test_a_renewed_stream_works_again(self, device, gate):
        with device.create_stream("renewed") as stream, device.create_event() as event:
            gate.hold(stream)
            stream.cancel(TransferError("rank 3 is dead"))
            stream.renew()
            buffer = filled(device, random_bytes(64), stream)
            event.record(stream)
            event.synchronize(10)
            assert torch.equal(contents_of(device, buffer, 64, stream), random_bytes(64))
            assert stream.query()
            buffer.close()

    def test_the_error_reaches_a_stream_that_waits_for_the_failed_one(self, device, gate):
        with (
            device.create_stream("first") as first,
            device.create_stream("second") as second,
            device.create_event() as event,
        ):
            gate.hold(first)
            event.record(first)
            event.wait(second)
            first.cancel(TransferError("rank 3 is dead"))
            with pytest.raises(TransferError, match="rank 3"):
                second.synchronize(10)

    def test_a_mark_before_the_failure_stays_sound(self, device, gate):
        with (
            device.create_stream("first") as first,
            device.create_stream("early") as early,
            device.create_stream("late") as late,
            device.create_event() as before,
            device.create_event() as behind,
        ):
            before.record(first)
            before.wait(early)
            before.synchronize(10)
            gate.hold(first)
            behind.record(first)
            behind.wait(late)
            first.cancel(TransferError("rank 3 is dead"))
            with pytest.raises(TransferError, match="rank 3"):
                late.synchronize(10)
            early.synchronize(10)
            before.synchronize(10)

    def test_closing_by_an_exception_does_not_hang_in_a_wait(self, device, gate):
        def leave():
            with device.create_stream("left") as stream:
                gate.hold(stream)
                raise ZeroDivisionError

        start_s = time.monotonic()
        with pytest.raises(ZeroDivisionError):
            leave()
        assert time.monotonic() - start_s < 5

    def test_posting_without_end_behind_a_dead_flag_does_not_hang(self, device, gate):
        with device.create_stream("dead") as stream, device.allocate(64) as buffer:
            gate.hold(stream, deadline_s=0.3)
            start_s = time.monotonic()
            for _ in range(3000):  # more than the queue of a CUDA stream holds
                device.fill(buffer, 1, stream=stream)
            assert time.monotonic() - start_s < 5
            with pytest.raises(DeadlineError, match="flag"):
                stream.synchronize(10)

    def test_freeing_memory_beside_a_dead_flag_does_not_hang(self, device, gate):
        with device.create_stream("dead") as stream:
            buffer = device.allocate(64)
            gate.hold(stream, deadline_s=0.2)
            start_s = time.monotonic()
            buffer.close()
            assert time.monotonic() - start_s < 5
            with pytest.raises(DeadlineError, match="flag"):
                stream.synchronize(10)

    def test_memory_that_does_not_fit_is_refused(self, device):
        with pytest.raises(CapacityError, match="bytes"):
            device.allocate(1 << 50)

    def test_a_piece_outside_its_memory_is_refused(self, device, stream):
        with device.allocate(1000) as buffer, device.allocate(1000) as other:
            for triple in ((990, 0, 11), (0, 990, 11), (-1, 0, 4), (0, 0, -1), (2**62, 0, 2**62)):
                with pytest.raises(TransferError, match="piece 1"):
                    device.pack(other, buffer, pieces_from([(0, 0, 4), triple]), stream=stream)


class TestCopies:
    @pytest.mark.parametrize("nbytes", [1, 3, 4097, 1 << 20])
    @pytest.mark.parametrize(("target_offset", "source_offset"), [(0, 0), (1, 2)])
    def test_contiguous(self, device, stream, nbytes, target_offset, source_offset):
        contents, before = random_bytes(nbytes + 8), random_bytes(nbytes + 8, 1)
        source, target = filled(device, contents, stream), filled(device, before, stream)
        with source, target:
            device.copy(target.view(target_offset, nbytes), source.view(source_offset, nbytes), stream=stream)
            before[target_offset : target_offset + nbytes] = contents[source_offset : source_offset + nbytes]
            assert torch.equal(contents_of(device, target, nbytes + 8, stream), before)

    def test_rows_of_two_pitches(self, device, stream):
        contents, before = random_bytes(5000), random_bytes(5000, 1)
        expected = before.clone()
        for row in range(11):
            expected[row * 400 : row * 400 + 37] = contents[row * 123 : row * 123 + 37]
        with filled(device, contents, stream) as source, filled(device, before, stream) as target:
            device.copy_2d(
                target, source, width=37, height=11, target_pitch=400, source_pitch=123, stream=stream
            )  # fmt: skip
            assert torch.equal(contents_of(device, target, 5000, stream), expected)

    def test_tensors_and_buffers_share_their_bytes(self, device, stream):
        with device.allocate(4096) as buffer:
            numbers = buffer.tensor(torch.float32, (32, 32))
            assert numbers.data_ptr() == buffer.address
            numbers.copy_(torch.arange(1024.0).view(32, 32))
            device.synchronize()
            other = torch.zeros(32, 32, device=device.torch_device)
            device.copy(other, buffer, stream=stream)
            stream.synchronize(10)
            assert torch.equal(other.cpu(), torch.arange(1024.0).view(32, 32))
            assert buffer.view(4, 4).tensor(torch.float32).item() == 1.0

    def test_registered_memory_is_read_in_place(self, device, stream):
        ours = torch.arange(5000, dtype=torch.int32)
        with device.register_host(ours) as pinned, device.allocate(20000) as target:
            assert pinned.address == ours.data_ptr()
            assert pinned.location is Location.HOST
            device.pack(target, pinned, make_pieces([0], [0], 20000), stream=stream)
            assert torch.equal(contents_of(device, target, 20000, stream), ours.view(torch.uint8))

    def test_compute_stream_work_is_done_when_torch_looks(self, device):
        target = torch.zeros(1000, dtype=torch.uint8, device=device.torch_device)
        device.fill(target, 9, stream=device.compute_stream)
        assert int(target.sum()) == 9000


def random_pieces(generator, num_pieces, sizes, source_bytes, target_bytes):
    """Make pieces that do not overlap in the target, at any alignment, in any order."""
    nbytes = generator.choice(sizes, num_pieces)
    gaps = generator.integers(0, 5, num_pieces)
    target = np.cumsum(nbytes + gaps) - nbytes
    keep = target + nbytes <= target_bytes
    order = generator.permutation(int(keep.sum()))
    nbytes, target = nbytes[keep][order], target[keep][order]
    source = generator.integers(0, source_bytes - nbytes + 1)
    return make_pieces(source, target, nbytes)


SHAPES = {
    "uniform": (3000, [256]),
    "uniform, odd": (3000, [37]),
    "mixed": (2000, [0, 1, 2, 3, 5, 8, 16, 31, 64, 100, 777]),
    "large": (6, [100_000, 65_536, 33]),
    "one": (1, [200_001]),
    "none": (0, [1]),
}


class TestPieces:
    @pytest.mark.parametrize("method", ["pack", "copy_batch"])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("aligned", [1, 2, 8, 16])
    def test_against_a_byte_by_byte_model(self, device, stream, method, shape, aligned):
        contents, before = random_bytes(1 << 20), random_bytes(1 << 20, 1)
        found = random_pieces(np.random.default_rng(aligned), *SHAPES[shape], (1 << 20) // 32, (1 << 20) // 32 - 16)
        if shape in ("large", "one"):
            found = random_pieces(np.random.default_rng(aligned), *SHAPES[shape], 250_000, (1 << 20) // 2)
            aligned = min(aligned, 2)
        pieces = make_pieces(found.source * aligned, found.target * aligned, found.nbytes)
        expected = before.numpy().copy()
        for source, target, nbytes in zip(pieces.source, pieces.target, pieces.nbytes, strict=True):
            expected[target : target + nbytes] = contents.numpy()[source : source + nbytes]
        with filled(device, contents, stream) as pool, filled(device, before, stream) as staging:
            getattr(device, method)(staging, pool, pieces, stream=stream)
            assert np.array_equal(contents_of(device, staging, 1 << 20, stream).numpy(), expected)

    def test_unpack_reverses_pack_through_host_memory(self, device, stream):
        contents = random_bytes(1 << 16)
        starts = np.random.default_rng(3).permutation(64)[:40] * 1024
        pieces = make_pieces(starts, np.arange(40) * 1000, 1000)
        with (
            filled(device, contents, stream) as pool,
            device.allocate_host(40_000) as staging,
            device.allocate(1 << 16) as other,
        ):
            device.fill(other, 0, stream=stream)
            device.pack(staging, pool, pieces, stream=stream)
            device.unpack(other, staging, pieces, stream=stream)
            expected = np.zeros(1 << 16, np.uint8)
            for start in starts:
                expected[start : start + 1000] = contents.numpy()[start : start + 1000]
            assert np.array_equal(contents_of(device, other, 1 << 16, stream).numpy(), expected)

    def test_addresses_reach_several_memories_in_one_call(self, device, stream):
        contents = random_bytes(300)
        with (
            filled(device, contents, stream) as pool,
            device.allocate(100) as first,
            device.allocate_host(100) as second,
        ):
            pieces = pieces_from([(0, first.address, 100), (200, second.address, 100)])
            device.pack(None, pool, pieces, stream=stream)
            assert torch.equal(contents_of(device, first, 100, stream), contents[:100])
            assert torch.equal(second.tensor(), contents[200:])

    def test_many_lists_in_flight_keep_their_tables_apart(self, device, stream, gate):
        num_lists, num_pieces = 40, 2000
        contents = random_bytes(num_pieces * 16)
        generator = np.random.default_rng(5)
        with filled(device, contents, stream) as pool, device.allocate(num_lists * num_pieces * 16) as target:
            gate.hold(stream)
            orders = [generator.permutation(num_pieces) for _ in range(num_lists)]
            for index, order in enumerate(orders):
                part = target.view(index * num_pieces * 16, num_pieces * 16)
                device.pack(part, pool, make_pieces(order * 16, np.arange(num_pieces) * 16, 16), stream=stream)
            gate.open()
            found = contents_of(device, target, target.nbytes, stream).view(num_lists, num_pieces, 16)
            for index, order in enumerate(orders):
                assert torch.equal(found[index], contents.view(num_pieces, 16)[torch.from_numpy(order)])


@contextmanager
def peer_process(device, role):
    """Start peer.py in a role and give it with its connection; it is killed and reaped at the end."""
    directory = private_directory()
    path = directory / "socket"
    with listen(path) as server:
        command = [sys.executable, str(PEER), device.properties.kind, role, str(path)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        try:
            with accept(server, 60) as connection:
                connection.settimeout(30)
                yield process, connection
        except Exception as error:
            process.kill()
            error.add_note(f"peer ended with {process.wait(10)}: {process.stderr.read().decode()}")
            raise
        finally:
            process.kill()
            process.wait(10)
            process.stderr.close()
            path.unlink()
            directory.rmdir()


class TestTwoProcesses:
    def test_flags_go_back_and_forth_behind_the_data(self, device, stream):
        with device.allocate_exportable(PEER_BYTES) as buffer, peer_process(device, "reply") as (_, connection):
            device.fill(buffer, 0, stream=stream)
            stream.synchronize(10)
            fd = buffer.export_fd()
            send_message(connection, b"memory", (fd,))
            os.close(fd)
            receive_message(connection)
            for step in range(20):
                device.fill(buffer.view(256, 64), step, stream=stream)
                device.write_flag(buffer.view(0, 4), 2 * step + 1, stream=stream)
                device.wait_flag(buffer.view(4, 4), 2 * step + 2, stream=stream)
                if step % 5 == 0:
                    assert (contents_of(device, buffer.view(512, 64), 64, stream) == step).all()
            stream.synchronize(20)
            assert receive_message(connection)[0] == b"done"

    def test_contents_survive_the_kill_of_their_exporter(self, device, stream):
        with peer_process(device, "export") as (process, connection):
            message, (fd,) = receive_message(connection)
            assert message == b"exported"
            process.kill()
            process.wait(10)
            with device.import_fd(fd, PEER_BYTES) as buffer:
                os.close(fd)
                assert (contents_of(device, buffer, PEER_BYTES, stream) == 0x5A).all()

    def test_handles_open_memory_and_events_of_a_living_process(self, device, stream):
        with peer_process(device, "lend") as (process, connection):
            handles, _ = receive_message(connection)
            assert len(handles) == 128
            with device.open_ipc(handles[:64], PEER_BYTES) as buffer, device.open_event(handles[64:]) as event:
                event.wait(stream)
                event.synchronize(10)
                assert (contents_of(device, buffer, PEER_BYTES, stream) == 0x33).all()
            send_message(connection, b"finished")
            assert process.wait(30) == 0

    def test_pinned_windows_are_shared(self, device, stream):
        with device.allocate_host_exportable(8192) as window:
            assert not window.tensor().any()
            fd = window.export_fd()
            with device.import_host_fd(fd, 8192) as other:
                os.close(fd)
                assert other.address != window.address
                device.fill(other, 0x77, stream=stream)
                stream.synchronize(10)
                assert (window.tensor() == 0x77).all()
