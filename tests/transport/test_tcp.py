"""The TCP carrier against strangers and liars: they are refused, and the job goes on."""

import hashlib
import hmac
import logging
import socket
import struct
import threading
import time

import numpy as np
import pytest

from dejavu.device import make_pieces, open_device
from dejavu.errors import TransferError
from dejavu.transport import link
from dejavu.transport.carrier import Gathering, UnavailableError
from dejavu.transport.link import LinkCarrier
from dejavu.transport.notes import Kind, Note
from dejavu.transport.tcp import SocketWire, TcpCarrier
from dejavu.transport.tcp_handshake import HandshakeError, Identity, dial, new_secret, receive_exactly, welcome
from dejavu.transport.tcp_meeting import Doorman, call, own_address

LOCAL = "127.0.0.1"
RANK_1 = Identity(dialler=1, listener=0, stream=0)


# Meeting


@pytest.fixture
def secret():
    return new_secret()


@pytest.fixture
def doorman(secret):
    made = Doorman(LOCAL, 0, handshake_s=0.3)
    made.open(secret, [RANK_1])
    yield made
    made.close()


def connect(doorman):
    return socket.create_connection((LOCAL, doorman.port), 5)


def is_refused(connection):
    """Tell whether the other end hangs up without a further word."""
    connection.settimeout(5)
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


def expect_the_right_caller(doorman, secret):
    with call(LOCAL, doorman.port, secret, RANK_1, 5) as connection:
        (identity,) = doorman.wait(5)
        assert identity == RANK_1
        doorman.admitted[identity].sendall(b"hello")
        assert receive_exactly(connection, 5, time.monotonic() + 5) == b"hello"


class Recorder:
    """Pass a socket's calls on, and keep what goes either way."""

    def __init__(self, sock):
        self.sock, self.sent, self.received = sock, b"", b""

    def sendall(self, data):
        self.sent += data
        self.sock.sendall(data)

    def recv(self, nbytes):
        data = self.sock.recv(nbytes)
        self.received += data
        return data

    def __getattr__(self, name):
        return getattr(self.sock, name)


def test_a_caller_with_another_secret_is_refused(doorman, secret, caplog):
    with caplog.at_level(logging.WARNING), connect(doorman) as stranger, pytest.raises(HandshakeError):
        dial(stranger, new_secret(), RANK_1, 5)
    expect_the_right_caller(doorman, secret)
    assert "does not know this job's secret" in caplog.text


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(1 << 20)], ids=["nothing", "http", "zeros"])
def test_strangers_are_refused(doorman, secret, said, caplog):
    strangers = [connect(doorman) for _ in range(5)]
    for stranger in strangers:
        try:
            stranger.sendall(said)
        except OSError:
            assert len(said) > 1000  # refused before it had said everything
    started = time.monotonic()
    expect_the_right_caller(doorman, secret)
    assert time.monotonic() - started < 2, "strangers kept a rank waiting"
    for stranger in strangers:
        stranger.settimeout(5)
        end = time.monotonic() + 5
        greeting = b""
        while time.monotonic() < end:
            try:
                data = stranger.recv(1000)
            except ConnectionResetError:
                break
            greeting += data
            if not data:
                break
        assert len(greeting) <= 44, "a stranger was told more than the nonce"
        stranger.close()
    assert "refused a connection" in caplog.text


def test_a_replayed_handshake_is_refused(secret):
    first, second = (Doorman(LOCAL, 0, handshake_s=1) for _ in range(2))
    for doorman in (first, second):
        doorman.open(secret, [RANK_1])
    with connect(first) as connection:
        recorder = Recorder(connection)
        dial(recorder, secret, RANK_1, 5)
        assert first.wait(5)
    for part in (secret, hmac.digest(secret, b"", "sha256"), hashlib.sha256(secret).digest()):
        assert part not in recorder.sent + recorder.received
    with connect(second) as replayer:
        receive_exactly(replayer, 44, time.monotonic() + 5)
        replayer.sendall(recorder.sent)
        assert is_refused(replayer)
    expect_the_right_caller(second, secret)


def test_a_reflected_proof_is_refused(secret):
    """Send a listener its own proof back, as a caller that plays two connections against each other would."""
    ours, theirs = socket.socketpair()
    refused = []

    def listen():
        with pytest.raises(HandshakeError):
            welcome(theirs, secret, 0, 2)
        refused.append(True)

    listening = threading.Thread(target=listen)
    listening.start()
    hello = receive_exactly(ours, 44, time.monotonic() + 5)
    nonce = hello[-32:]
    proof = RANK_1.proof(secret, b"listener", nonce, nonce)  # what a listener would give away
    ours.sendall(struct.pack("<8sIIII32s32s", b"dejavuTC", 1, 1, 0, 0, nonce, proof))
    theirs.shutdown(socket.SHUT_WR)
    listening.join()
    assert refused
    assert is_refused(ours)


