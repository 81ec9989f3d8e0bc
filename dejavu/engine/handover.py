"""The KV of finished prompts on its way from the prompt pipeline to the token pipeline, on either side's ranks."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from dejavu.device.base import Stream
from dejavu.engine.messages import Admission, Expect, Moved, Report, Resend, Work
from dejavu.kv.plan import Resharding
from dejavu.kv.pool import KVPool
from dejavu.kv.side import Selection
from dejavu.kv.stream import LayerStreamer, Level, stream_in, stream_out
from dejavu.measure.records import TransferRecord
from dejavu.topology import CONTROLLER
from dejavu.transport.carrier import Carrier, Transfer
from dejavu.transport.mpi import Channel

LOOK_EVERY_S = 0.5e-3  # while something is on its way
KIND = "handover"  # in the records
PEERS_FROM = 1  # the world rank of the carrier's rank 0: the controller has no part in it

LayerDone = Callable[[int], None]
RunTime = Callable[[float], float]


class Mover(Protocol):
    """Move KV beside the passes: to another pipeline, another rank's memory, or the host's."""

    takes: tuple[type, ...]  # the kinds of message that are meant for it

    def begin(self, work: Work) -> LayerDone | None:
        """Prepare for a pass; give what has to be called after each layer, with the model's number."""

    def end(self, work: Work) -> None:
        """Take note that the pass is queued behind `begin`: its K and V can be streamed in stream order."""

    def take(self, message: object) -> None:
        """Take a message that another rank sent to this rank's mover."""

    def look(self) -> float:
        """See what has moved and tell the controller; give the seconds after which to look again, or infinity."""

    def take_transfers(self, rank: int, run_time: RunTime) -> list[TransferRecord]:
        """Give what `rank` has recorded since the last call; `run_time` turns monotonic moments into the run's."""

    def report(self, report: Report, rank: int, run_time: RunTime) -> Report:
        """Finish, and add what was recorded since."""


class NoMover:
    """Move nothing, as the ranks of a colocated pipeline do."""

    takes: tuple[type, ...] = ()

    def begin(self, work: Work) -> LayerDone | None:
        """Stream nothing."""
        return None

    def end(self, work: Work) -> None:
        """Stream nothing."""

    def take(self, message: object) -> None:
        """Never happen: only ranks that move KV are told."""
        raise AssertionError(f"unexpected message {message!r}")

    def look(self) -> float:
        """See that there is nothing."""
        return float("inf")

    def take_transfers(self, rank: int, run_time: RunTime) -> list[TransferRecord]:
        """Have none."""
        return []

    def report(self, report: Report, rank: int, run_time: RunTime) -> Report:
        """Have nothing to add."""
        return report


class Listener(NoMover):
    """Call a function when a pass or a prompt's KV comes: the controller then knows what this rank said it has."""

    takes: tuple[type, ...] = (Expect, Resend)

    def __init__(self, heard: Callable[[], None]) -> None:
        self.heard = heard

    def begin(self, work: Work) -> LayerDone | None:
        """Take note of a pass."""
        self.heard()
        return None

    def take(self, message: object) -> None:
        """Take note of a prompt that comes, or is to be sent again."""
        self.heard()


class Movers:
    """Let several movers work beside each other; a message goes to those that take its kind."""

    takes: tuple[type, ...] = ()

    def __init__(self, movers: Sequence[Mover]) -> None:
        self.movers = movers

    def begin(self, work: Work) -> LayerDone | None:
        """Let each prepare, in order; after a layer call all that want to know."""
        callbacks = [callback for mover in self.movers if (callback := mover.begin(work))]

        def layer_done(layer: int) -> None:
            for callback in callbacks:
                callback(layer)

        return layer_done if callbacks else None

    def end(self, work: Work) -> None:
        """Let each take note, in order."""
        for mover in self.movers:
            mover.end(work)

    def take(self, message: object) -> None:
        """Hand a message on."""
        takers = [mover for mover in self.movers if isinstance(message, mover.takes)]
        assert takers, f"unexpected message {message!r}"
        for mover in takers:
            mover.take(message)

    def look(self) -> float:
        """Let each look; give the soonest time to look again."""
        return min(mover.look() for mover in self.movers)

    def take_transfers(self, rank: int, run_time: RunTime) -> list[TransferRecord]:
        """Give those of each."""
        return [transfer for mover in self.movers for transfer in mover.take_transfers(rank, run_time)]

    def report(self, report: Report, rank: int, run_time: RunTime) -> Report:
        """Let each add its records."""
        for mover in self.movers:
            report = mover.report(report, rank, run_time)
        return report


class SyntheticMover(NoMover):
    """Report that KV has moved which a synthetic stage never made."""

    takes: tuple[type, ...] = (Expect, Resend)

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.moved: list[int] = []

    def begin(self, work: Work) -> LayerDone | None:
        """Take the pass's prompts as sent; they are reported when the pass is through."""
        self.moved += [admission.serial for admission in work.admissions if admission.handover]
        return None

    def take(self, message: object) -> None:
        """Take the prompt as received, or sent again."""
        assert isinstance(message, Expect | Resend), message
        self.channel.send(CONTROLLER, Moved(message.serial))

    def look(self) -> float:
        """Report the prompts of the last pass."""
        for serial in self.moved:
            self.channel.send(CONTROLLER, Moved(serial))
        self.moved = []
        return float("inf")


