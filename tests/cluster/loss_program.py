"""Be a rank of `dejavu` that is killed once, in a step: RANK STEP LOSES NOTE arguments ...

LOSES is "process", or "memory": the keeper then drops the rank's memory too, as where its device is lost. The file NOTE
says that it has happened.
"""

import os
import signal
import sys
from pathlib import Path

from dejavu.cli.main import main
from dejavu.cluster.participant import Participant
from dejavu.engine.ring import place_name
from dejavu.engine.worker import Worker


def lose(rank: int, number: int, loses: str, note: Path) -> None:
    """Let one rank die in a step."""
    joined = []
    join_keeper, step = Participant.join_keeper, Worker.step

    def join_noted(participant):
        joined.append(participant)
        return join_keeper(participant)

    def dying_step(worker, work):
        if worker.channel.rank == rank and work.step == number and work.microbatch == 0 and not note.exists():
            note.write_text(str(os.getpid()))
            if loses == "memory":
                topology = joined[-1].setup.topology
                assert joined[-1].vault.drop(f"{place_name(topology.placements[rank])}/")
            os.kill(os.getpid(), signal.SIGKILL)
        step(worker, work)

    Participant.join_keeper = join_noted  # type: ignore[method-assign]
    Worker.step = dying_step  # type: ignore[method-assign]


if __name__ == "__main__":
    rank, number, loses, note, *arguments = sys.argv[1:]
    lose(int(rank), int(number), loses, Path(note))
    sys.exit(main(arguments))
