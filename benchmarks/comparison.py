"""Put what arrangements did beside each other, and beside what was predicted: rows, words, pictures and timelines."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dejavu.measure.records import RequestRecord, StepRecord
from dejavu.measure.run_directory import RunDirectory
from dejavu.measure.summary import Limits, idle_fractions, makespan, percentiles
from dejavu.planning.planner import ADMISSION_S
from dejavu.planning.setup import Setup
from dejavu.planning.simulator import simulate

from .arrangements import Times, closed_form_makespan
from .driver import Row, finish
from .passes import fit_admission, fit_passes
from .streaming_cost import streaming_cost

if TYPE_CHECKING:
    from .disaggregation import Options, Served, Workload

SHOWN = {
    "arrangement": "arrangement",
    "rate": "rate",
    "throughput_requests_per_s": "req/s",
    "p50_normalized_latency_s": "s/tok",
    "p50_ttft_s": "ttft",
    "idle_mean": "idle",
    "simulated_difference_percent": "sim %",
    "speedup": "gain",
    "wrong": "wrong",
}
SHORTER = (2, 4, 8, 16)
TIE = 0.01
MOST_TIES = 0.5  # requests with other tokens for a near-tie somewhere among dozens of tokens
HANDOVER_ALONE = 10  # percentile: hand-overs that waited for nothing but themselves


def report(directory: RunDirectory, served: Sequence["Served"], options: "Options", given: dict[str, Any]) -> int:
    """Write and print everything; give the exit code."""
    from .plots_serving import plot_serving

    rows = [row for each in served for row in make_rows(each, served[0], options)]
    plot_serving(rows, directory.path / "disaggregation.png", title(served[-1], options))
    for each in (served[0], served[-1]):
        draw_timeline(directory, each)
    table = [{name: row[column] for column, name in SHOWN.items()} for row in rows]
    notes = list(verdicts(rows, served, options))
    more = {"verdicts": notes}
    return finish(
        directory,
        "disaggregation",
        rows,
        given,
        table=table,
        notes=notes,
        more=more,
        error=complaint(rows, options),
        split=served[-1].arrangement.depths,
    )


def complaint(rows: Sequence[Row], options: "Options") -> str | None:
    """Say that tokens differ from the baseline's, where they should not.

    A pass of other rows sums in another order, so that in a 16-bit format a near-tie may be decided otherwise.
    """
    compared = [row for row in rows if row["arrangement"] != rows[0]["arrangement"]]
    wrong, requests = (sum(row[name] for row in compared) for name in ("wrong", "requests"))
    has_ties = options.dtype in ("float16", "bfloat16") and not options.times
    if wrong <= (MOST_TIES if has_ties else 0.0) * requests:
        return None
    return f"{wrong} of {requests} requests got other tokens than the baseline"


def title(split: "Served", options: "Options") -> str:
    """Say what was compared."""
    what = options.model
    if options.times:
        what = f"synthetic: prompt {1e3 * options.times.prompt_s:g} ms, token step {1e3 * options.times.token_s:g} ms"
    prompt, token = split.arrangement.depths
    return f"{options.workers} workers, {prompt} + {token} disaggregated ({what})"


def make_rows(served: "Served", baseline: "Served", options: "Options") -> Iterator[Row]:
    """Give a row for each workload of one arrangement."""
    for workload, reference in zip(served.workloads, baseline.workloads, strict=True):
        requests = [RequestRecord.from_completion(completion) for completion in workload.completions]
        seconds = makespan(requests)
        base_s = makespan([RequestRecord.from_completion(completion) for completion in reference.completions])
        wrong = count_wrong(workload, reference)
        yield {
            "arrangement": served.arrangement.name,
            "stages": "+".join(map(str, served.arrangement.depths)),
            "workers": options.workers,
            "rate": workload.rate or None,
            "requests": len(requests),
            "throughput_requests_per_s": len(requests) / seconds,
            "throughput_tokens_per_s": sum(request.output_tokens for request in requests) / seconds,
            "makespan_s": seconds,
            "goodput_requests_per_s": options.limits.count(requests) / seconds,
            **latencies(requests),
            **idleness(served, workload),
            **handovers(served, requests),
            **streaming_cost(served.steps, served.probes, served.arrangement.prompt_stages),
            **predictions(served, workload, len(requests) / seconds, options.times),
            "speedup": base_s / seconds,
            "same_tokens": wrong == 0,
            "wrong": wrong,
        }


def count_wrong(workload: "Workload", reference: "Workload") -> int:
    """Count the requests whose tokens differ from the baseline's."""
    pairs = zip(workload.completions, reference.completions, strict=True)
    return sum(mine.token_ids != other.token_ids for mine, other in pairs)


