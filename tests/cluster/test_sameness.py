import pytest

from dejavu.cluster.sameness import compare
from dejavu.errors import ModelError, UsageError

MINE = ("node1", "dejavu 1 under Python 3", "abc")


def test_hosts_that_run_the_same_are_accepted():
    compare(MINE, [("node2", *MINE[1:]), ("node3", *MINE[1:])], "/model")
    compare(("node1", "dejavu 1", ""), [("node2", "dejavu 1", "")], "")  # random weights


def test_another_program_or_model_is_named_with_its_host():
    with pytest.raises(UsageError, match="node1 runs dejavu 1 under Python 3, but node3 runs dejavu 2"):
        compare(MINE, [("node2", *MINE[1:]), ("node3", "dejavu 2", "abc")], "/model")
    with pytest.raises(ModelError, match="node2 has no model in /model: put it"):
        compare(MINE, [("node2", MINE[1], "")], "/model")
    with pytest.raises(ModelError, match="the model in /model is another one on node2 than on node1"):
        compare(MINE, [("node2", MINE[1], "xyz")], "/model")
