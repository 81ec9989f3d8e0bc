"""The timeline: valid JSON whose slices, names and arrows obey the Trace Event Format, and say so to Perfetto."""

import json
import math
from collections import defaultdict
from itertools import pairwise

from dejavu.measure.failures import FailureRecord
from dejavu.measure.records import RequestRecord, StepRecord, TransferRecord
from dejavu.measure.trace import Tracks, write_trace
from dejavu.request import Completion, FinishReason, Request

from .trace_processor import loaded

NAMES = Tracks({0: "controller", 1: "stage 0", 2: "stage 1"})


def load(tmp_path, *arguments):
    write_trace(tmp_path / "trace.json", *arguments)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((tmp_path / "trace.json").read_text(), parse_constant=refuse)["traceEvents"]


def pipeline_steps(num_steps=3):
    steps = []
    for number in range(num_steps):
        for stage in range(2):
            start = number * 0.02 + stage * 0.01
            steps.append(
                StepRecord(1 + stage, stage, 0, 0, number, "token", 4, 4, start, start + 0.008, start + 0.0085)
            )
    return steps


def request_row(request_id, arrival, admitted, first, finish, reason):
    done = Completion(Request(request_id, (1, 2), arrival_s=arrival), [1, 2, 3], finish_reason=reason)
    done.admitted_s, done.first_token_s, done.finish_s = admitted, first, finish
    return RequestRecord.from_completion(done)


def names_of(events, kind):
    return {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == f"{kind}_name"}


def assert_slices_do_not_overlap(events):
    threads = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert threads
    for spans in threads.values():
        spans.sort()
        assert all(end <= start + 0.002 for (_, end), (start, _) in pairwise(spans))


def test_each_rank_is_a_process_and_each_kind_a_named_thread(tmp_path):
    transfers = [TransferRecord(1, "activation", "mpi", 1, 2, 4096, 0.008, 0.009)]
    events = load(tmp_path, NAMES, pipeline_steps(), (), transfers)
    processes = {pid: name for (pid, _), name in names_of(events, "process").items()}
    assert processes == {0: "rank 0: controller", 1: "rank 1: stage 0", 2: "rank 2: stage 1"}
    threads = names_of(events, "thread")
    for event in events:
        if event["ph"] == "X":
            assert threads[event["pid"], event["tid"]] == event["cat"]
    assert sorted(name for (pid, _), name in threads.items() if pid == 1) == ["activation (mpi)", "compute", "hand on"]
    assert_slices_do_not_overlap(events)


def test_a_step_is_a_slice_in_microseconds_with_what_it_did(tmp_path):
    events = load(tmp_path, NAMES, pipeline_steps())
    (compute,) = [e for e in events if e["ph"] == "X" and e["pid"] == 2 and e["cat"] == "compute" and e["ts"] == 30000]
    assert compute["dur"] == 8000
    assert compute["args"] == {"microbatch": 0, "step": 1, "stage": 1, "rows": 4, "tokens": 4}
    handed_on = [e for e in events if e["ph"] == "X" and e["cat"] == "hand on"]
    assert len(handed_on) == 6
    assert all(e["dur"] == 500 for e in handed_on)


def test_overlapping_work_gets_further_lanes(tmp_path):
    spans = [(0.0, 0.4), (0.1, 0.2), (0.15, 0.5), (0.25, 0.3), (0.5, 0.6)]
    transfers = [TransferRecord(1, "kv", "ipc", 1, 2, 10**9, start, end) for start, end in spans]
    events = load(tmp_path, NAMES, [], (), transfers)
    assert_slices_do_not_overlap(events)
    assert len({e["tid"] for e in events if e["ph"] == "X"}) == 3  # the most that are open at once
    assert sorted(names_of(events, "thread").values()) == ["kv (ipc)", "kv (ipc) 1", "kv (ipc) 2"]
    first = next(e for e in events if e["ph"] == "X")
    assert first["args"] == {"bytes": 10**9, "source": 1, "target": 2, "gbps": 2.5}


