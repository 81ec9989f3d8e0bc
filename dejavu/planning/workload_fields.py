"""Say which fields a workload line may have, and check their values."""

import difflib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class InvalidValueError(Exception):
    """Carry the place of a bad value inside its field, such as `[3]`, the value, and what is accepted there."""

    def __init__(self, value: object, accepts: str, place: str = "") -> None:
        super().__init__(place)
        self.value, self.accepts, self.place = value, accepts, place

    def inside(self, place: str) -> "InvalidValueError":
        """Make the same complaint seen from one level further out."""
        return InvalidValueError(self.value, self.accepts, place + self.place)


@dataclass(frozen=True, slots=True)
class FieldKind:
    """Say in words what a field accepts, and how a JSON value becomes the one kept; `read` raises ValueError."""

    accepts: str
    read: Callable[[Any], Any]

    def check(self, value: object) -> Any:
        """Convert `value`; raise InvalidValueError with where and what is wrong."""
        try:
            return self.read(value)
        except (ValueError, OverflowError):
            raise InvalidValueError(value, self.accepts) from None


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def whole(low: int, high: int | None = None) -> FieldKind:
    """Accept a whole number in [low, high]."""

    def read(value: Any) -> int:
        _require(type(value) is int and low <= value and (high is None or value <= high))
        return int(value)

    return FieldKind(f"a whole number {_span(low, high)}", read)


def number(low: float, high: float | None = None, *, above: bool = False) -> FieldKind:
    """Accept a finite number in [low, high], or in (low, high] with `above`."""

    def read(value: Any) -> float:
        _require(type(value) in (int, float) and (low < value if above else low <= value))
        _require(value <= high if high is not None else value < math.inf)
        return float(value)

    return FieldKind(f"a number {_span(low, high, above)}", read)


def _span(low: float, high: float | None, above: bool = False) -> str:
    if high is None:
        return f"above {low}" if above else f"of at least {low}"
    return f"above {low} and up to {high}" if above else f"from {low} to {high}"


def _read_flag(value: Any) -> bool:
    _require(type(value) is bool)
    return bool(value)


def _read_text(value: Any) -> str:
    _require(type(value) is str and value != "")
    value.encode()  # a lone surrogate: UnicodeEncodeError is a ValueError
    return str(value)


def _read_role(value: Any) -> str:
    _require(value in ("system", "user", "assistant"))
    return str(value)


def list_of(kind: FieldKind, what: str) -> FieldKind:
    """Accept a list, not empty, of what `kind` accepts; it becomes a tuple."""

    def read(value: Any) -> tuple[Any, ...]:
        _require(type(value) is list and value != [])
        return tuple(_check_inside(kind, each, f"[{index}]") for index, each in enumerate(value))

    return FieldKind(f"a list, not empty, of {what}", read)


def _check_inside(kind: FieldKind, value: object, place: str) -> Any:
    try:
        return kind.check(value)
    except InvalidValueError as error:
        raise error.inside(place) from None


FLAG = FieldKind("true or false", _read_flag)
TEXT = FieldKind("a string, not empty, of whole characters", _read_text)
TEXTS = list_of(TEXT, "strings")
TOKEN_IDS = list_of(whole(0), "token ids")
BIAS = number(-100, 100)
MESSAGE_FIELDS = {"role": FieldKind("system, user or assistant", _read_role), "content": TEXT}


def _read_stop(value: Any) -> tuple[str, ...]:
    return (_read_text(value),) if isinstance(value, str) else TEXTS.read(value)


def _read_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Read OpenAI's map of token ids, which JSON writes as strings, to biases."""
    _require(type(value) is dict)
    for key in value:
        if not (key.isascii() and key.isdigit()):
            raise InvalidValueError(key, "token ids as keys")
    return tuple(sorted((int(key), _check_inside(BIAS, bias, f"[{key}]")) for key, bias in value.items()))


def _read_message(value: Any) -> dict[str, str]:
    _require(type(value) is dict and value.keys() == MESSAGE_FIELDS.keys())
    return {name: _check_inside(kind, value[name], f".{name}") for name, kind in MESSAGE_FIELDS.items()}


MESSAGE = FieldKind("an object with role and content, and nothing else", _read_message)

PROMPT_FORMS = {"prompt": TEXT, "prompt_token_ids": TOKEN_IDS, "messages": list_of(MESSAGE, "messages")}
REQUEST_FIELDS = {"request_id": TEXT, "arrival_s": number(0), "bad_words": TEXTS}
SAMPLING_FIELDS = {  # by the names of SamplingParams; the limits are OpenAI's, and vLLM's where that API has none
    "max_tokens": whole(1),
    "min_tokens": whole(0),
    "temperature": number(0),
    "top_k": whole(0),
    "top_p": number(0, 1, above=True),
    "repetition_penalty": number(0, above=True),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": FieldKind("an object of token ids and biases", _read_bias),
    "bad_words_ids": list_of(TOKEN_IDS, "lists of token ids"),
    "stop": FieldKind("a string or a list of strings", _read_stop),
    "stop_token_ids": TOKEN_IDS,
    "ignore_eos": FLAG,
    "logprobs": whole(0, 20),
    "seed": whole(-(2**63), 2**64 - 1),
}
FIELDS = PROMPT_FORMS | REQUEST_FIELDS | SAMPLING_FIELDS


def check_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of one line; raise ValueError with one sentence naming the field, its value, the remedy."""
    checked = {}
    for name, value in values.items():
        if name not in FIELDS:
            raise ValueError(f"unknown field {show(name)}{nearest(name)}")
        try:
            checked[name] = FIELDS[name].check(value)
        except InvalidValueError as error:
            raise ValueError(f"{name}{error.place} is {show(error.value)}: give {error.accepts}") from None
    return checked


def nearest(name: str) -> str:
    """Name the right field that looks most like `name`, or all of them."""
    near = difflib.get_close_matches(name, FIELDS, 1)
    return f": did you mean {near[0]}?" if near else f": the fields are {', '.join(FIELDS)}"


def show(value: object) -> str:
    """Write a value as its line has it, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."
