"""Hold what `dejavu bench profile` measures: the times of passes over a whole model, and bandwidths.

A profile YAML has `model, device, date, num_layers, dtype_bytes, memory_bytes`, the lists `prompt` (rows of
`prompt_len, batch, tp, ms`) and `token` (rows of `context, batch, tp, ms`), and the map `bandwidths_gbps`.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

from dejavu.errors import ConfigError
from dejavu.measure.files import replacing
from dejavu.planning.times import Line, TimeTable

CONTEXT_STEP = 128


@dataclass(frozen=True, slots=True)
class PromptTime:
    """Hold the time of a prompt pass of `batch` prompts of `prompt_len` tokens through all layers, on `tp` devices."""

    prompt_len: int
    batch: int
    tp: int
    ms: float


@dataclass(frozen=True, slots=True)
class TokenTime:
    """Hold the time of a token step of `batch` rows with `context` tokens each in the cache, on `tp` devices."""

    context: int
    batch: int
    tp: int
    ms: float


@dataclass(frozen=True, slots=True)
class Profile:
    """Hold a model's measured times on a device; `num_layers` is how many layers the times are of."""

    model: str
    device: str
    date: str
    num_layers: int
    prompt: tuple[PromptTime, ...]
    token: tuple[TokenTime, ...]
    dtype_bytes: int = 2
    memory_bytes: int = 0  # of one device; 0 where it was not measured
    bandwidths_gbps: Mapping[str, float] = field(default_factory=dict)  # "host", "peer", "network"

    def prompt_ms(self, prompt_len: float, batch: float, tp: int = 1) -> float:
        """Interpolate the time of a prompt pass; raise ConfigError for a tensor degree that was not measured."""
        points = [(t.batch, t.prompt_len, t.ms) for t in self.prompt if t.tp == tp]
        return self.look_up(points, batch, prompt_len, tp)

    def token_ms(self, context: float, batch: float, tp: int = 1) -> float:
        """Interpolate the time of a token step; raise ConfigError for a tensor degree that was not measured."""
        points = [(t.batch, t.context, t.ms) for t in self.token if t.tp == tp]
        return self.look_up(points, batch, context, tp)

    def look_up(self, points: Sequence[tuple[float, float, float]], batch: float, length: float, tp: int) -> float:
        """Interpolate between lengths for each batch, then between batches; ends are drawn out straight."""
        if not points:
            raise ConfigError(f"the profile has no times at tensor degree {tp}: use one of {self.tensor_degrees}")
        batches = sorted({b for b, _, _ in points})
        lines = [sorted((n, ms) for b, n, ms in points if b == each) for each in batches]
        return interpolate([(b, interpolate(line, length)) for b, line in zip(batches, lines, strict=True)], batch)

    @property
    def tensor_degrees(self) -> list[int]:
        """Give the tensor degrees that have both kinds of times."""
        return sorted({t.tp for t in self.prompt} & {t.tp for t in self.token})

    def save(self, path: Path) -> None:
        """Write the profile as YAML."""
        import yaml

        values = asdict(self) | {"prompt": [asdict(t) for t in self.prompt], "token": [asdict(t) for t in self.token]}
        values["bandwidths_gbps"] = dict(self.bandwidths_gbps)
        try:
            with replacing(path) as file:
                yaml.safe_dump(values, file, sort_keys=False)
        except OSError as error:
            raise ConfigError(f"cannot write profile {path} ({error.strerror}): name a writable file") from None


