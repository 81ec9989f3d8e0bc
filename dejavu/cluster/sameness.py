"""See that all hosts run the same program on the same model, before weights are loaded: other ones fail in odd ways."""

import platform
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import dejavu
from dejavu.errors import ModelError, UsageError
from dejavu.measure.environment import host_name
from dejavu.model.fingerprint import fingerprint
from dejavu.topology import CONTROLLER
from dejavu.transport.mpi import Channel

Account = tuple[str, str, str]  # of a rank: its host, its program, the fingerprint of its model


def describe_program() -> str:
    """Name this program by its version and its sources, and Python by its version."""
    root = Path(dejavu.__file__).parent
    digest = blake2b(digest_size=4)
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return f"dejavu {dejavu.__version__} (sources {digest.hexdigest()}) under Python {platform.python_version()}"


def account(directory: str) -> Account:
    """Say what this rank runs, and which model it has in `directory`; none is asked for where that is empty."""
    return host_name(), describe_program(), fingerprint(Path(directory)) if directory else ""


def check_hosts(channel: Channel, directory: Path | None) -> None:
    """Ask a rank of every other host what it runs; UsageError unless that is what this one does."""
    far = sorted(set(channel.membership.present) - channel.near - {channel.rank})
    if not far:
        return
    asked = str(directory or "")
    for rank in far:
        channel.send(rank, asked)
    compare(account(asked), [channel.receive(rank, channel.deadline_s)[1] for rank in far], asked)


def answer(channel: Channel) -> object:
    """Be a rank that may be asked; give the first message of the controller that is no question, None for the end."""
    _, message = channel.receive(CONTROLLER)
    if message is None or CONTROLLER in channel.near:
        return message
    channel.send(CONTROLLER, account(message))
    return channel.receive(CONTROLLER)[1]


def compare(mine: Account, others: Sequence[Account], directory: str) -> None:
    """Raise UsageError where another host has another program, or not the same model."""
    here, program, model = mine
    for host, other_program, other_model in others:
        if other_program != program:
            raise UsageError(f"{here} runs {program}, but {host} runs {other_program}: install the same on every host")
        if not other_model and model:
            raise ModelError(f"{host} has no model in {directory}: put it at the same path on every host")
        if other_model != model:
            raise ModelError(f"the model in {directory} is another one on {host} than on {here}: copy it there again")
