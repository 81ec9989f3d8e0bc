"""How the ranks of the TCP carrier find and connect to each other: one listener per rank, which knows who may call."""

import fcntl
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterable

from dejavu.errors import TransferError
from dejavu.transport.carrier import UnavailableError
from dejavu.transport.tcp_handshake import HandshakeError, Identity, dial, welcome

HANDSHAKE_S = 5.0
MAX_STRANGERS = 64  # callers that have not proved anything yet
RETRY_S = 0.05
_SIOCGIFADDR = 0x8915

log = logging.getLogger(__name__)


class Doorman:
    """Listen for the ranks that are expected to call, and turn everybody else away, logged.

    Each caller has a few seconds and a thread of its own, so that one that says nothing keeps nobody waiting. The
    listening socket is closed when everybody has come.
    """

    def __init__(self, address: str, rank: int, secret: bytes | None = None, handshake_s: float = HANDSHAKE_S) -> None:
        self.rank = rank
        self.secret = secret
        self.admitted: dict[Identity, socket.socket] = {}
        self._handshake_s = handshake_s
        self._expected: set[Identity] = set()
        self._lock = threading.Lock()
        self._all_came = threading.Event()
        self._places = threading.Semaphore(MAX_STRANGERS)
        self._socket = listen(address)
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="tcp-doorman", daemon=True)

    def open(self, secret: bytes, expected: Iterable[Identity]) -> None:
        """Begin to answer callers."""
        self.secret = secret
        self._expected = set(expected)
        if not self._expected:
            self._all_came.set()
        self._thread.start()

    def wait(self, deadline_s: float) -> dict[Identity, socket.socket]:
        """Give the connections of everybody expected; TransferError if somebody does not come. Listens no more."""
        have_come = self._all_came.wait(deadline_s)
        self.close()
        if not have_come:
            missing = sorted({identity.dialler for identity in self._expected - set(self.admitted)})
            for connection in self.admitted.values():
                connection.close()
            raise TransferError(
                f"ranks {missing} did not connect to port {self.port} of rank {self.rank} within {deadline_s} s: "
                "check that no firewall is between the hosts, and the interface"
            )
        return self.admitted

    def close(self) -> None:
        """Listen no more."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        except OSError:
            return  # closed already
        finally:
            if self._thread.ident is not None:
                self._thread.join()
            self._socket.close()

    def _accept(self) -> None:
        while True:
            self._places.acquire()
            try:
                connection, address = self._socket.accept()
            except OSError:
                return  # the listener was shut down
            threading.Thread(target=self._answer, args=(connection, address), name="tcp-caller", daemon=True).start()

    def _answer(self, connection: socket.socket, address: object) -> None:
        assert self.secret is not None
        try:
            self._admit(welcome(connection, self.secret, self.rank, self._handshake_s), connection)
        except (TransferError, OSError) as error:
            log.warning("refused a connection from %s: %s", address, error)
            connection.close()
        finally:
            self._places.release()

    def _admit(self, identity: Identity, connection: socket.socket) -> None:
        with self._lock:
            if identity not in self._expected or identity in self.admitted or self._all_came.is_set():
                raise HandshakeError(f"rank {identity.dialler} is not expected, or has called before")
            self.admitted[identity] = connection
            if len(self.admitted) == len(self._expected):
                self._all_came.set()


def listen(address: str) -> socket.socket:
    """Listen on a free port of an address of this host."""
    try:
        return socket.create_server((address, 0), backlog=128)
    except OSError as error:
        raise UnavailableError(
            f"cannot listen on {address} ({error.strerror}): name an interface of this host in DEJAVU_TCP_INTERFACE"
        ) from error


def call(address: str, port: int, secret: bytes, identity: Identity, deadline_s: float) -> socket.socket:
    """Connect to a listener and prove who calls; tries again while it is not reached. TransferError at the deadline."""
    end_s = time.monotonic() + deadline_s
    while True:
        try:
            return _call_once(address, port, secret, identity, min(HANDSHAKE_S, max(0.1, end_s - time.monotonic())))
        except (OSError, HandshakeError) as error:
            if time.monotonic() + RETRY_S > end_s:
                raise TransferError(
                    f"cannot connect to rank {identity.listener} at {address}:{port} ({error}): "
                    "check that no firewall is between the hosts, and the interface"
                ) from error
        time.sleep(RETRY_S)


def _call_once(address: str, port: int, secret: bytes, identity: Identity, timeout_s: float) -> socket.socket:
    connection = socket.create_connection((address, port), timeout_s)
    try:
        dial(connection, secret, identity, timeout_s)
    except BaseException:
        connection.close()
        raise
    return connection


def own_address(interface: str | None, hosts: list[str], rank: int) -> str:
    """Give the address that other ranks reach this one at: of `interface` (a name or an address), or of the route to
    them; the loopback address where all ranks are on one host.
    """
    if interface:
        return _address_of(interface)
    others = [host for host in hosts if host != hosts[rank]]
    if not others:
        return "127.0.0.1"
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((others[0], 9))  # sends nothing, chooses the route
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UnavailableError(
            f"no route to {others[0]} ({error}): name the interface or address that leads to it in DEJAVU_TCP_INTERFACE"
        ) from error


def _address_of(interface: str) -> str:
    try:
        return socket.inet_ntoa(socket.inet_aton(interface))
    except OSError:
        return _address_of_name(interface)


def _address_of_name(interface: str) -> str:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
    except OSError as error:
        raise UnavailableError(
            f"this host has no interface {interface} with an IPv4 address ({error.strerror})"
        ) from error