def test_only_who_is_expected_comes_in(secret, caplog):
    doorman = Doorman(LOCAL, 0)
    doorman.open(secret, [RANK_1, Identity(2, 0, 0)])
    with call(LOCAL, doorman.port, secret, RANK_1, 5):
        for identity in (RANK_1, Identity(3, 0, 0), Identity(1, 0, 1), Identity(1, 2, 0)):
            with connect(doorman) as again:
                try:
                    dial(again, secret, identity, 2)
                except HandshakeError:
                    continue
                assert is_refused(again)
        with call(LOCAL, doorman.port, secret, Identity(2, 0, 0), 5):
            assert len(doorman.wait(5)) == 2


def test_a_listener_without_the_secret_is_refused(secret):
    with Impostor() as port, pytest.raises(TransferError, match="does not know this job's secret"):
        call(LOCAL, port, secret, RANK_1, 0.2)


class Impostor:
    """Answer callers with noise of the right length."""

    def __enter__(self):
        self.server = socket.create_server((LOCAL, 0))
        threading.Thread(target=self.serve, daemon=True).start()
        return self.server.getsockname()[1]

    def serve(self):
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            connection.sendall(struct.pack("<8sI32s", b"dejavuTC", 1, bytes(32)))
            connection.recv(1000)
            connection.sendall(bytes(32))

    def __exit__(self, *_):
        self.server.close()


def test_a_missing_rank_is_named(secret):
    doorman = Doorman(LOCAL, 0)
    doorman.open(secret, [Identity(3, 0, 0)])
    with pytest.raises(TransferError, match=r"ranks \[3\] did not connect"):
        doorman.wait(0.1)


def test_an_interface_is_found():
    assert own_address(None, ["here", "here"], 0) == LOCAL
    assert own_address("lo", ["here", "there"], 0) == LOCAL
    assert own_address(LOCAL, ["here", "there"], 0) == LOCAL
    with pytest.raises(UnavailableError, match="no interface nowhere0"):
        own_address("nowhere0", ["here", "there"], 0)
    with pytest.raises(UnavailableError, match="cannot listen"):
        Doorman("192.0.2.1", 0)


# Three ranks in one process


class Exchange:
    """Give all ranks what each one gives."""

    def __init__(self, size):
        self.given = [b""] * size
        self.barrier = threading.Barrier(size)

    def of(self, rank):
        def exchange(data):
            self.given[rank] = data
            self.barrier.wait(10)
            everything = list(self.given)
            self.barrier.wait(10)
            return everything

        return exchange


def test_three_ranks_meet_and_listen_no_more(secret):
    exchange, carriers = Exchange(3), [None] * 3
    ports = []

    def join(rank):
        inner = exchange.of(rank)

        def watched(data):
            cards = inner(data)
            ports.extend(struct.unpack("<16sI32s", card)[1] for card in cards if len(card) == 52)
            return cards

        with_secret = [secret, secret, secret][rank]
        carriers[rank] = TcpCarrier(open_device("cpu"), rank, watched, secret=with_secret, num_streams=2)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for port in set(ports):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOCAL, port), 5)
    pieces = make_pieces([0], [0], [3000])
    device = carriers[0].device
    memory = [device.allocate(3000) for _ in range(3)]
    device.fill(memory[0], 7, stream=device.compute_stream)
    stream = device.compute_stream
    for sender, receiver in ((0, 1), (1, 2)):  # on from rank to rank
        received = carriers[receiver].receive(sender, 5, memory[receiver], pieces, stream=stream)
        carriers[sender].send(receiver, 5, memory[sender], pieces, stream=stream).wait(10)
        received.wait(10)
    assert (memory[2].tensor() == 7).all()
    for carrier in carriers:
        carrier.close()


# Frames: rank 0 with two peers, of which the test plays both


class Bare(LinkCarrier):
    name = "tcp"


class Ends:
    def __init__(self):
        self.device = open_device("cpu")
        pairs = {peer: socket.socketpair() for peer in (1, 2)}
        self.far = {peer: far for peer, (_, far) in pairs.items()}
        wire = SocketWire(0, 3, {peer: [near] for peer, (near, _) in pairs.items()})
        self.carrier = Bare(self.device, wire, Gathering.PACKED, chunk_bytes=1000, num_slots=4)
        self.memory = self.device.allocate(4096)
        self.device.fill(self.memory, 0xEE, stream=self.device.compute_stream)

    def receive(self, peer, key=1, nbytes=2500):
        pieces = make_pieces([100], [0], [nbytes])
        transfer = self.carrier.receive(peer, key, self.memory, pieces, stream=self.device.compute_stream)
        offer = self.next_note(peer)
        assert (offer.kind, offer.key, offer.nbytes) == (Kind.OFFER, key, nbytes)
        return transfer, offer.number

    def next_note(self, peer):
        from dejavu.transport.notes import NOTE_BYTES, unpack_note

        return unpack_note(receive_exactly(self.far[peer], NOTE_BYTES, time.monotonic() + 5))

    def say(self, peer, *notes, payload=b""):
        self.far[peer].sendall(b"".join(note.pack() for note in notes) + payload)

    def contents(self):
        return self.memory.tensor().numpy()

    def close(self):
        for far in self.far.values():
            far.close()
        self.carrier.close()


