"""Run one rank of `dejavu serve`, inside mpirun."""

import faulthandler
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from dejavu.cluster.accelerator import accelerator_index
from dejavu.cluster.engine import Inheritance, Outcome, run_controller
from dejavu.cluster.injection import IncidentLog, Injector, faults_for, from_environment
from dejavu.cluster.job import Job, prepare
from dejavu.cluster.keeping import open_vault
from dejavu.cluster.launcher import RESUME, RUN_DIR
from dejavu.cluster.muster import Lost
from dejavu.cluster.process import refuse
from dejavu.cluster.sameness import answer, check_hosts
from dejavu.cluster.standby import Calling, say_farewell, stand_by
from dejavu.cluster.status import status
from dejavu.cluster.watchdog import Watchdog
from dejavu.config import ServeConfig
from dejavu.device import cuda_device_name
from dejavu.device.host_memory import available_bytes
from dejavu.engine.controller import Controller
from dejavu.engine.journal import JOURNAL, Journal, Past, read_journal
from dejavu.engine.losses import LOSSES, take_losses
from dejavu.engine.segments import files_of
from dejavu.engine.setup import EngineSetup
from dejavu.engine.sizing import CacheSize, check_host_memory, describe_capacity
from dejavu.errors import PeerLostError, RunLostError, UsageError
from dejavu.measure.ended import ended_file, ended_names, read_ended
from dejavu.measure.environment import cpu_model, describe_run, host_name, rank_table
from dejavu.measure.parts import keep_chunk, parts_of, read_steps, read_transfers, remove_parts
from dejavu.measure.records import CeilingRecord, RankRecord, write_csv
from dejavu.measure.run_directory import RunDirectory
from dejavu.measure.summary import Limits, Summary
from dejavu.measure.trace import Tracks
from dejavu.model.tokenizer import load_tokenizer
from dejavu.request import Request
from dejavu.topology import CONTROLLER, Role, Topology
from dejavu.transport.mpi import Channel

STATUS_EVERY_S = 0.2
REFILL_EVERY_S = 0.05
START_S = 300.0  # that ranks may take to meet


def run_rank(config: ServeConfig) -> int:
    """Meet the other ranks, and be rank 0, which serves, or a worker; give the exit code."""
    try:
        channel = meet_all(config)
        code = serve(channel, config) if channel.rank == CONTROLLER else work(channel)
    except PeerLostError as error:
        if config.on_failure != "abort":
            raise RunLostError(str(error)) from error
        raise
    part(channel, code)
    return code


def meet_all(config: ServeConfig) -> Channel:
    """Start MPI together with all other ranks; where one does not come, end this process, with a traceback."""
    faulthandler.dump_traceback_later(START_S, exit=True)  # MPI's start can be interrupted by nothing less
    from mpi4py import MPI

    try:
        channel = Channel(MPI.COMM_WORLD, config.stall_timeout)
    except MPI.Exception as error:
        raise PeerLostError(f"a rank died before all had met ({error}): look for its last words above") from error
    faulthandler.cancel_dump_traceback_later()
    return channel


def part(channel: Channel, code: int) -> None:
    """Leave the job together with all others; where a rank has died, MPI's own end could wait for it for ever."""
    if channel.membership.epoch == 0:
        try:
            return channel.close()
        except PeerLostError:
            lost = channel.lost_processes()
            if lost and channel.rank == min(set(channel.membership.present) - set(lost)):
                sys.stderr.write(f"{channel.names(lost)} died as the run had ended, with all results written\n")
    channel.agree_to_leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def work(channel: Channel) -> int:
    """Take the setup from rank 0, or the news that there is none, and work until the run ends."""
    start: Any = answer(channel)
    if start is not None:
        setup, os.environ[RUN_DIR] = start
        channel.send(CONTROLLER, (host_name(), device_name(channel, setup)))
        with watching(channel, setup.config):
            calling = stand_by(channel, setup)
        if calling:
            return take_over(channel, setup, calling)
    return 0


def be_spare(channel: Channel, setup: EngineSetup, lost: Lost) -> None:
    """Take part in a run that this process has joined, until it ends; the ranks `lost` before are made good first."""
    with watching(channel, setup.config):
        calling = stand_by(channel, setup, lost)
    if calling:
        take_over(channel, setup, calling)


def take_over(channel: Channel, setup: EngineSetup, calling: Calling) -> int:
    """Be the controller in place of one that died, from its journal on."""
    directory = RunDirectory(Path(os.environ[RUN_DIR]))
    past = read_past(directory)
    if not past.is_complete:
        raise PeerLostError("the controller died before it had taken the workload: start the run again")
    tokenizer = load_tokenizer(setup.directory) if setup.directory else None
    lead(channel, Job(setup, (), tokenizer), directory, Inheritance(past, calling.deaths, calling.detected_s))
    return 0


@contextmanager
def watching(channel: Channel, config: ServeConfig) -> Iterator[None]:
    """Watch another process of this host meanwhile, and end it where it hangs."""
    log = IncidentLog(Path(os.environ[RUN_DIR]))
    watchdog = Watchdog(channel, config.hang_timeout, log)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()


