"""Give a host's keeper what has to outlive a process, and take it back in another one."""

import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dejavu.device.base import Buffer, Closing, Device, DeviceError, Location
from dejavu.device.handles import close_all
from dejavu.device.keeper_line import Guardian, call, keeper_directory, start_keeper
from dejavu.errors import PeerLostError

JOIN_TRIES, JOIN_PAUSE_S = 5, 0.05


@dataclass(frozen=True, slots=True)
class Deposit:
    """Describe what the keeper holds under a name."""

    nbytes: int
    about: dict[str, Any]


class Vault(Closing):
    """Keep memory of one job with this host's keeper. Any process of the job and the user can map it, at any time.

    Names are paths: `OWNER/WHAT`. Nothing here is called in a step.
    """

    def __init__(self, job: str, guardian: Guardian) -> None:
        """Join the keeper of a job, an unguessable name; start it where there is none yet."""
        self.directory = keeper_directory(job)
        self._is_open = True
        self._join(guardian)

    def put(self, name: str, memory: Buffer, about: dict[str, Any] | None = None) -> str:
        """Keep all of an exportable memory, in place of what had that name; `about` is plain JSON.

        The keeper also has of it where it lies, on which device, and a `mark` that no other memory has: the result.
        """
        assert memory.nbytes == memory.memory.nbytes, "a view is no memory of its own"
        where = {"location": memory.location.value, "kind": memory.device.properties.kind}
        facts = {**where, "index": memory.device.properties.index, "mark": secrets.token_hex(8), **(about or {})}
        fd = memory.export_fd()
        try:
            self._call({"do": "put", "name": name, "nbytes": memory.nbytes, "about": facts}, (fd,))
        finally:
            os.close(fd)
        return str(facts["mark"])

    def get(self, name: str, device: Device) -> tuple[Buffer, dict[str, Any]] | None:
        """Map what is kept under a name for `device`, and give what was said of it; None if there is nothing.

        Device memory is mapped from whichever device it lies on. The caller owns the buffer, and its close unmaps it.
        """
        answer, fds = self._call({"do": "get", "name": name})
        try:
            if not fds:
                return None
            about = answer["about"]
            if about["location"] == Location.HOST:
                return device.import_host_fd(fds[0], answer["nbytes"]), about
            if about["kind"] != device.properties.kind:
                raise DeviceError(f"{name} is memory of a {about['kind']} device, which {device} cannot map")
            return device.import_fd(fds[0], answer["nbytes"]), about
        finally:
            close_all(fds)

    def contents(self) -> dict[str, Deposit]:
        """Say what is kept, by name."""
        kept = self._call({"do": "list"})[0]["kept"]
        return {name: Deposit(entry["nbytes"], entry["about"]) for name, entry in kept.items()}

    def drop(self, prefix: str) -> list[str]:
        """Let go of all whose names begin so, an owner's for example; give them. Mappings stay valid."""
        names: list[str] = self._call({"do": "drop", "prefix": prefix})[0]["names"]
        return names

    def close(self) -> None:
        """Leave in good order; the keeper ends with the last who leaves. A process that dies does not leave."""
        if self._is_open:
            self._is_open = False
            with suppress(PeerLostError):  # it has ended before
                self._call({"do": "leave"})

    def _join(self, guardian: Guardian) -> None:
        """Join a keeper that answers: it may end meanwhile, where the last member of an engine before this leaves."""
        for tries_left in reversed(range(JOIN_TRIES)):
            try:
                start_keeper(self.directory, guardian)
                self._call({"do": "join", "process": guardian.process, "grace_s": guardian.grace_s})
            except (PeerLostError, FileNotFoundError):
                if not tries_left:
                    raise
                time.sleep(JOIN_PAUSE_S)
            else:
                return

    def _call(self, request: dict[str, Any], fds: tuple[int, ...] = ()) -> tuple[dict[str, Any], list[int]]:
        return call(self.directory, request, fds)
