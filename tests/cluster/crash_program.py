"""Be a rank of `dejavu` that fails in its third step: HOW RANK NOTE arguments ...; the time goes into the file NOTE."""

import os
import signal
import sys
import time
from pathlib import Path

from dejavu.cli.main import main
from dejavu.engine.worker import Worker


def crash(how: str, rank: int, note: Path) -> None:
    """Let one rank fail."""
    step = Worker.step

    def failing_step(worker, work):
        if worker.channel.rank == rank and work.step == 2:
            note.write_text(str(time.monotonic()))
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("no such row")
        step(worker, work)

    Worker.step = failing_step  # type: ignore[method-assign]


def lose_file(rank: int, note: Path, file: Path) -> None:
    """Let the checkpoint's file vanish after the checks, before one rank reads it."""
    import dejavu.cluster.participant as participant

    make_stage = participant.make_stage  # type: ignore[attr-defined]

    def losing(site, *others):
        if site.channel.rank == rank:
            file.unlink()
            note.write_text(str(time.monotonic()))
        return make_stage(site, *others)

    participant.make_stage = losing  # type: ignore[attr-defined]


if __name__ == "__main__":
    how, rank, note, *arguments = sys.argv[1:]
    if how.startswith("lose="):
        lose_file(int(rank), Path(note), Path(how.removeprefix("lose=")))
    else:
        crash(how, int(rank), Path(note))
    sys.exit(main(arguments))