class Leaving(NamedTuple):
    """Hold what of a prompt each rank of the carrier gets, and when its first layer was computed."""

    peer_bytes: Mapping[int, int]
    start_s: float


class PoolMover(NoMover):
    """Move prompts' KV in or out of one rank's pool, and tell the controller of each that has moved.

    The pool's rows are slots: one for each prompt on its way.
    """

    def __init__(
        self, channel: Channel, carrier: Carrier, pool: KVPool, resharding: Resharding, level: Level, stream: Stream
    ) -> None:
        """Order the transfers behind the work of `stream`; `resharding` says which ranks share what."""
        self.channel = channel
        self.carrier = carrier
        self.pool = pool
        self.resharding = resharding
        self.level = level
        self.stream = stream
        self.transfers: dict[int, Transfer] = {}  # by the request's serial
        self.leaving: dict[int, Leaving] = {}  # by the request's serial, from the first layer on, on a prompt rank
        self.left: list[tuple[Leaving, float]] = []  # and when the last layer was there

    def admit(self, serial: int, blocks: Sequence[int]) -> None:
        """Let a free slot hold a prompt."""
        taken = {row for _, row in self.pool.places.values()}
        slot = next(row for row in range(self.pool.rows.num_rows) if row not in taken)
        self.pool.admit(serial, 0, slot, blocks)

    def look(self) -> float:
        """Free and report what has moved; raise the error of a transfer that failed."""
        for serial in [serial for serial, transfer in self.transfers.items() if transfer.done]:
            if error := self.transfers.pop(serial).error:
                raise error
            self.pool.release(serial)
            self.channel.send(CONTROLLER, Moved(serial))
            self.concluded(serial)
        return LOOK_EVERY_S if self.transfers else float("inf")

    def concluded(self, serial: int) -> None:
        """Take note that a prompt has moved."""


class PromptMover(PoolMover):
    """Send the KV of each prompt from a prompt rank to the token ranks that own its layers and heads."""

    takes: tuple[type, ...] = (Resend,)

    def take(self, message: object) -> None:
        """Send a prompt again that was computed before a failure."""
        assert isinstance(message, Resend), message
        serial = message.serial
        self.admit(serial, message.blocks)
        self.transfers[serial] = stream_out(
            self.carrier,
            self.pool,
            self.resharding,
            whole_prompt(serial, message.num_tokens),
            transfer=serial,
            stream=self.stream,
            level=self.level,
        )

    def begin(self, work: Work) -> LayerDone | None:
        """Make a streamer for each prompt of the pass that goes on elsewhere."""
        streamers = {a.serial: self.make_streamer(a) for a in work.admissions if a.handover}

        def layer_done(layer: int) -> None:
            for serial, streamer in streamers.items():
                if serial not in self.leaving:
                    self.leaving[serial] = Leaving(streamer.peer_bytes, time.monotonic())
                streamer.layer_done(layer)

        return layer_done if streamers else None

    def concluded(self, serial: int) -> None:
        """Note how long it took from the first layer on."""
        if leaving := self.leaving.pop(serial, None):
            self.left.append((leaving, time.monotonic()))

    def report(self, report: Report, rank: int, run_time: RunTime) -> Report:
        """Add the records of what has moved since they were taken."""
        return replace(report, transfers=report.transfers + self.take_transfers(rank, run_time))

    def take_transfers(self, rank: int, run_time: RunTime) -> list[TransferRecord]:
        """Give a record for each prompt and token rank."""
        left, self.left = self.left, []
        name = self.carrier.name
        return [
            TransferRecord(rank, KIND, name, rank, peer + PEERS_FROM, n, run_time(leaving.start_s), run_time(end_s))
            for leaving, end_s in left
            for peer, n in leaving.peer_bytes.items()
        ]

    def make_streamer(self, admission: Admission) -> LayerStreamer:
        """Prepare to send one prompt's layers."""
        serial, num_tokens = admission.serial, len(admission.request.prompt_token_ids)
        self.admit(serial, admission.blocks)
        streamer = LayerStreamer(
            self.carrier,
            self.pool,
            self.resharding,
            whole_prompt(serial, num_tokens),
            transfer=serial,
            stream=self.stream,
            level=self.level,
        )
        self.transfers[serial] = streamer.handle
        return streamer


class TokenMover(PoolMover):
    """Receive the KV of each prompt on a token rank."""

    takes: tuple[type, ...] = (Expect,)

    def take(self, message: object) -> None:
        """Post the receives of one prompt."""
        assert isinstance(message, Expect), message
        self.admit(message.serial, message.blocks)
        self.transfers[message.serial] = stream_in(
            self.carrier,
            self.pool,
            self.resharding,
            whole_prompt(message.serial, message.num_tokens),
            transfer=message.serial,
            stream=self.stream,
            level=self.level,
        )


def whole_prompt(serial: int, num_tokens: int) -> Selection:
    """Select all tokens of a prompt, in all layers."""
    return Selection.of({serial: (0, num_tokens)})
