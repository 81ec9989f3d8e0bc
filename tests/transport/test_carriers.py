"""Every carrier held to one behaviour, on every device that it runs on."""

import pytest

from dejavu.device import num_cuda_devices, open_device
from dejavu.transport.carrier import Gathering
from tests.transport.carriers import CARRIERS, Setting
from tests.transport.conformance import DEATH_CASES, LINK_CASES, Rank
from tests.transport.pair import Pair
from tests.transport.store_conformance import STORE_CASES


def carriers(*, is_store):
    """Give (name, kind) parameters; those that need GPUs are marked."""
    for name, carrier in CARRIERS.items():
        if (carrier.start == "store") is is_store:
            for kind in carrier.devices:
                mark = pytest.mark.gpu2 if carrier.min_gpus > 1 else pytest.mark.gpu
                marks = [mark, needs(carrier.min_gpus)] if kind == "cuda" else []
                yield pytest.param((name, kind), id=f"{name}-{kind}", marks=marks)


def needs(num_gpus):
    return pytest.mark.skipif(num_cuda_devices() < num_gpus, reason=f"needs {num_gpus} CUDA devices and cuda-python")


@pytest.fixture(scope="module", params=list(carriers(is_store=False)))
def pair(request, tmp_path_factory):
    made = Pair(*request.param, tmp_path_factory.mktemp("link"))
    yield made
    made.close()


@pytest.mark.parametrize("case", LINK_CASES, ids=lambda case: case.__name__)
def test_a_link(pair, case):
    assert set(pair.run(case.__name__)) == {0, 1}


@pytest.mark.parametrize("name_and_kind", list(carriers(is_store=False)))
@pytest.mark.parametrize("case", DEATH_CASES, ids=lambda case: case.__name__)
def test_a_link_whose_peer_dies(name_and_kind, case, tmp_path):
    pair = Pair(*name_and_kind, tmp_path)
    try:
        assert set(pair.run(case.__name__)) == {0}
    finally:
        pair.close()


@pytest.fixture(scope="module", params=list(carriers(is_store=True)))
def store(request, tmp_path_factory):
    name, kind = request.param
    with open_device(kind) as device:
        made = {}
        for gathering in Gathering:
            setting = Setting(device, gathering, 0, 1, tmp_path_factory.mktemp(name), lambda data: [data])
            made[gathering] = CARRIERS[name].make(setting)
        yield device, made
        for carrier in made.values():
            carrier.close()


@pytest.mark.parametrize("case", STORE_CASES, ids=lambda case: case.__name__)
def test_a_store(store, case):
    device, made = store
    rank = Rank(device, made, 0, lambda: None)
    rank.peer = 0
    try:
        case(rank)
    finally:
        rank.close()
