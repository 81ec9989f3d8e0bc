"""What a directory of KV can be, and what is said of it."""

from contextlib import closing
from types import SimpleNamespace

import pytest

from dejavu.cluster.launcher import RESUME
from dejavu.cluster.stores import open_store, remove_store, store_path
from dejavu.errors import CapacityError
from dejavu.kv.disk import KvFile
from dejavu.kv.layout import PoolLayout
from dejavu.topology import Role

LAYOUT = PoolLayout(4, 3, 2, 4, 1, 2, 3, 4)
PLACE = SimpleNamespace(role=Role.TOKEN, pipeline=0, stage=1, shard=SimpleNamespace(tp_rank=0))


def make_setup(directory, run_id="run", model_mark="model"):
    config = SimpleNamespace(kv_disk=directory and str(directory))
    return SimpleNamespace(config=config, run_id=run_id, model_mark=model_mark, dtype="float32")


def make(directory, **changes):
    file = open_store(make_setup(directory, **changes), PLACE, LAYOUT, is_later=False)
    file.close()
    return file.path


def find(setup, layout=LAYOUT):
    """Open a file as a run that was lost before does; give its key."""
    with closing(open_store(setup, PLACE, layout, is_later=True)) as file:
        return file.key


@pytest.fixture
def key(tmp_path):
    make(tmp_path / "kv")
    return find(make_setup(tmp_path / "kv"))


def test_a_run_finds_its_own_file_again_and_removes_it(tmp_path, key, monkeypatch, capfd):
    setup = make_setup(tmp_path / "kv")
    assert find(setup) == key
    monkeypatch.setenv(RESUME, "1")
    with closing(open_store(setup, PLACE, LAYOUT, is_later=False)) as file:
        assert file.key == key
    assert capfd.readouterr().err == ""
    make(tmp_path / "kv", run_id="other")
    remove_store(setup, PLACE)
    assert [path.name for path in (tmp_path / "kv").iterdir()] == ["dejavu-other"]
    remove_store(setup, PLACE)


def test_places_without_a_file(tmp_path):
    prompts = SimpleNamespace(role=Role.PROMPT)
    assert store_path(make_setup(None), PLACE) is None
    assert open_store(make_setup(tmp_path), prompts, LAYOUT, is_later=False) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.unlink(), "is not there: KV that no process has kept is computed again"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is not used (it does not have its size)"),
        (lambda path: path.write_bytes(b""), "is not used (its header is not one of this version, or broken)"),
        (lambda path: path.write_bytes(bytes(len(path.read_bytes()))), "is not used (its header is not one"),
    ],
)
def test_a_file_that_is_gone_or_broken_is_made_anew(tmp_path, key, capfd, change, said):
    setup = make_setup(tmp_path / "kv")
    change(store_path(setup, PLACE))
    assert find(setup) != key
    assert said in capfd.readouterr().err


def test_a_file_of_another_model_or_layout_is_not_used(tmp_path, key, capfd):
    assert find(make_setup(tmp_path / "kv", model_mark="new")) != key
    assert "is not used (it is of another model)" in capfd.readouterr().err
    find(make_setup(tmp_path / "kv", model_mark="new"), PoolLayout(5, 3, 2, 4, 1, 2, 3, 4))
    assert "is not used (it is of another layout)" in capfd.readouterr().err


def test_a_directory_that_takes_nothing(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    with pytest.raises(CapacityError, match=r"bytes of KV cannot be kept in .* \(Not a directory\): make room there"):
        make(tmp_path / "file" / "kv")
    assert open_store(make_setup(tmp_path / "file" / "kv"), PLACE, LAYOUT, is_later=True) is None
    assert "this run goes on without it" in capfd.readouterr().err


def test_a_full_disk_is_told_of_before_serving(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dejavu.kv.disk.os.posix_fallocate", refuse)
    with pytest.raises(CapacityError, match="No space left on device"):
        make(tmp_path / "kv")
    assert not list(tmp_path.glob("kv/*/*"))


def test_files_of_two_runs_do_not_meet(tmp_path):
    assert make(tmp_path, run_id="a") != make(tmp_path, run_id="b")
    with pytest.raises(FileNotFoundError):
        KvFile.open(tmp_path / "dejavu-c" / "0.1.0.kv", {}, LAYOUT)
