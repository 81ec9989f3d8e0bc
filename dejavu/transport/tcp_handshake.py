"""The handshake of the TCP carrier: both ends of a connection prove that they know the job's secret.

Three messages of fixed size, so that a stranger can make neither side read more than it expects:

1. listener to dialler: magic, version, the listener's nonce;
2. dialler to listener: magic, version, both ranks, the number of the stream, the dialler's nonce, its proof;
3. listener to dialler: its proof.

A proof is HMAC-SHA256 under the secret over the role of who proves, both nonces, ranks and stream: it cannot be
computed without the secret, reflected to its maker, or replayed, since the other side's nonce is new each time. The
secret itself is never sent. What follows is neither encrypted nor signed: who can change packets between the hosts of a
job is not kept out.
"""

import hmac
import secrets
import socket
import struct
import time
from dataclasses import dataclass

from dejavu.errors import TransferError

VERSION = 1
SECRET_BYTES = NONCE_BYTES = 32
_MAGIC = b"dejavuTC"
_HELLO = struct.Struct(f"<8sI{NONCE_BYTES}s")
_ANSWER = struct.Struct(f"<8sIIII{NONCE_BYTES}s32s")
_PROOF = struct.Struct("<32s")


class HandshakeError(TransferError):
    """Report a connection that was refused; `reason` is for the log."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Say what a connection is: which rank dialled, which one listens, and which of their streams it is."""

    dialler: int
    listener: int
    stream: int

    def proof(self, secret: bytes, role: bytes, hello: bytes, answer_nonce: bytes) -> bytes:
        """Give the proof of one side; `role` is b"dialler" or b"listener"."""
        ranks = struct.pack("<IIII", VERSION, self.dialler, self.listener, self.stream)
        return hmac.digest(secret, b"dejavu tcp " + role + b"\0" + hello + answer_nonce + ranks, "sha256")


def new_secret() -> bytes:
    """Make the secret of a job."""
    return secrets.token_bytes(SECRET_BYTES)


def dial(connection: socket.socket, secret: bytes, identity: Identity, timeout_s: float) -> None:
    """Prove who dials and check who listens; HandshakeError if it is somebody else."""
    end_s = time.monotonic() + timeout_s
    hello = receive_exactly(connection, _HELLO.size, end_s)
    magic, version, listener_nonce = _HELLO.unpack(hello)
    _check_version(magic, version)
    nonce = secrets.token_bytes(NONCE_BYTES)
    proof = identity.proof(secret, b"dialler", listener_nonce, nonce)
    fields = identity.dialler, identity.listener, identity.stream
    connection.sendall(_ANSWER.pack(_MAGIC, VERSION, *fields, nonce, proof))
    (theirs,) = _PROOF.unpack(receive_exactly(connection, _PROOF.size, end_s))
    if not hmac.compare_digest(theirs, identity.proof(secret, b"listener", listener_nonce, nonce)):
        raise HandshakeError("the listener does not know this job's secret: something else has taken its port")


def welcome(connection: socket.socket, secret: bytes, rank: int, timeout_s: float) -> Identity:
    """Check who dialled and prove who listens; HandshakeError, and no proof of ours, if it is none of this job."""
    end_s = time.monotonic() + timeout_s
    nonce = secrets.token_bytes(NONCE_BYTES)
    connection.settimeout(timeout_s)
    connection.sendall(_HELLO.pack(_MAGIC, VERSION, nonce))
    answer = receive_exactly(connection, _ANSWER.size, end_s)
    magic, version, dialler, listener, stream, dialler_nonce, proof = _ANSWER.unpack(answer)
    _check_version(magic, version)
    identity = Identity(dialler, listener, stream)
    if not hmac.compare_digest(proof, identity.proof(secret, b"dialler", nonce, dialler_nonce)):
        raise HandshakeError("the caller does not know this job's secret")
    if listener != rank:
        raise HandshakeError(f"the caller wants rank {listener}, this is rank {rank}")
    connection.sendall(_PROOF.pack(identity.proof(secret, b"listener", nonce, dialler_nonce)))
    return identity


def receive_exactly(connection: socket.socket, nbytes: int, end_s: float) -> bytes:
    """Read `nbytes` before the time `end_s`; HandshakeError if they do not come."""
    received = bytearray()
    while len(received) < nbytes:
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            raise HandshakeError(f"only {len(received)} of {nbytes} handshake bytes came in time")
        connection.settimeout(left_s)
        try:
            data = connection.recv(nbytes - len(received))
        except OSError as error:
            raise HandshakeError(f"the handshake broke off ({error})") from error
        if not data:
            raise HandshakeError(f"the caller hung up after {len(received)} of {nbytes} handshake bytes")
        received += data
    return bytes(received)


def _check_version(magic: bytes, version: int) -> None:
    if magic != _MAGIC:
        raise HandshakeError("the other end speaks another protocol")
    if version != VERSION:
        raise HandshakeError(f"the other end speaks version {version}, this one {VERSION}: install the same everywhere")
