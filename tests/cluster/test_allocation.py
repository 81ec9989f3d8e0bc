import pytest

from dejavu.cluster.allocation import allocated_hosts, check_start, expand_hosts
from dejavu.errors import UsageError


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("login", ["login"]),
        ("node[1-2]", ["node1", "node2"]),
        ("node[08-10,12],gpu-a", ["node08", "node09", "node10", "node12", "gpu-a"]),
        ("a[1-2]b[3,5].net,c", ["a1b3.net", "a1b5.net", "a2b3.net", "a2b5.net", "c"]),
    ],
)
def test_list_of_hosts_is_read_as_slurm_writes_it(text, names):
    assert list(expand_hosts(text)) == names


@pytest.mark.parametrize(
    ("slots", "hosts"),
    [
        ("2(x2),1", ["n1", "n1", "n2", "n2", "n3"]),
        ("3,1(x2)", ["n1", "n1", "n1", "n2", "n3"]),
        (None, ["n1", "n2", "n3"]),
    ],
)
def test_each_task_has_a_host(slots, hosts):
    environment = {"SLURM_NODELIST": "n[1-3]"} | ({"SLURM_TASKS_PER_NODE": slots} if slots else {})
    assert allocated_hosts(environment) == hosts


def test_no_allocation_has_no_hosts():
    assert allocated_hosts({"HOME": "/"}) == []


def test_several_tasks_of_srun_are_refused_unless_mpirun_made_them():
    check_start({})
    check_start({"SLURM_STEP_NUM_TASKS": "1"})
    check_start({"SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_RANK": "4"})  # mpirun's daemons are a step, too
    with pytest.raises(UsageError, match="srun has started this 5 times: leave srun out"):
        check_start({"SLURM_STEP_NUM_TASKS": "5"})
