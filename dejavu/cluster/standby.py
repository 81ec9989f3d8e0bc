"""What every rank but the controller does from the start of a run to its end, whatever it comes to be meanwhile."""

import importlib
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dejavu.cluster.company import Rounds
from dejavu.cluster.launcher import RUN_DIR
from dejavu.cluster.muster import Lost
from dejavu.cluster.participant import Participant
from dejavu.engine.messages import Farewell, Ready, Rehearse
from dejavu.engine.recovery import Death
from dejavu.engine.setup import EngineSetup
from dejavu.errors import PeerLostError
from dejavu.measure.recorder import FileRecorder
from dejavu.topology import CONTROLLER
from dejavu.transport.mpi import Channel
from dejavu.transport.registry import LINK_MODULES

WARM_MODULES = (
    *("dejavu.model.decoder", "dejavu.model.sampling", "dejavu.model.weights", "safetensors"),
    *("dejavu.transport.registry", *LINK_MODULES),
)


@dataclass(frozen=True, slots=True)
class Calling:
    """Tell that this process has become the controller: who died, and when that was seen on the host's clock."""

    deaths: Sequence[Death]
    detected_s: float


def stand_by(channel: Channel, setup: EngineSetup, lost: Lost | None = None) -> Calling | None:
    """Work, or wait as a spare for the place of a rank that dies, until the controller says farewell.

    Gives a calling where this process has to be the controller from now on. A process that has joined the run just now
    gives who was `lost` before.
    """
    rounds = Rounds(channel, setup, lost or ())
    if setup.is_refilled:
        rounds.recruiting.look_aside()
    with ExitStack() as stack:
        participant = Participant(channel, setup, stack, FileRecorder(Path(os.environ[RUN_DIR])))
        if channel.rank >= setup.topology.first_spare:
            warm_up()
            participant.enter_device()
        while True:
            detected_s, deaths = time.monotonic(), None
            try:
                if lost is not None:
                    detected_s = min((loss.detected_s for loss in lost), default=detected_s)
                    lost, deaths = None, rounds.settle()
                else:
                    participant.take_part()
                    await_farewell(channel, participant)
                    return None
            except PeerLostError as error:
                detected_s = time.monotonic()
                deaths = rounds.reform(error)
            if channel.rank == CONTROLLER:
                return Calling(deaths, detected_s)


def warm_up() -> None:
    """Import what a worker needs, so that taking over costs no more than what is its own."""
    for name in WARM_MODULES:
        importlib.import_module(name)


def await_farewell(channel: Channel, participant: Participant) -> None:
    """Wait for the end, as long as it takes; a spare is told meanwhile when there is something to prepare."""
    while not isinstance(message := channel.receive(CONTROLLER)[1], Farewell):
        assert isinstance(message, Rehearse), message
        channel.send(CONTROLLER, Ready(participant.rehearse()))


def say_farewell(channel: Channel) -> None:
    """Let everybody go."""
    for rank in channel.membership.present:
        if rank != CONTROLLER:
            channel.send(rank, Farewell())
