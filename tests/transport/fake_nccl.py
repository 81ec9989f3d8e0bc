"""NCCL's rules over MPI, for the CPU: sends and receives match by their order alone, and first calls take a while."""

import time

from mpi4py import MPI

from dejavu.transport.mpi_wire import bytes_of
from dejavu.transport.nccl import ID_BYTES, NcclCarrier, NcclWire
from dejavu.transport.parcels import Loan

FAKE_TAG = 5
OPENING_S = 0.02


class FakeEvent:
    def __init__(self, request):
        self.request = request

    def query(self):
        try:
            return self.request.Test()
        except MPI.Exception:
            return False  # as a kernel that waits for a dead peer

    def close(self):
        pass


class FakePath:
    def __init__(self, comm, peer):
        self.comm, self.peer = comm, peer
        self.opened = time.monotonic() + OPENING_S

    def is_open(self):
        return time.monotonic() > self.opened

    def send(self, buffer):
        return FakeEvent(self.comm.Isend(bytes_of(Loan(0, buffer).array), self.peer, FAKE_TAG))

    def receive(self, buffer):
        return FakeEvent(self.comm.Irecv(bytes_of(Loan(0, buffer).array), self.peer, FAKE_TAG))

    def abort(self):
        pass

    def destroy(self):
        pass


class FakeWire(NcclWire):
    def new_id(self):
        return bytes(ID_BYTES)

    def open_path(self, peer, side, unique_id):
        return FakePath(self.comm, peer)


class FakeNcclCarrier(NcclCarrier):
    def make_wire(self, device, comm):
        return FakeWire(device, comm)
