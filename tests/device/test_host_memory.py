"""How much memory there is, by the files of the kernel."""

import pytest

from dejavu.device.host_memory import available_bytes, meminfo


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("own", ["0::/a/b\n", "0::/\n", "0::/not/seen\n", ""])
def test_no_limit_leaves_what_the_host_has(tmp_path, own):
    write(tmp_path / "own", own)
    write(tmp_path / "root/a/b/memory.max", "max\n")
    assert available_bytes(tmp_path / "root", tmp_path / "own") == pytest.approx(meminfo("MemAvailable"), rel=0.2)


def test_tightest_group_decides(tmp_path):
    write(tmp_path / "own", "0::/a/b\n")
    for group, most, taken, files in (("a/b", 9000, 1000, 0), ("a", 7000, 3000, 500)):
        write(tmp_path / "root" / group / "memory.max", f"{most}\n")
        write(tmp_path / "root" / group / "memory.current", f"{taken}\n")
        write(tmp_path / "root" / group / "memory.stat", f"anon 5\ninactive_file {files}\n")
    assert available_bytes(tmp_path / "root", tmp_path / "own") == 4500


def test_version_1_of_control_groups(tmp_path):
    write(tmp_path / "own", "5:cpu:/x\n4:memory:/y\n")
    write(tmp_path / "root/memory/y/memory.limit_in_bytes", "10000\n")
    write(tmp_path / "root/memory/y/memory.usage_in_bytes", "4000\n")
    write(tmp_path / "root/memory/y/memory.stat", "total_inactive_file 1000\n")
    write(tmp_path / "root/cpu/x/memory.max", "1\n")
    assert available_bytes(tmp_path / "root", tmp_path / "own") == 7000