def device_name(channel: Channel, setup: EngineSetup) -> str:
    """Name what this worker computes on."""
    if not setup.on_cuda:
        return cpu_model()
    index = accelerator_index(channel)
    return f"cuda:{index} {cuda_device_name(index)}"


def serve(channel: Channel, config: ServeConfig) -> int:
    """Check the run, tell the workers, serve the workload, write the results."""
    workers = range(1, channel.size)
    try:
        job = prepare(config, channel.size)
        check_hosts(channel, job.setup.directory)
        check_host_memory(job.setup.topology, swapped_caches(job.setup), channel.near, available_bytes())
        directory = open_run_directory(config)
        inheritance = inherit(directory) if RESUME in os.environ else None
    except UsageError as error:
        for rank in workers:
            channel.send(rank, None)
        return refuse(error)
    job = replace(job, setup=replace(job.setup, run_id=name_run(directory, job.setup.run_id)))
    show_capacity(job.setup)
    for rank in workers:
        channel.send(rank, (job.setup, str(directory.path.absolute())))
    places = [(host_name(), cpu_model()), *(channel.receive(rank, channel.deadline_s)[1] for rank in workers)]
    write_description(directory, job, places)
    directory.write_status({"state": "loading"})
    lead(channel, job, directory, inheritance)
    return 0


def name_run(directory: RunDirectory, new: str) -> str:
    """Give the name of what a run keeps on disk: the one that it had before, where it is started again."""
    described = directory.read_run() if RESUME in os.environ else {}
    return str(described.get("run_id") or new)


def inherit(directory: RunDirectory) -> Inheritance | None:
    """Take up the run that was lost in this directory; None where it had not taken its workload yet."""
    past = read_past(directory)
    take_losses(directory.path, past)
    (directory.path / LOSSES).unlink(missing_ok=True)
    if past.is_complete:
        return Inheritance(past)
    for file in files_of(directory.path / JOURNAL):
        file.unlink()
    return None


def read_past(directory: RunDirectory) -> Past:
    """Read what a run has taken and not ended."""
    return read_journal(directory.path / JOURNAL, ended_names(directory.path))


def open_journal(directory: RunDirectory, past: Past | None) -> Journal:
    """Open the journal of a run, to go on behind its past; what stays of requests goes into the run's parts."""
    parts_of(directory.path)
    journal = Journal(directory.path / JOURNAL, past, ended_file(directory.path))
    if past:
        journal.adopt(past)
    return journal


def lead(channel: Channel, job: Job, directory: RunDirectory, inheritance: Inheritance | None = None) -> None:
    """Serve the workload as the controller, write the results, and let all other ranks go."""
    make_stream = job.tokenizer.stream if job.tokenizer else None
    past = inheritance.past if inheritance else None
    journal = open_journal(directory, past)

    def drive(controller: Controller) -> None:
        controller.keep_chunk = lambda chunk: keep_chunk(directory.path, chunk.name, chunk.offset, chunk.data)
        requests = () if past else job.requests
        if past:  # what it held is the controller's
            past.requests.clear()
            past.serials.clear()
        serve_all(controller, requests, job.setup, directory)

    with watching(channel, job.setup.config):
        _, outcome = run_controller(channel, job.setup, drive, make_stream, announce, journal, inheritance)
    journal.close()
    summary = write_results(directory, job, outcome)
    show(directory, summary, with_texts=job.setup.config.workload is not None)  # after random prompts they say nothing
    directory.write_result("ok", 0)
    say_farewell(channel)


def swapped_caches(setup: EngineSetup) -> tuple[CacheSize, ...]:
    """Give the sizes of the memory that is really taken: synthetic stages have none."""
    return tuple(replace(cache, device_blocks=0) if setup.config.synthetic else cache for cache in setup.caches)


def show_capacity(setup: EngineSetup) -> None:
    """Print how many rows fit with and without swapping, where either that or the memory was asked for."""
    from rich.console import Console

    config, pipelines = setup.config, setup.topology.pipelines
    if not config.swap and config.kv_memory is None:
        return
    lines = [
        describe_capacity(config, pipeline, cache)
        for pipeline, cache in zip(pipelines, setup.caches, strict=True)
        if pipeline.role is not Role.PROMPT
    ]
    for line in dict.fromkeys(lines):
        Console().print(line, soft_wrap=True, highlight=False)


