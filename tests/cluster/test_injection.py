"""Failures on purpose: how they are asked for, when they are due, and who causes them."""

import json
import math
import os
import signal

import pytest

from dejavu.cluster.injection import (
    Fault,
    Incident,
    IncidentLog,
    Injector,
    describe_fault,
    faults_for,
    from_environment,
    parse_fault,
    random_faults,
    to_environment,
)
from dejavu.cluster.resilience import Restart, differing, latency_rows, workload_line
from dejavu.config import ServeConfig
from dejavu.engine.journal import Past, Progress
from dejavu.errors import UsageError
from dejavu.model.spec import ModelSpec
from dejavu.request import Completion, FinishReason, Request, SamplingParams
from dejavu.topology import build_topology, required_ranks

SPEC = ModelSpec(
    "llama", 6, 48, 6, 2, 8, 96, 199, 64, positions="rope", norm="rmsnorm", activation="silu", gated_ffn=True
)


def make_topology(**options):
    config = ServeConfig(**options)
    return build_topology(config, SPEC, required_ranks(config))


@pytest.mark.parametrize(
    ("who", "rank"),
    [
        ("controller", 0),
        ("prompt:0", 1),
        ("prompt:0.1", 2),
        ("token:1", 5),
        ("token:1.1", 6),
        ("spare:1", 8),
        ("rank:4", 4),
    ],
)
def test_every_rank_has_a_name(who, rank):
    topology = make_topology(prompt_pp=1, token_pp=2, tp=2, spares=2)
    assert parse_fault(f"{who}@step=40", "kill", topology) == Fault(rank, "kill", step=40)
    assert parse_fault(f"{who}@t=3.5", "stop", topology, 2) == Fault(rank, "stop", time_s=3.5, every=2)
    for when in ("step=40", "t=3.5", "tokens=500"):
        fault = parse_fault(f"{who}@{when}", "kill", topology)
        assert parse_fault(describe_fault(fault, topology), "kill", topology) == fault


def test_stages_of_several_pipelines_are_counted_through():
    topology = make_topology(pp=2, dp=2)
    assert [parse_fault(f"both:{n}@t=1", "kill", topology).rank for n in range(4)] == [1, 2, 3, 4]


@pytest.mark.parametrize(("text", "says"), [("token:1", "does not say when"), ("token:7@step=1", "no 'token:7'")])
def test_what_cannot_be_is_explained(text, says):
    with pytest.raises(UsageError, match=says):
        parse_fault(text, "kill", make_topology(prompt_pp=1, token_pp=2))


def test_faults_are_due_once_or_again_and_again():
    once, again = Fault(1, "kill", step=40), Fault(1, "kill", time_s=2.0, every=3)
    assert [once.is_due(times, step, 0.0) for times, step in ((0, 39), (0, 41), (1, 80))] == [False, True, False]
    assert [again.is_due(times, 0, now) for times, now in ((0, 1.9), (0, 2.0), (1, 4.9), (1, 5.0))] == [
        False,
        True,
        False,
        True,
    ]


def test_random_faults_follow_from_their_seed_and_leave_an_end():
    topology = make_topology(prompt_pp=1, token_pp=2, spares=2)
    faults = random_faults(50, topology, 1000, 3, loses_memory=True)
    assert faults == random_faults(50, topology, 1000, 3, loses_memory=True)
    assert faults != random_faults(50, topology, 1000, 4, loses_memory=True)
    moments = [fault.tokens for fault in faults]
    assert moments == sorted(set(moments))
    assert 0 < moments[0] <= moments[-1] <= 950
    assert {fault.rank for fault in faults} == set(range(5))
    assert {(fault.kind, fault.loses_memory) for fault in faults} == {("kill", False), ("kill", True), ("stop", False)}
    assert not any(fault.loses_memory for fault in random_faults(50, topology, 1000, 3))
    with pytest.raises(UsageError, match="do not fit"):
        random_faults(50, topology, 50, 3)