def load_profile(path: Path) -> Profile:
    """Read a profile YAML; raise ConfigError naming what is missing, unknown or impossible."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read profile {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"profile {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"profile {path} holds no mapping: `dejavu bench profile` writes one")
    check_keys(values, Profile, f"profile {path}")
    return Profile(
        model=str(values["model"]),
        device=str(values["device"]),
        date=values["date"].isoformat() if isinstance(values["date"], date) else str(values["date"]),
        num_layers=int(number(values["num_layers"], f"num_layers in profile {path}")),
        prompt=tuple(PromptTime(**row) for row in checked_rows(values["prompt"], PromptTime, f"prompt of {path}")),
        token=tuple(TokenTime(**row) for row in checked_rows(values["token"], TokenTime, f"token of {path}")),
        dtype_bytes=int(number(values.get("dtype_bytes", 2), f"dtype_bytes in profile {path}")),
        memory_bytes=int(number(values.get("memory_bytes", 0), f"memory_bytes in profile {path}", least=0)),
        bandwidths_gbps={
            str(name): number(value, f"bandwidth {name!r} in profile {path}")
            for name, value in (values.get("bandwidths_gbps") or {}).items()
        },
    )


def check_keys(values: Mapping[str, Any], kind: Any, place: str) -> None:
    """Raise ConfigError for a key that is missing or unknown."""
    known = [each.name for each in fields(kind)]
    optional = {"dtype_bytes", "memory_bytes", "bandwidths_gbps"}
    if unknown := [key for key in values if key not in known]:
        raise ConfigError(f"unknown key {unknown[0]!r} in {place}: the keys are {', '.join(known)}")
    if missing := [key for key in known if key not in values and key not in optional]:
        raise ConfigError(f"{place} has no {missing[0]!r}: `dejavu bench profile` writes it")


def checked_rows(rows: Any, kind: Any, place: str) -> list[dict[str, Any]]:
    """Check a list of measured times: whole numbers but `ms`, all above 0 but a context."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{place} is no list of times: `dejavu bench profile` writes at least one")
    for index, row in enumerate(rows):
        check_keys(row, kind, f"{place}[{index}]")
        for name, value in row.items():
            number(value, f"{name} in {place}[{index}]", least=0 if name == "context" else None)
    return rows


def number(value: Any, name: str, least: float | None = None) -> float:
    """Check a number: above 0, or at least `least`."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and value < float("inf")
    if not good or not (value > 0 if least is None else value >= least):
        raise ConfigError(f"{name} is {value!r}: give a number above 0")
    return float(value)


def interpolate(points: Sequence[tuple[float, float]], at: float) -> float:
    """Interpolate linearly between sorted points; beyond the ends go on straight, but never below the least value."""
    if len(points) == 1:
        return points[0][1]
    index = min(max(bisect_left([x for x, _ in points], at), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    value = y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return max(value, min(y for _, y in points) * min(1.0, at / points[0][0] if points[0][0] else 1.0))


class ProfileTimes:
    """Give the times of one of `stages` even stages, by a profile; each combination is looked up once."""

    context_step = CONTEXT_STEP
    steps_alike = False

    def __init__(self, profile: Profile, num_layers: int, stages: int, tp: int, stream_slowdown: float = 1.0) -> None:
        """Scale a profile to the stage with the most of `num_layers` layers; prompts take `stream_slowdown` longer."""
        self.profile = profile
        self.tp = tp
        self.share = -(-num_layers // stages) / profile.num_layers / 1e3
        self.prompt_share = self.share * stream_slowdown
        self.prompts: dict[tuple[int, int], float] = {}
        self.tokens: dict[tuple[int, int], float] = {}

    def prompt_s(self, num_tokens: int, num_rows: int, share: float = 1.0) -> float:
        """Give the time of a pass with `num_tokens` prompt tokens of `num_rows` requests."""
        key = num_tokens, num_rows
        if key not in self.prompts:
            milliseconds = self.profile.prompt_ms(num_tokens / num_rows, num_rows, self.tp)
            self.prompts[key] = milliseconds * self.prompt_share
        return self.prompts[key]

    def token_s(self, num_rows: int, context: float) -> float:
        """Give the time of a token step; the same for all contexts of a span of 128."""
        key = num_rows, int(context) // CONTEXT_STEP
        if key not in self.tokens:
            middle = (key[1] + 0.5) * CONTEXT_STEP
            self.tokens[key] = self.profile.token_ms(middle, num_rows, self.tp) * self.share
        return self.tokens[key]

    def table(self) -> TimeTable:
        """Give the measured points, scaled to the stage."""
        prompts = [(t.batch, t.prompt_len, t.ms) for t in self.profile.prompt if t.tp == self.tp]
        tokens = [(t.batch, t.context, t.ms) for t in self.profile.token if t.tp == self.tp]
        return TimeTable(lines(prompts, self.prompt_share), lines(tokens, self.share), CONTEXT_STEP)


def lines(points: Sequence[tuple[float, float, float]], share: float) -> tuple[Line, ...]:
    """Sort measured (batch, length, ms) into lines of seconds."""
    return tuple(
        Line(batch, tuple(sorted((length, share * ms) for b, length, ms in points if b == batch)))
        for batch in sorted({b for b, _, _ in points})
    )
