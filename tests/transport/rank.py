"""One rank of a link under test: `python -m tests.transport.rank NAME KIND SOCKET DIRECTORY [RANK]`.

It runs the cases that the test's process names, and answers each with None or a traceback.
"""

import os
import sys
import traceback
from multiprocessing.connection import Client
from pathlib import Path

from dejavu.device import num_cuda_devices, open_device
from dejavu.transport.carrier import Gathering
from tests.transport import conformance
from tests.transport.carriers import CARRIERS, Setting


def main(name, kind, socket, directory, index=None):
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"] if index is None else index)
    line = Client(socket)
    line.send(("rank", rank))

    def exchange(data):
        line.send(("exchange", data))
        return line.recv()

    gpus = num_cuda_devices() if kind == "cuda" else 1
    with open_device(kind, rank % gpus) as device:
        carriers = {}
        for gathering in Gathering:
            private = Path(directory, f"{gathering}-{rank}")
            private.mkdir(mode=0o700)
            carriers[gathering] = CARRIERS[name].make(Setting(device, gathering, rank, 2, private, exchange))
        serve(line, conformance.Rank(device, carriers, rank, lambda: exchange(b"")))
        for carrier in carriers.values():
            carrier.close()
    line.send(("end", None))
    line.close()
    if "mpi4py.MPI" in sys.modules:
        os._exit(0)  # MPI_Finalize can wait for a dead rank for ever


def serve(line, rank):
    line.send(("ready", None))
    while (case := line.recv()) is not None:
        line.send(("result", run(case, rank)))


def run(case, rank):
    try:
        getattr(conformance, case)(rank)
    except BaseException:
        return traceback.format_exc()
    finally:
        rank.close()
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