def latencies(requests: Sequence[RequestRecord]) -> Row:
    """Give medians and 95th percentiles."""
    names = ("normalized_latency_s", "ttft_s", "tpot_s")
    found = {name: percentiles(getattr(request, name) for request in requests) for name in names}
    return {f"{p}_{name}": getattr(at, p) for name, at in found.items() for p in ("p50", "p95")}


def idleness(served: "Served", workload: "Workload") -> Row:
    """Give the part of the time that stages did nothing: the mean, the worst, and each."""
    idle = idle_fractions(served.steps_of(workload), sum(served.arrangement.depths))
    each = " ".join(f"{fraction:.3f}" for fraction in idle)
    return {"idle_mean": sum(idle) / len(idle), "idle_max": max(idle), "idle_by_stage": each}


def handovers(served: "Served", requests: Sequence[RequestRecord]) -> Row:
    """Give what hand-overs left exposed, and then the wait for a token row, ms; none where nothing is handed over."""
    row: Row = {}
    for name in ("handover", "row_wait"):
        found = percentiles(getattr(request, f"{name}_s") for request in requests)
        for part in ("p50", "p95"):
            row[f"{part}_{name}_ms"] = 1e3 * getattr(found, part) if served.arrangement.prompt_stages else None
    return row


def predictions(served: "Served", workload: "Workload", measured: float, times: Times | None) -> Row:
    """Give the requests per second of the closed form, where it knows the case, and of the simulator."""
    count, row = len(workload.lengths), {}
    setup, overhead_ms = fitted_setup(served, workload, times)
    closed_s = None
    if times:
        closed_s = closed_form_makespan(served.arrangement, served.config.microbatch_size, workload.lengths, times)
    simulated_s = simulate(setup, workload.lengths).makespan_s
    for name, seconds in {"closed_form": closed_s, "simulated": simulated_s}.items():
        predicted = count / seconds if seconds else None
        row[f"{name}_requests_per_s"] = predicted
        row[f"{name}_difference_percent"] = 100 * (measured / predicted - 1) if predicted else None
    return row | {"overhead_ms": overhead_ms}


def fitted_setup(
    served: "Served", workload: "Workload", times: Times | None, part: float = 1.0
) -> tuple[Setup, float | None]:
    """Describe an arrangement to the simulator with the times that its passes took in this workload.

    Prompts are taken to be `part` as long. Also give what a token step needs in a stage, and on its way to the next,
    beyond what was asked for (ms).
    """
    steps, arrangement = served.steps_of(workload), served.arrangement
    firsts = [sum(arrangement.depths[:index]) for index in range(len(arrangement.depths))]
    places = zip(firsts, arrangement.depths, arrangement.roles, strict=True)
    fitted = [fit_passes(steps, first, depth, prompts_only=role == "prompt") for first, depth, role in places]
    passes = [replace(each, prompt_s=each.prompt_s * part) for each in fitted]
    entries = firsts[:1] if arrangement.prompt_stages else firsts
    admission_s = fit_admission(steps, entries, [c.admitted_s for c in workload.completions], ADMISSION_S)
    cache_s = 0.0
    if arrangement.prompt_stages:
        back_s = passes[0].hop_s if arrangement.prompt_stages > 1 else 0.0
        cache_s = max(0.0, shortest_wait(workload) - admission_s - back_s)
    overhead_ms = None
    if times:
        asked = times.token_s / arrangement.stages
        overhead_ms = 1e3 * (passes[-1].token_s + passes[-1].hop_s - asked)
    return arrangement.simulated(served.config, passes, admission_s, cache_s), overhead_ms


def shortest_wait(workload: "Workload") -> float:
    """Give the time from a prompt's end to the first token step of a request that waited for no row."""
    import numpy as np

    found = [c.token_start_s - c.first_token_s for c in workload.completions if c.was_handed_over]
    return float(np.percentile(found, HANDOVER_ALONE)) if found else 0.0


def draw_timeline(directory: RunDirectory, served: "Served") -> None:
    """Write the timeline of the requests that came all at once."""
    from dejavu.measure.trace import write_trace

    workload = served.workloads[0]
    start_s = workload.start_s
    steps = [moved(step, start_s) for step in served.steps_of(workload)]
    requests = [shifted(RequestRecord.from_completion(completion), start_s) for completion in workload.completions]
    write_trace(directory.path / f"trace-{served.arrangement.name}.json", served.tracks, steps, requests)