def announce(line: str) -> None:
    """Write a line to the log at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def open_run_directory(config: ServeConfig) -> RunDirectory:
    """Take the run directory that the launcher made, or make it."""
    if path := os.environ.get(RUN_DIR):
        return RunDirectory(Path(path))
    directory = RunDirectory.create(config.name, config.out)
    os.environ[RUN_DIR] = str(directory.path.absolute())
    return directory


def write_description(directory: RunDirectory, job: Job, places: list[tuple[str, str]]) -> None:
    """Write run.yaml: what runs, where, and on what."""
    from mpi4py import MPI

    setup = job.setup
    hosts, devices = [host for host, _ in places], [device for _, device in places]
    facts = {
        "mpi_library": MPI.Get_library_version().split(",")[0],
        "dtype": setup.dtype,
        "device": setup.device,
        "run_id": setup.run_id,
        "kv_caches": [asdict(cache) for cache in setup.caches],
    }
    ranks = rank_table(setup.topology, hosts, devices)
    directory.write_run(describe_run(setup.config.model_dump(mode="json"), ranks, **facts))


def serve_all(controller: Controller, requests: Sequence[Request], setup: EngineSetup, directory: RunDirectory) -> None:
    """Serve these requests and those that the controller has, writing the status a few times a second.

    What stays of a request that has ended is in the run's parts: nothing of it is held.
    """
    topology = setup.topology
    show_status = every(STATUS_EVERY_S, lambda: directory.write_status(status(controller, topology, "serving")))
    inject = make_injection(controller, setup, directory)

    refill = every(REFILL_EVERY_S, controller.company.refill) if controller.company else lambda: None

    def tick() -> None:
        inject()
        refill()
        show_status()

    for request in requests:
        controller.submit(request)
    controller.journal.note("complete")
    for _ in controller.events(tick):
        pass
    directory.write_status(status(controller, topology, "serving"))


def make_injection(controller: Controller, setup: EngineSetup, directory: RunDirectory) -> Callable[[], None]:
    """Make what causes, again and again, the failures that were asked for and that no worker causes by itself."""
    mine = faults_for(from_environment(os.environ), CONTROLLER, setup.topology)
    if not mine:
        return lambda: None
    injector = Injector(mine, IncidentLog(directory.path), partial(drop_memory, setup), setup.topology)
    channel, lanes = controller.channel, controller.seating.lanes

    def find(rank: int) -> tuple[int, int] | None:
        present, first = channel.membership.present, setup.topology.first_spare
        if rank not in present and rank >= first:  # a spare that was used up: another one does as well
            rank = next((spare for spare in present if spare >= first), rank)
        process = channel.membership.places[rank]
        return None if process is None else (process, channel.pids[process])

    def look() -> None:
        step = max(max(lane.steps) for lane in lanes)
        injector.look(step, controller.clock.now_s(), find, controller.counts.tokens)

    return look


def drop_memory(setup: EngineSetup, prefix: str) -> None:
    """Let this host's keeper forget what a place has."""
    if not setup.config.synthetic:
        with open_vault(setup) as vault:
            vault.drop(prefix)


def every(seconds: float, action: Callable[[], None]) -> Callable[[], None]:
    """Make a function that does `action` at most once in so many seconds, however often it is called."""
    due = time.monotonic()

    def tick() -> None:
        nonlocal due
        if time.monotonic() >= due:
            action()
            due = time.monotonic() + seconds

    return tick


def write_results(directory: RunDirectory, job: Job, outcome: Outcome) -> Summary:
    """Write the CSV files, the trace and the outputs."""
    setup = job.setup
    summary = directory.write_records(
        read_ended(directory.path),
        read_steps(directory.path),
        read_transfers(directory.path),
        tracks=Tracks.of(setup.topology),
        num_stages=setup.topology.num_stages,
        peak_kv_bytes=max(n * cache.block_bytes for n, cache in zip(outcome.peak_blocks, setup.caches, strict=True)),
        limits=Limits.of_ms(setup.config.ttft, setup.config.tpot),
        failures=outcome.failures,
        trace_spans=setup.config.trace_spans,
    )
    write_csv(directory.path / "ranks.csv", rank_records(setup.topology, outcome), RankRecord)
    if ceilings := [ceiling for report in outcome.reports.values() for ceiling in report.ceilings]:
        write_csv(directory.path / "ceilings.csv", ceilings, CeilingRecord)
    remove_parts(directory.path)
    directory.write_status({**(directory.read_status() or {}), "state": "done"})
    return summary


def rank_records(topology: Topology, outcome: Outcome) -> list[RankRecord]:
    """Say what each rank took of the processor."""
    used = {CONTROLLER: outcome.cpu} | {rank: report.cpu for rank, report in outcome.reports.items()}
    return [
        RankRecord(p.rank, p.role.value, p.stage, cpu.cpu_s, cpu.window_s, cpu.core_share, host_us(outcome, p.rank))
        for p in topology.placements
        if (cpu := used.get(p.rank))
    ]


def host_us(outcome: Outcome, rank: int) -> float:
    """Give the microseconds that a rank's thread takes for a pass; NaN where it had none."""
    report = outcome.reports.get(rank)
    return report.host_us_per_step if report else float("nan")


def show(directory: RunDirectory, summary: Summary, *, with_texts: bool) -> None:
    """Print the first texts, the summary, and where the results are."""
    from rich.console import Console

    from dejavu.measure.render import MOST_OUTPUTS, render_outputs, render_summary

    console = Console()
    outputs = directory.read_outputs(MOST_OUTPUTS) if with_texts else []
    if any(output["text"] for output in outputs):
        console.print(render_outputs(outputs, summary.requests + summary.cancelled_requests))
    console.print(render_summary(summary))
    console.print(f"Results in {directory.path}", soft_wrap=True, highlight=False)
