"""What every rank but the controller does from the start of a run to its end, whatever it comes to be meanwhile."""

import importlib
from contextlib import ExitStack

from dejavu.cluster.company import Rounds
from dejavu.cluster.participant import Participant
from dejavu.engine.messages import Farewell
from dejavu.engine.setup import EngineSetup
from dejavu.errors import PeerLostError
from dejavu.topology import CONTROLLER
from dejavu.transport.mpi import Channel

WARM_MODULES = ("dejavu.model.decoder", "dejavu.model.sampling", "dejavu.model.weights", "dejavu.transport.registry")


def stand_by(channel: Channel, setup: EngineSetup) -> None:
    """Work, or wait as a spare for the place of a rank that dies, until the controller says farewell."""
    rounds = Rounds(channel, setup)
    if channel.rank >= setup.topology.first_spare:
        warm_up()
    with ExitStack() as stack:
        participant = Participant(channel, setup, stack)
        while True:
            try:
                participant.take_part()
                return await_farewell(channel)
            except PeerLostError as error:
                rounds.reform(error)


def warm_up() -> None:
    """Import what a worker needs, so that taking over costs no more than what is its own."""
    for name in WARM_MODULES:
        importlib.import_module(name)


def await_farewell(channel: Channel) -> None:
    """Wait for the end, as long as it takes."""
    _, message = channel.receive(CONTROLLER)
    assert isinstance(message, Farewell), message


def say_farewell(channel: Channel) -> None:
    """Let everybody go."""
    for rank in channel.membership.present:
        if rank != CONTROLLER:
            channel.send(rank, Farewell())