def test_faults_are_due_when_so_many_tokens_are_out():
    fault = parse_fault("rank:1@tokens=30", "kill", make_topology(pp=2))
    assert [fault.is_due(0, 99, 99.0, tokens) for tokens in (0, 29, 30)] == [False, False, True]
    assert faults_for([fault], 0, make_topology(pp=2))


def test_workers_cause_their_own_and_the_controller_the_rest():
    topology = make_topology(pp=2, spares=1)
    faults = [
        Fault(1, "kill", step=3),
        Fault(1, "kill", time_s=3.0),
        Fault(3, "kill", step=3),
        Fault(0, "stop", step=1),
    ]
    assert from_environment(to_environment(faults)) == faults
    assert [number for number, _ in faults_for(faults, 1, topology)] == [0]
    assert [number for number, _ in faults_for(faults, 0, topology)] == [1, 2, 3]
    assert from_environment({}) == []


def test_injection_is_noted_before_it_happens_and_not_repeated(tmp_path, monkeypatch):
    topology, log, killed, dropped = make_topology(pp=2), IncidentLog(tmp_path), [], []
    monkeypatch.setattr(os, "kill", lambda pid, signum: killed.append((pid, signum, len(log.read()))))
    fault = Fault(2, "kill", step=5, loses_memory=True)
    injector = Injector([(3, fault)], log, dropped.append, topology)
    for step in (4, 5, 6):
        injector.look(step, 0.5 * step, lambda rank: (7, 1234))
    assert killed == [(1234, signal.SIGKILL, 1)]
    assert dropped == ["0.1.0/"]
    assert log.read() == [Incident(7, "kill", 2.5, 3, 1234)]
    assert log.times_done()[3] == 1


def make_past(origin_s, *requests):
    """Make what a journal says: (name, arrival, token times, whether it has ended)."""
    past = Past(origin_s)
    for name, arrival_s, times_s, ended in requests:
        completion = Completion(
            Request(name, (1, 2), SamplingParams(max_tokens=9), arrival_s), list(range(len(times_s)))
        )
        if ended:
            completion.finish_reason, completion.finish_s = FinishReason.LENGTH, times_s[-1]
        past.requests[name] = Progress(completion, times_s=list(times_s))
    return past


def test_restart_is_followed_over_both_runs():
    first = make_past(100.0, ("a", 0.0, (1.0, 2.0), True), ("b", 0.5, (1.5, 2.5, 3.0), False))
    second = make_past(110.0, ("b", 0.0, (0.5, 1.0, 1.5, 2.0), True))
    restart = Restart(first, second)
    assert restart.latencies() == {"a": 2.0, "b": 11.5}
    assert restart.outputs() == {"a": [0, 1], "b": [0, 1, 2, 3]}
    assert [(row.time_s, row.tokens) for row in restart.progress()] == [
        *((1.0, 1), (1.5, 2), (2.0, 3), (2.5, 4), (3.0, 5)),
        (3.0, 2),
        *((10.5, 3), (11.0, 4), (11.5, 5), (12.0, 6)),
    ]
    whole = make_past(0.0, ("a", 0.0, (1.0, 2.0), True), ("b", 0.5, (1.5, 2.5), True))
    rows = latency_rows({"a": [0, 1], "b": [0, 1]}, whole, first, restart.latencies())
    assert [(row.whole_s, row.failure_s, row.restart_ratio) for row in rows[:1]] == [(2.0, 2.0, 1.0)]
    assert math.isnan(rows[1].failure_s)
    assert rows[1].restart_ratio == 11.5 / 2.0


def test_differing_outputs_are_named():
    assert differing({"a": [1], "b": [2], "c": [3]}, {"a": [1], "b": [4]}) == ["b", "c"]


def test_remaining_requests_are_asked_for_again():
    request = Request("x", (4, 5), SamplingParams(max_tokens=3, temperature=0.5, logit_bias=((7, 1.0),), seed=9), 4.0)
    assert json.loads(json.dumps(workload_line(request))) == {
        "request_id": "x",
        "prompt_token_ids": [4, 5],
        "max_tokens": 3,
        "temperature": 0.5,
        "logit_bias": {"7": 1.0},
        "seed": 9,
    }
