"""Simulate the slow and plain way, event by event and stage by stage: what the fast simulators are checked against."""

import heapq
from collections import deque

import numpy as np


def paper_arrivals(count, group, rate):
    arrivals = [0.0] * count
    if rate:
        gaps = np.random.RandomState(42).exponential(1 / rate, size=count)
        for index in range(count // group * group):
            arrivals[index] = float(sum(gaps[: index // group]))
    return arrivals


def paper_queue(events, stages, durations, passes, available, first):
    """Take events in first-in-first-out order; `durations` are (first pass, others)."""
    queue, clocks, end, waiting = deque(events), [0.0] * stages, {}, first
    while queue:
        request, done, stage, time = queue.popleft()
        clocks[stage] = max(time, clocks[stage]) + durations[done > 0]
        if stage + 1 < stages:
            queue.append((request, done, stage + 1, clocks[stage]))
        elif done + 1 < passes[request]:
            queue.append((request, done + 1, 0, clocks[stage]))
        else:
            end[request] = clocks[stage]
            if waiting < len(passes):
                queue.append((waiting, 0, 0, max(clocks[0], available[waiting])))
                waiting += 1
    return [end[request] for request in range(len(passes))]


def paper_colocated(outputs, stages, prompt_s, token_s, rate):
    tokens = [min(max(count, 2), 1000) for count in outputs]
    arrivals = paper_arrivals(len(tokens), stages, rate)
    events = [(request, 0, 0, request * prompt_s) for request in range(stages)]
    passes = [count + 1 for count in tokens]
    return arrivals, paper_queue(events, stages, (prompt_s, token_s), passes, arrivals, stages), tokens


def paper_disaggregated(outputs, prompt_stages, token_stages, prompt_s, token_s, cache_s, rate):
    tokens = [min(max(count, 2), 1000) for count in outputs]
    arrivals = paper_arrivals(len(tokens), prompt_stages + token_stages, rate)
    free, ready = 0.0, []
    for arrived in arrivals:
        start = max(arrived, free)
        free = start + prompt_s
        ready.append(start + prompt_stages * (prompt_s + cache_s))
    events = [(request, 0, 0, ready[request]) for request in range(token_stages)]
    return arrivals, paper_queue(events, token_stages, (token_s, token_s), tokens, ready, token_stages), tokens


def taken(microbatch):
    return len(microbatch["seated"]) + len(microbatch["active"])


class Engine:
    """Serve by the engine's rules: `pipelines` are (role, stages, rows); times are of every pass in every stage.

    `hop_s` is from stage to stage and back; the token side has memory for its rows and `prompt_ahead` requests more.
    """

    def __init__(
        self, requests, pipelines, prompt_s, token_s, cache_s=0.0, admission_s=0.0, hop_s=0.0, prompt_ahead=None
    ):
        self.requests, self.times, self.cache_s, self.hop_s = requests, (prompt_s, token_s), cache_s, hop_s
        self.token_memory = float("inf")
        token_rows = sum(stages * rows for role, stages, rows in pipelines if role == "token")
        if prompt_ahead is not None and token_rows:
            self.token_memory = token_rows + prompt_ahead
        self.holding = set()
        self.events, self.count = [], 0
        self.admission_s, self.seen = admission_s, {}
        self.left = [output for _, output, _ in requests]
        self.first, self.finish = [None] * len(requests), [None] * len(requests)
        self.second_begun = [None] * len(requests)
        self.queues = {"in": deque(), "token": deque()}
        self.lines = [
            {
                "role": role,
                "turn": 0,
                "stages": [{"busy": False, "queue": deque()} for _ in range(stages)],
                "microbatches": [{"seated": [], "active": [], "out": False, "rows": rows} for _ in range(stages)],
            }
            for role, stages, rows in pipelines
        ]
        for request, (_, _, arrival) in enumerate(requests):
            self.post(arrival, "in", request)

    def post(self, time, kind, *data):
        heapq.heappush(self.events, (time, self.count, kind, data))
        self.count += 1

    def run(self):
        while self.events:
            now = self.events[0][0]
            while self.events and self.events[0][0] <= now + 1e-9:  # all that happens at once, before any start
                _, _, kind, data = heapq.heappop(self.events)
                if kind in self.queues:
                    self.queues[kind].append(data[0])
                elif kind != "wake":
                    getattr(self, kind)(now, *data)
            self.seat(now)
            for line in self.lines:
                self.start(now, line)
        return self.first, self.finish

    def seat(self, now):
        for kind, queue in self.queues.items():
            lines = [line["microbatches"] for line in self.lines if (line["role"] == "token") == (kind == "token")]
            while queue and (free := [line for line in lines if any(taken(m) < m["rows"] for m in line)]):
                if kind == "in" and self.left[queue[0]] > 1:
                    if len(self.holding) >= self.token_memory:
                        break
                    self.holding.add(queue[0])
                emptiest = min(min(free, key=lambda line: sum(map(taken, line))), key=taken)
                self.seen[queue[0]] = now + self.admission_s
                self.post(now + self.admission_s, "wake")
                emptiest["seated"].append(queue.popleft())

    def start(self, now, line):
        head = line["stages"][0]
        count = len(line["microbatches"])
        for offset in range(count):
            index = (line["turn"] + offset) % count
            microbatch = line["microbatches"][index]
            if head["busy"] or head["queue"] or microbatch["out"]:
                continue
            prompts = [request for request in microbatch["seated"] if self.seen[request] <= now + 1e-9]
            if line["role"] == "token":
                microbatch["active"] += prompts
                microbatch["seated"] = [request for request in microbatch["seated"] if request not in prompts]
                prompts = []
            if prompts or microbatch["active"]:
                microbatch["out"], line["turn"] = True, index + 1
                for request in [] if prompts else microbatch["active"]:
                    self.second_begun[request] = self.second_begun[request] or now
                head["queue"].append((microbatch, prompts, self.times[not prompts]))
        self.serve(now, line)

    def serve(self, now, line):
        for index, stage in enumerate(line["stages"]):
            if stage["queue"] and not stage["busy"]:
                stage["busy"] = True
                self.post(now + stage["queue"][0][2], "leave", line, index)

    def leave(self, now, line, index):
        stage = line["stages"][index]
        stage["busy"] = False
        work = stage["queue"].popleft()
        if index + 1 < len(line["stages"]):
            self.post(now + self.hop_s, "arrive", line["stages"][index + 1], work)
        else:
            self.post(now + (self.hop_s if index else 0.0), "back", line, now, *work[:2])

    def arrive(self, now, stage, work):
        stage["queue"].append(work)

    def back(self, now, line, sampled, microbatch, prompts):
        microbatch["out"] = False
        for request in prompts or list(microbatch["active"]):
            self.token(now, sampled, line, microbatch, request, bool(prompts))

    def token(self, now, sampled, line, microbatch, request, is_first):
        self.left[request] -= 1
        if is_first:
            self.first[request] = sampled
            microbatch["seated"].remove(request)
        if self.left[request] == 0:
            self.finish[request] = sampled
            self.holding.discard(request)
            if not is_first:
                microbatch["active"].remove(request)
        elif line["role"] == "prompt":
            self.post(now + self.cache_s, "token", request)
        elif is_first:
            microbatch["active"].append(request)