@pytest.fixture
def ends():
    made = Ends()
    yield made
    made.close()


@pytest.mark.parametrize("nbytes", [0, 1001, 2**63])
def test_chunks_longer_than_were_asked_for_are_refused(ends, nbytes):
    transfer, number = ends.receive(1)
    ends.say(1, Note(Kind.GO, number, nbytes=nbytes))
    with pytest.raises(TransferError, match="rank 1 is lost"):
        transfer.wait(5)


def chunk(number, index, nbytes):
    return Note(Kind.DATA, number, nbytes=nbytes, value=index)


LIES = {
    "longer than the chunk": lambda number: chunk(number, 0, 1001).pack() + bytes(1001),
    "of absurd length": lambda number: chunk(number, 0, 2**63).pack() + bytes(4096),
    "shorter than the chunk": lambda number: chunk(number, 0, 999).pack() + bytes(999),
    "behind the last chunk": lambda number: chunk(number, 3, 500).pack() + bytes(500),
    "of a message that nobody expects": lambda number: chunk(number + 1, 0, 1000).pack() + bytes(1000),
    "no note": lambda number: bytes(40),
    "of an unknown kind": lambda number: struct.pack("<IIQQQQ", 0x314A5644, 99, number, 0, 0, 0),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_ends_the_liars_connection_alone(ends, lie):
    transfer, number = ends.receive(1)
    other, other_number = ends.receive(2)
    ends.say(1, Note(Kind.GO, number, nbytes=1000), payload=LIES[lie](number))
    with pytest.raises(TransferError, match="rank 1 is lost"):
        transfer.wait(5)
    assert (ends.contents() == 0xEE).all(), "a byte was written before the check"
    for index, nbytes in enumerate((1000, 1000, 500)):
        ends.say(2, chunk(other_number, index, nbytes), payload=bytes([index]) * nbytes)
    ends.say(2, Note(Kind.GO, other_number, nbytes=1000))
    other.wait(5)
    expected = np.repeat(np.arange(3, dtype=np.uint8), (1000, 1000, 500))
    assert np.array_equal(ends.contents()[100:2600], expected)
    assert (ends.contents()[2600:] == 0xEE).all()


def test_a_chunk_that_comes_twice_is_refused(ends):
    transfer, number = ends.receive(1)
    ends.say(1, Note(Kind.GO, number, nbytes=1000))
    for _ in range(2):
        ends.say(1, chunk(number, 0, 1000), payload=bytes(1000))
    with pytest.raises(TransferError, match="twice"):
        transfer.wait(5)


def test_more_offers_than_allowed_are_refused(ends, monkeypatch):
    monkeypatch.setattr(link, "MAX_OFFERS", 10)
    transfer, _ = ends.receive(1)
    ends.say(1, *[Note(Kind.OFFER, i, key=i, nbytes=10, value=1000) for i in range(11)])
    with pytest.raises(TransferError, match="that nobody sends"):
        transfer.wait(5)


def test_a_connection_that_breaks_off_in_a_chunk_ends_the_message(ends):
    transfer, number = ends.receive(1)
    ends.say(1, Note(Kind.GO, number, nbytes=1000), chunk(number, 0, 1000), payload=bytes(300))
    ends.far[1].close()
    with pytest.raises(TransferError, match="rank 1 is lost"):
        transfer.wait(5)
    assert transfer.done


def test_a_rank_that_never_answers_a_cancel_is_given_up(ends, monkeypatch):
    monkeypatch.setattr(link, "WITHDRAW_S", 0.2)
    transfer, number = ends.receive(1)
    ends.say(1, Note(Kind.GO, number, nbytes=1000))
    transfer.cancel()
    with pytest.raises(TransferError, match="cancelled"):
        transfer.wait(5)
    assert ends.next_note(1).kind is Kind.CANCEL


def test_a_rank_that_has_closed_is_not_waited_for(ends):
    transfer, number = ends.receive(1)
    ends.say(1, Note(Kind.GO, number, nbytes=1000), Note(Kind.GOODBYE, 0))
    started = time.monotonic()
    transfer.cancel()
    with pytest.raises(TransferError, match="cancelled"):
        transfer.wait(5)
    assert time.monotonic() - started < link.WITHDRAW_S / 2


def test_an_idle_carrier_sleeps(ends):
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05
