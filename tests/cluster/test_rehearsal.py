"""What a spare prepares: a stage that computes as its worker's does, on the same pool, as long as that is kept."""

import os
import secrets
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from dejavu.cluster.job import prepare
from dejavu.cluster.keeping import StoreShelf, take_memory
from dejavu.cluster.links import Links
from dejavu.cluster.participant import hold
from dejavu.cluster.rehearsal import Rehearsal, prepare_passes
from dejavu.cluster.site import Site
from dejavu.config import ServeConfig
from dejavu.device import open_device
from dejavu.device.keeper_line import Guardian, end_keeper
from dejavu.device.vault import Vault
from dejavu.engine.ring import pool_name, weights_name
from dejavu.model.batch import Batch
from tests.model_zoo import make_checkpoint

CHANNEL = SimpleNamespace(membership=SimpleNamespace(epoch=1))


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    directory = make_checkpoint("llama", tmp_path_factory.mktemp("rehearsal") / "model")
    config = ServeConfig(
        model=str(directory), pp=2, spares=1, row_len=16, microbatch_size=2, prompt_len=4, output_len=4, device="cpu"
    )
    return prepare(config).setup


@pytest.fixture
def vault():
    job = secrets.token_hex(16)
    try:
        yield Vault(job, Guardian(os.getpid()))
    finally:
        end_keeper(job)


def hold_all(setup, device, vault, stack):
    """Give what the workers hold, which the keeper then has."""
    sites = [Site(CHANNEL, setup, placement, device, vault) for placement in setup.topology.workers]
    return {site.placement: hold(site, Links(), stack) for site in sites}


def compute(holdings, hidden):
    with torch.inference_mode():
        batch = Batch(torch.tensor([5, 9, 3]), [3], [0], [[0, 1]], [0])
        return holdings.stage.forward(batch, hidden, holdings.pool)


def test_what_is_prepared_computes_as_the_worker_does_on_its_pool(setup, vault):
    with open_device("cpu") as device, ExitStack() as stack:
        workers = hold_all(setup, device, vault, stack)
        rehearsal = Rehearsal(CHANNEL, setup, device, vault, StoreShelf(vault, device))
        assert rehearsal.prepare() > 0
        hidden = taken_hidden = None
        for placement, worker in workers.items():
            hidden = compute(worker, hidden)
            taken = rehearsal.take(placement, stack)
            assert taken.has_kv
            assert (taken.kept_bytes, taken.memory.nbytes) == (worker.memory.nbytes, worker.memory.nbytes)
            assert torch.equal(taken.pool, worker.pool)
            assert taken.pool.any()
            taken_hidden = compute(taken, taken_hidden)
            assert torch.equal(hidden, taken_hidden)
        assert rehearsal.take(setup.topology.workers[0], stack) is None  # taken already


@pytest.mark.parametrize("name", [pool_name, weights_name])
def test_what_the_keeper_has_no_more_is_prepared_anew(setup, vault, name):
    with open_device("cpu") as device, ExitStack() as stack:
        first, second = hold_all(setup, device, vault, stack)
        rehearsal = Rehearsal(CHANNEL, setup, device, vault, StoreShelf(vault, device))
        rehearsal.prepare()
        prepared = rehearsal.places[second.rank]
        vault.drop(name(first))
        assert rehearsal.take(first, stack) is None
        rehearsal.prepare()
        assert list(rehearsal.places) == [second.rank]  # nothing is there to prepare
        assert rehearsal.places[second.rank] is prepared
        vault.drop("")
        hold_all(setup, device, vault, stack)
        rehearsal.prepare()
        assert rehearsal.take(first, stack).has_kv
        rehearsal.close()
        assert not rehearsal.places


@pytest.mark.parametrize("name", [pool_name, weights_name])
def test_what_is_lost_while_it_is_prepared_is_left_out(setup, vault, monkeypatch, name):
    with open_device("cpu") as device, ExitStack() as stack:
        first, second = hold_all(setup, device, vault, stack)
        rehearsal = Rehearsal(CHANNEL, setup, device, vault, StoreShelf(vault, device))
        can_prepare = rehearsal.can_prepare

        def lose(site, kept):
            can = can_prepare(site, kept)
            if site.placement is second:
                assert vault.drop(name(second))
            return can

        monkeypatch.setattr(rehearsal, "can_prepare", lose)
        rehearsal.prepare()
        assert list(rehearsal.places) == [first.rank]
        rehearsal.close()


def test_each_memory_has_a_mark_of_its_own(vault):
    with open_device("cpu") as device:
        marks = set()
        for nbytes in (4096, 8192):
            memory, _ = take_memory(vault, device, "0.0.0/pool", nbytes)
            memory.close()
            marks.add(vault.contents()["0.0.0/pool"].about["mark"])
        assert len(marks) == 2


def test_token_steps_are_prepared_for_a_pool_that_stays_alone(setup):
    warmed = []
    stage = SimpleNamespace(warm_up=lambda pool, row_counts, prompt_tokens: warmed.append((pool, list(row_counts))))
    site = Site(CHANNEL, setup, setup.topology.workers[0], None, None)
    empty, pool = torch.zeros(4, 0, 2, 8, 2, 4), torch.zeros(4, 1, 2, 8, 2, 4)
    prepare_passes(site, stage, empty)  # made anew with each change: what is captured on it would be of no use
    prepare_passes(site, stage, pool)
    assert warmed == [(pool, [1, 2])]
