"""Start MPI for the tests that run under mpirun, and in no other process: MPI is imported in the fixture only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

from dejavu.cluster.process import importing

if TYPE_CHECKING:
    from tests.mpi.reference import Reference
    from tests.mpi.world import World

with importing():
    import torch  # noqa: F401


@pytest.fixture(scope="session")
def world() -> World:
    """Give COMM_WORLD with what the tests do on it."""
    from tests.mpi.world import World

    return World()


@pytest.fixture(scope="session")
def shared_path(world: World) -> Iterator[Path]:
    """Give one directory that all ranks see."""
    directory = TemporaryDirectory(prefix="dejavu-test-") if world.rank == 0 else None
    yield Path(world.gather(directory and directory.name)[0])
    world.gather(None)
    if directory:
        directory.cleanup()


@pytest.fixture(scope="session")
def reference_of(world: World, shared_path: Path) -> Callable[[str], Reference]:
    """Give what transformers says of a kind of model; rank 0 asks it, once a kind."""
    from tests.mpi.reference import make_reference

    made: dict[str, Reference] = {}

    def get(kind: str) -> Reference:
        if kind not in made:
            path = shared_path / kind
            found = world.together(lambda: make_reference(kind, path) if world.rank == 0 else None)[0]
            assert found
            made[kind] = found
        return made[kind]

    return get
