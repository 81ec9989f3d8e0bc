import pytest

from dejavu.cluster.complaints import explain

NO_DAEMON = """ssh: Could not resolve hostname nosuch: Name or service not known
------------------------------------------------------------
A daemon failed to report back after being spawned. This could
be due to several factors, including inability to find the
daemon executable, or the executable was unable to find its

  Local host:    rack1
  Remote host:   nosuch
  Daemon exit status: 255
"""
NO_PROGRAM = """prterun was unable to find the specified executable file, and therefore did
not launch the job.

   Node:       rack2
   Executable: /opt/env/bin/python
"""


@pytest.mark.parametrize(
    ("notice", "sentence"),
    [
        (NO_DAEMON, "mpirun could not start its daemon on nosuch (exit status 255): `ssh nosuch true` has to work"),
        (NO_PROGRAM, "rack2 has no /opt/env/bin/python: install the environment"),
        ("srun returned non-zero exit status (36608) from launching", "srun could not start mpirun's daemons"),
    ],
)
def test_a_start_that_failed_is_one_sentence(notice, sentence):
    said = explain(notice.splitlines())
    assert said is not None
    assert said.startswith(sentence)
    assert "\n" not in said


def test_other_words_are_left_to_the_reader():
    assert explain(["Segmentation fault", "Node: rack1"]) is None