def moved(step: StepRecord, start_s: float) -> StepRecord:
    """Count a pass's times from `start_s`."""
    times = {name: getattr(step, name) - start_s for name in ("start_s", "compute_end_s", "end_s")}
    return replace(step, **times)


def shifted(request: RequestRecord, start_s: float) -> RequestRecord:
    """Count a request's moments from `start_s`."""
    names = ("arrival_s", "admitted_s", "first_token_s", "kv_arrived_s", "token_start_s", "finish_s")
    return replace(request, **{name: getattr(request, name) - start_s for name in names})


def verdicts(rows: Sequence[Row], served: Sequence["Served"], options: "Options") -> Iterator[str]:
    """Say in words where disaggregation wins and loses, and what shorter prompts would make of it."""
    for workload in served[0].workloads:
        beside = [row for row in rows if row["rate"] == (workload.rate or None)]
        when = f"at {workload.rate:g} requests/s" if workload.rate else "all at once"
        yield compare(beside, when, options.limits if options.limits != Limits() else None)
    yield shorter_prompts(served, options.times)
    if not options.times:
        yield streaming(rows[-1])


def streaming(row: Row) -> str:
    """Say what streaming cost prompt passes, and what hand-overs left exposed."""
    handover = f"p50 {row['p50_handover_ms']:.2g} ms, p95 {row['p95_handover_ms']:.2g} ms"
    cost = f"{row['streaming_cost_percent']:.2g} % of {row['prompt_pass_ms']:.3g} ms"
    return f"streaming KV layer by layer costs a prompt pass alone {cost}; hand-overs left exposed {handover}"


def compare(rows: Sequence[Row], when: str, limits: Limits | None = None) -> str:
    """Say how disaggregation does beside the others in one workload; with limits, by goodput too."""
    *others, split = rows
    best = max(others, key=lambda row: row["throughput_requests_per_s"])
    gain = split["throughput_requests_per_s"] / best["throughput_requests_per_s"]
    base = verb(split["speedup"], "the colocated pipeline")
    before_ms, after_ms = (1e3 * row["p50_normalized_latency_s"] for row in (others[0], split))
    latency = f"median latency per token {before_ms:.3g} ms colocated, {after_ms:.3g} ms disaggregated"
    beside = "" if best is others[0] else f"; {verb(gain, 'the best colocated layout, ' + best['arrangement'])}"
    return f"{when}: disaggregation {base}{beside}; {latency}{compare_goodput(rows) if limits else ''}"


def compare_goodput(rows: Sequence[Row]) -> str:
    """Say how much of each arrangement's throughput keeps the limits."""
    good = ", ".join(f"{row['arrangement']} {row['goodput_requests_per_s']:.3g}" for row in rows)
    return f"; requests/s within the limits: {good}"


def verb(gain: float, name: str) -> str:
    """Say whether it wins."""
    word = "equals" if abs(gain - 1) < TIE else "beats" if gain > 1 else "loses to"
    return f"{word} {name} ({gain:.2f} times its throughput)"


def shorter_prompts(served: Sequence["Served"], times: Times | None) -> str:
    """Say, by the simulator, what the same split gives where prompts are shorter: with `times`, or those measured."""
    found = {1 / part: simulated_gain(served, times, 1 / part) for part in SHORTER}
    gains = ", ".join(f"1/{1 / part:g}: {gain:.2f}" for part, gain in found.items())
    losing = [part for part, gain in found.items() if gain < 1]
    lost = f"it loses where prompts are 1/{1 / max(losing):g} as long" if losing else "it loses at none of them"
    return f"shorter prompts, all at once, by the simulator: {lost} (times the colocated throughput: {gains})"


def simulated_gain(served: Sequence["Served"], times: Times | None, part: float) -> float:
    """Simulate the baseline and disaggregation, with prompts `part` as long; give the ratio of their makespans."""
    setups = [
        ideal_setup(each, times, part) if times else fitted_setup(each, each.workloads[0], None, part)[0]
        for each in (served[0], served[-1])
    ]
    colocated_s, split_s = (simulate(setup, served[0].workloads[0].lengths).makespan_s for setup in setups)
    return colocated_s / split_s


def ideal_setup(served: "Served", times: Times, part: float) -> Setup:
    """Describe an arrangement to the simulator with times as asked for."""
    shorter = Times(times.prompt_s * part, times.token_s)
    passes = [shorter.part(depth) for depth in served.arrangement.depths]
    return served.arrangement.simulated(served.config, passes, ADMISSION_S)
