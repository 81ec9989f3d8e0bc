"""Stages that hand hidden states on in mailboxes, as on GPUs, here between CPU ranks: the same tokens as ever."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.mpi.test_engine import make_config

pytestmark = [pytest.mark.mpi(min_size=7), pytest.mark.timeout(100)]


@pytest.fixture
def mailboxes(monkeypatch):
    """Join all stages of CPU ranks by mailboxes; gives how many this rank has opened."""
    from dejavu.cluster import participant
    from dejavu.cluster.accelerator import most_tokens
    from dejavu.cluster.links import Links, open_inbox, open_outbox
    from dejavu.cluster.site import Site, dtype_of

    opened = []

    def open_links(site: Site, stack: ExitStack) -> Links:
        links, channel, device = Links(), site.channel, site.device
        if not site.shard.is_first:
            size = most_tokens(site.setup, site.placement), site.setup.spec.hidden_size, dtype_of(site.setup)
            links.inbox = open_inbox(channel, device, site.neighbour(-1), *size, stack)
            opened.append(links.inbox)
        if not site.shard.is_last:
            links.outbox = open_outbox(channel, device, site.neighbour(1), stack)
            opened.append(links.outbox)
        stack.push(links.leave)
        return links

    monkeypatch.setattr(participant, "open_links", open_links)
    return opened


@pytest.mark.parametrize(("tp", "pp", "schedule"), [(1, 3, (4, 5, 8192, 1)), (2, 2, (0, 0, 20, 2))])
def test_mailboxes_carry_every_pass(world, reference_of, mailboxes, tp, pp, schedule):
    reference = reference_of("llama")
    completions = world.generate(make_config(reference, tp, pp, schedule), reference.requests)
    assert [tuple(completion.token_ids) for completion in completions] == list(reference.token_ids)
    used = world.gather([end.name for end in mailboxes])
    assert sum(map(len, used)) == 2 * tp * (pp - 1)
    assert {name for names in used for name in names} == {"mailbox"}