def test_requests_are_balanced_nested_async_slices(tmp_path):
    nan = math.nan
    rows = [
        request_row('a"b\n', 0.0, 0.01, 0.02, 0.04, FinishReason.STOP),
        request_row("running", 0.01, 0.02, nan, nan, None),
        request_row("waiting", 9.0, nan, nan, nan, None),
    ]
    events = load(tmp_path, NAMES, pipeline_steps(), rows)
    stacks: dict[int, list] = defaultdict(list)
    seen: dict[int, list] = defaultdict(list)
    for event in events:
        if event["ph"] not in "be":
            continue
        assert (event["pid"], event["cat"]) == (0, "request")
        stack = stacks[event["id"]]
        if event["ph"] == "b":
            assert not stack or stack[-1]["ts"] <= event["ts"]
            stack.append(event)
            continue
        begin = stack.pop()
        assert begin["name"] == event["name"]
        assert begin["ts"] <= event["ts"]
        seen[event["id"]].append((event["name"], begin["ts"], event["ts"]))
    assert not any(stacks.values())
    assert seen[0] == [
        ("waiting", 0, 10000),
        ("prompt", 10000, 20000),
        ("tokens", 20000, 40000),
        ('request a"b\n', 0, 40000),
    ]
    assert seen[1] == [("waiting", 10000, 20000), ("prompt", 20000, 58500), ("request running", 10000, 58500)]
    assert seen[2][-1] == ("request waiting", 9e6, 9e6)
    assert next(e for e in events if e["ph"] == "b")["args"]["finish_reason"] == "stop"


def test_arrows_bind_to_the_slices_of_one_step(tmp_path):
    events = load(tmp_path, NAMES, pipeline_steps(2))
    slices = [e for e in events if e["ph"] == "X" and e["cat"] == "compute"]
    arrows = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            (inside,) = [
                s
                for s in slices
                if (s["pid"], s["tid"]) == (event["pid"], event["tid"]) and s["ts"] <= event["ts"] <= s["ts"] + s["dur"]
            ]
            arrows[event["id"]].append((event["ph"], inside["pid"], inside["args"]["step"]))
    assert list(arrows.values()) == [[("s", 1, 0), ("f", 2, 0)], [("s", 1, 1), ("f", 2, 1)]]


def test_an_empty_run_is_a_valid_timeline(tmp_path):
    assert {e["ph"] for e in load(tmp_path, NAMES, [])} == {"M"}


def prompts_and_tokens():
    """Two requests: prompts on stage 0, tokens on stage 1, microbatch and step numbers the same on both sides."""
    prompts = [StepRecord(1, 0, 0, 0, i, "prompt", 1, 9, 0.1 * i, 0.1 * i + 0.08, 0.1 * i + 0.08) for i in range(2)]
    tokens = [StepRecord(2, 1, 0, 0, i, "token", 1, 1, 0.2 + 0.01 * i, 0.209 + 0.01 * i, 0.209) for i in range(4)]
    return prompts + tokens


def flows(events):
    arrows = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            arrows[event["id"], event["name"]].append((event["ph"], event["pid"], event["ts"]))
    return {name: path for (_, name), path in arrows.items()}


def test_arrows_follow_kv_from_its_prompt_to_its_first_token_step(tmp_path):
    rows = [
        request_row("a", 0.0, 0.0, 0.081, 0.3, FinishReason.STOP),
        request_row("b", 0.0, 0.1, 0.181, 0.3, FinishReason.STOP),
        request_row("one token", 0.0, 0.1, 0.181, 0.181, FinishReason.LENGTH),
    ]
    rows[0].token_start_s, rows[1].token_start_s, rows[2].token_start_s = 0.2, 0.21, math.nan
    tracks = Tracks({0: "controller", 1: "prompt", 2: "token"}, (0, 1), hands_over=True)
    arrows = flows(load(tmp_path, tracks, prompts_and_tokens(), rows))
    assert arrows == {
        "KV of a": [("s", 1, 40000), ("f", 2, 204500)],
        "KV of b": [("s", 1, 140000), ("f", 2, 214500)],
    }


