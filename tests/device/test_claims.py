"""A directory that several processes claim stays while one of them lives, and no longer."""

import os
import subprocess
import sys

import pytest

from dejavu.device.claims import claim, clear_unclaimed
from dejavu.errors import DeviceError

CLAIMER = """
import sys
from pathlib import Path
from dejavu.device.claims import claim
claim(Path(sys.argv[1]))
print("claimed", flush=True)
sys.stdin.read()
"""


def test_directory_goes_with_the_last_claim_however_that_ends(tmp_path):
    directory = tmp_path / "files"
    fd = claim(directory)
    (directory / "segment").write_text("x")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", CLAIMER, str(directory)], text=True, **pipes)
    assert other.stdout.readline() == "claimed\n"
    assert not clear_unclaimed(directory)
    os.close(fd)
    assert not clear_unclaimed(directory, 0.1)
    assert (directory / "segment").exists()
    other.kill()
    other.communicate()
    assert clear_unclaimed(directory)
    assert not directory.exists()
    assert clear_unclaimed(directory), "it is gone"


def test_directory_of_another_user_is_refused(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(DeviceError, match="is open to other users"):
        claim(tmp_path / "open")
