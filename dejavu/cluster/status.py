"""What a run says of itself while it serves, for who watches it: the content of status.json."""

from collections.abc import Mapping
from math import isnan

from dejavu.engine.controller import Controller
from dejavu.measure.failures import FailureRecord
from dejavu.topology import Pipeline, Role, Topology


def status(controller: Controller, topology: Topology, state: str) -> dict[str, object]:
    """Give the counts of the requests, and how busy rows, stages and KV memory are."""
    counts, lanes = controller.counts, controller.seating.lanes
    running = len(controller.running)
    tables = [lane.table for lane in lanes]
    used = [[table.num_blocks - len(table.blocks.free), table.num_blocks] for table in tables]
    return {
        "state": state,
        "requests_total": counts.submitted,
        "requests_done": counts.done,
        "requests_running": running,
        "requests_waiting": len(controller.waiting),
        "tokens_out": counts.tokens,
        "elapsed_s": controller.clock.now_s(),
        "rows": sum(table.num_rows for table in tables),
        "busy_rows": running,
        "stages": dict(stage_shares(controller, topology)),
        "kv_blocks": dict(zip(map(pipeline_name, topology.pipelines), used, strict=True)),
        **streaming(controller),
        "failures": [failure_line(record) for record in controller.failures.records],
    }


def streaming(controller: Controller) -> dict[str, dict[str, int]]:
    """Count what was swapped, and the passes that replicas lack, where there is any of it."""
    found, activity = {}, controller.activity
    if activity.num_fetches:
        found["swap"] = {"fetches": activity.num_fetches, "bytes": activity.swapped_bytes}
    if controller.replicated:
        behind = [
            controller.lane_of(rank).steps[microbatch] - 1 - step
            for (rank, microbatch), step in controller.replicated.items()
        ]
        found["replication"] = {"lag_steps": max(0, *behind)}
    return found


def stage_shares(controller: Controller, topology: Topology) -> Mapping[str, float]:
    """Give the share of the time that each stage computed lately: the mean over its tensor ranks."""
    now_s = controller.clock.now_s()
    shares = {}
    for pipeline in topology.pipelines:
        for stage in range(pipeline.pp):
            ranks = pipeline.stage_ranks(stage)
            busy = sum(controller.activity.share(rank, now_s) for rank in ranks) / len(ranks)
            shares[f"{pipeline_name(pipeline)} stage {stage}"] = round(busy, 3)
    return shares


def pipeline_name(pipeline: Pipeline) -> str:
    """Name a pipeline: by its role, or by number where all do the same."""
    return f"pipeline {pipeline.index}" if pipeline.role is Role.BOTH else pipeline.role.value


def failure_line(record: FailureRecord) -> str:
    """Say who failed, and whether the run has got over it."""
    who = f"{record.target} (rank {record.rank}) was lost at {record.detected_s:.2f} s"
    return f"{who}, recovering" if isnan(record.resumed_s) else f"{who}, serving again at {record.resumed_s:.2f} s"
