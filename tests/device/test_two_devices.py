"""Memory of a second CUDA device: where torch sees it, whichever device is torch's current one."""

import os

import pytest
import torch

from dejavu.device import num_cuda_devices, open_device

pytestmark = [
    pytest.mark.gpu2,
    pytest.mark.skipif(num_cuda_devices() < 2, reason="needs 2 CUDA devices and cuda-python"),
]
NBYTES = 1 << 20


@pytest.fixture(scope="module")
def devices():
    with open_device("cuda", 0) as first, open_device("cuda", 1) as second:
        yield first, second


@pytest.fixture(params=[0, 1])
def current(request):
    """Make either device torch's current one: a rank of the second device may have left it at the first."""
    with torch.cuda.device(request.param):
        yield request.param


@pytest.mark.parametrize("kind", ["allocate", "allocate_exportable"])
@pytest.mark.parametrize("index", [0, 1])
def test_tensors_lie_where_their_memory_does(devices, current, kind, index):
    device = devices[index]
    with getattr(device, kind)(NBYTES) as buffer, device.create_stream() as stream:
        device.fill(buffer, 7, stream=stream)
        stream.synchronize(10)
        tensor = buffer.view(256, 512).tensor(torch.float32, (8, 16))
        assert (tensor.device, tensor.data_ptr()) == (torch.device("cuda", index), buffer.address + 256)
        tensor.zero_()
        torch.cuda.synchronize(index)
        with device.allocate_host(NBYTES) as host:
            device.copy(host, buffer, stream=stream)
            stream.synchronize(10)
            assert int(host.tensor().sum()) == 7 * (NBYTES - 512)


def test_imported_memory_belongs_to_the_device_that_maps_it(devices, current):
    first, second = devices
    with first.allocate_exportable(NBYTES) as own:
        fd = own.export_fd()
        with second.import_fd(fd, NBYTES) as there, second.create_stream() as stream:
            os.close(fd)
            second.fill(there, 9, stream=stream)
            stream.synchronize(10)
            assert there.tensor().device == torch.device("cuda", 1)
            assert int(own.tensor().sum(dtype=torch.int64)) == 9 * NBYTES
            assert int(there.tensor().sum(dtype=torch.int64)) == 9 * NBYTES
