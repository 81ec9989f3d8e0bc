"""What is the CPU backend's own: errors of its jobs, lifetimes of its memory, waits that leave the core to others."""

import ctypes
import gc
import os
import threading
import time

import pytest
import torch

from dejavu.device import DeviceError, make_pieces, open_device
from dejavu.device.flags import Flag
from dejavu.errors import DeadlineError


@pytest.fixture
def device():
    with open_device("cpu") as opened:
        yield opened


def num_mappings():
    with open("/proc/self/maps") as lines:
        return sum("memfd:dejavu" in line for line in lines)


def test_the_first_error_of_a_job_is_raised_and_later_work_is_dropped(device):
    class BrokenJobError(Exception):
        pass

    done = []

    def fail(number):
        raise BrokenJobError(number)

    with device.create_stream() as stream:
        stream.submit(lambda: done.append(1))
        stream.submit(lambda: fail(1))
        stream.submit(lambda: fail(2))
        stream.submit(lambda: done.append(2))
        for _ in range(2):
            with pytest.raises(BrokenJobError, match="1"):
                stream.synchronize(10)
    assert done == [1]


def test_a_thread_starts_with_the_first_job_and_ends_with_close(device):
    before = threading.active_count()
    stream = device.create_stream()
    assert threading.active_count() == before
    stream.submit(lambda: None)
    stream.close()
    assert threading.active_count() == before


def test_a_mark_on_an_idle_stream_needs_no_thread_and_one_behind_work_waits_for_it(device):
    before, held = threading.active_count(), threading.Event()
    with device.create_stream() as stream, device.create_event() as event:
        event.record(stream)
        assert event.query()
        assert threading.active_count() == before
        stream.submit(lambda: held.wait(10))
        event.record(stream)
        assert not event.query()
        held.set()
        event.synchronize(10)
        event.record(stream)
        assert event.query()


def test_memory_goes_with_close_and_its_last_tensor(device):
    gc.collect()
    before = num_mappings()
    buffer = device.allocate(1 << 16)
    tensor = buffer.tensor()
    buffer.close()
    assert num_mappings() == before + 1
    tensor.fill_(3)
    assert int(tensor.sum()) == 3 << 16
    del tensor
    assert num_mappings() == before


def test_queued_work_keeps_the_memory_that_was_closed(device):
    target = torch.zeros(64, dtype=torch.uint8)
    with device.allocate(4) as flag, device.create_stream("work") as stream, device.create_stream() as opener:
        source = device.allocate(64)
        source.tensor().fill_(5)
        device.wait_flag(flag, 1, stream=stream)
        device.pack(target, source, make_pieces([0], [0], 64), stream=stream)
        source.close()
        device.write_flag(flag, 1, stream=opener)
        stream.synchronize(10)
    assert (target == 5).all()


def test_a_handle_of_freed_memory_says_so(device):
    buffer = device.allocate(64)
    handle = buffer.ipc_handle()
    buffer.close()
    with pytest.raises(DeviceError, match=r"must live|has closed"):
        device.open_ipc(handle, 64)


def test_a_descriptor_smaller_than_asked_for_is_refused(device):
    with device.allocate(4096) as buffer:
        fd = buffer.export_fd()
        with pytest.raises(DeviceError, match="4096 bytes"):
            device.import_fd(fd, 8192)
        device.import_fd(fd, 4096).close()
        os.close(fd)


def test_waiting_leaves_the_core_to_others(device):
    with device.allocate(4) as flag, device.create_stream("waits") as stream, device.create_stream() as opener:
        device.wait_flag(flag, 1, stream=stream)
        start_s = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - start_s < 0.15
        device.write_flag(flag, 1, stream=opener)
        stream.synchronize(10)


def test_flags_compare_cyclically_and_see_plain_stores():
    word = (ctypes.c_uint32 * 4)()
    flag = Flag(ctypes.addressof(word))
    flag.write(2**32 - 1)
    assert flag.passed(2**32 - 1)
    assert not flag.passed(2**32)  # wraps to 0, which is one further
    flag.write(2**32)
    assert flag.passed(2**32 - 1)
    store = threading.Timer(0.02, word.__setitem__, (0, 7))  # without a wake-up, as a remote write is
    store.start()
    flag.wait(7, 5)
    with pytest.raises(DeadlineError, match="stayed at 7 instead of 8"):
        flag.wait(8, 0.01)


def test_work_posted_together_begins_at_the_end_and_keeps_its_order(device):
    target = torch.zeros(64, dtype=torch.uint8)
    with device.create_stream("work") as stream, device.create_event() as event:
        with stream.together():
            device.fill(target, 1, stream=stream)
            with stream.together():
                device.fill(target[:32], 2, stream=stream)
            event.record(stream)
            time.sleep(0.02)
            assert not event.query()
            assert not target.any()
        event.synchronize(10)
    assert target.tolist() == [2] * 32 + [1] * 32


def test_the_compute_stream_raises_at_once(device):
    with device.allocate(4) as flag, pytest.raises(DeadlineError):
        device.wait_flag(flag, 1, stream=device.compute_stream, deadline_s=0.01)
