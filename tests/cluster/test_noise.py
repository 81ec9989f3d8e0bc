from dejavu.cluster.noise import BoilerplateFilter, Lines

RULE = "-" * 74
NOTICE = [RULE, "MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD", "  Errorcode: 3", RULE]
REAL = [RULE, "A requested component was not found, or was unable to be opened.", RULE]


def passed(lines):
    noise = BoilerplateFilter()
    shown = [out for line in lines for out in noise.push(line)]
    return shown + noise.release(), noise.withheld


def test_notice_of_the_end_is_withheld_and_kept():
    shown, withheld = passed(["rank 1: ValueError: x", *NOTICE, "after"])
    assert shown == ["rank 1: ValueError: x", "after"]
    assert withheld == NOTICE


def test_complaints_about_what_is_known_are_dropped():
    noise = [
        "NBC_Progress: an error 75 was found during schedule 0x55f5295f8eb0 at row-offset 0 - aborting the schedule",
        "Error in NBC_Start_round() (-1)",
        "[vm:01399] OPAL ERROR: Not supported in file /openmpi-5.0.11/ompi/dpm/dpm.c at line 406",
        "[vm:1] /a/osc_ucx_component.c:375  Error: OSC UCX component priority set inside component query failed ",
    ]
    assert passed(["before", *noise, "after"]) == (["before", "after"], [])


def test_other_messages_of_mpirun_and_ranks_pass_in_order():
    table = ["a", RULE, "b", RULE, "c", "-" * 10]
    lines = [*table, *REAL, *table]
    assert passed(lines) == (lines, [])


def test_an_open_block_passes_when_it_does_not_close():
    assert passed([RULE, "a rank draws one line"]) == ([RULE, "a rank draws one line"], [])
    noise = BoilerplateFilter()
    shown = [out for line in [RULE, *map(str, range(100))] for out in noise.push(line)]
    assert shown == [RULE, *map(str, range(100))]


def test_lines_are_cut_where_they_end_however_the_bytes_come():
    text = "ä line\nanother\r\n\x00\nrest".encode()
    for size in range(1, len(text)):
        taken = []
        lines = Lines(taken.append)
        for start in range(0, len(text), size):
            lines.feed(text[start : start + size])
        assert taken == ["ä line", "another", ""]
        lines.flush()
        lines.flush()
        assert taken == ["ä line", "another", "", "rest"]