def test_steps_of_two_pipelines_are_not_joined(tmp_path):
    tracks = Tracks({0: "controller", 1: "one", 2: "other"}, (0, 1))
    assert flows(load(tmp_path, tracks, prompts_and_tokens())) == {}


def test_failures_are_marks_through_all_tracks(tmp_path):
    failures = [
        FailureRecord(0, "token stage 1", 2, "death", detected_s=0.5, resumed_s=0.6),
        FailureRecord(1, "spare", 3, "death", detected_s=0.7),
    ]
    marks = [e for e in load(tmp_path, NAMES, pipeline_steps(), (), (), failures) if e["ph"] == "i"]
    assert [(mark["name"], mark["ts"], mark["s"]) for mark in marks] == [
        ("token stage 1 (rank 2) lost", 5e5, "g"),
        ("token stage 1 (rank 2) recovered", 6e5, "g"),
        ("spare (rank 3) lost", 7e5, "g"),
    ]


ARROWS = """
    with pass as (
        select slice.id as id, pid, slice.name as name, ts from slice join thread_track on track_id = thread_track.id
        join thread using (utid) join process using (upid)
    )
    select source.pid as source, source.name as name, target.pid as target, target.ts as ts
    from flow join pass source on slice_out = source.id join pass target on slice_in = target.id"""


def test_perfetto_finds_tracks_arrows_and_failures(tmp_path):
    row = request_row("a", 0.0, 0.0, 0.081, 0.3, FinishReason.STOP)
    row.token_start_s = 0.2
    tracks = Tracks({0: "controller", 1: "prompt stage 0", 2: "token stage 0"}, (0, 1), hands_over=True)
    transfers = [TransferRecord(1 + end, "kv", "ipc", 1, 2, 10**6, 0.05, 0.07) for end in range(2)]
    failures = [FailureRecord(0, "token stage 0", 2, "death", detected_s=0.22, resumed_s=0.23)]
    write_trace(tmp_path / "trace.json", tracks, prompts_and_tokens(), [row], transfers, failures)
    with loaded(tmp_path / "trace.json", tmp_path) as perfetto:
        assert not list(perfetto.query("select name from stats where severity != 'info' and value > 0"))
        work = perfetto.query(
            "select process.name as rank, thread.name as thread, count(*) as slices, sum(dur) as ns from slice join "
            "thread_track on track_id = thread_track.id join thread using (utid) join process using (upid) "
            "group by 1, 2 order by 1, 2"
        )
        assert [(item.rank, item.thread, item.slices, item.ns) for item in work] == [
            ("rank 1: prompt stage 0", "compute", 2, 160_000_000),
            ("rank 1: prompt stage 0", "kv (ipc)", 1, 20_000_000),
            ("rank 2: token stage 0", "compute", 4, 36_000_000),
            ("rank 2: token stage 0", "kv (ipc)", 1, 20_000_000),
        ]
        assert [(arrow.source, arrow.name, arrow.target, arrow.ts) for arrow in perfetto.query(ARROWS)] == [
            (1, "prompt m0", 2, 200_000_000)
        ]
        marks = perfetto.query("select name, ts, dur from slice where category = 'failure' order by ts")
        assert [(mark.name, mark.ts, mark.dur) for mark in marks] == [
            ("token stage 0 (rank 2) lost", 220_000_000, 0),
            ("token stage 0 (rank 2) recovered", 230_000_000, 0),
        ]
        phases = perfetto.query("select name, depth, dur from slice where category = 'request' order by depth, ts")
        assert [(phase.name, phase.depth, phase.dur) for phase in phases] == [
            ("request a", 0, 300_000_000),
            ("waiting", 1, 0),
            ("prompt", 1, 81_000_000),
            ("tokens", 1, 219_000_000),
        ]
