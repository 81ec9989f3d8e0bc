"""Read requests from a workload file, or make them up; turn them into requests that fit the model and its rows.

A workload is JSONL (one object a line, the fields of workload_fields.FIELDS, blank lines left out) or a JSON trace,
[[prompt_tokens, output_tokens(, arrival_s)], ...], whose prompts are random tokens.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from dejavu.errors import UsageError, WorkloadError
from dejavu.planning.workload_fields import (
    PROMPT_FORMS,
    SAMPLING_FIELDS,
    InvalidValueError,
    check_fields,
    number,
    show,
    whole,
)
from dejavu.request import Request, SamplingParams


@dataclass(frozen=True, slots=True)
class WorkloadItem:
    """Hold one request before tokenisation, with exactly one of the four forms of a prompt."""

    request_id: str
    source: str  # "file:line" or the like: what an error names
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    prompt_len: int | None = None  # so many random tokens
    arrival_s: float = 0.0
    bad_words: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)  # the fields of SamplingParams that were given


class PromptTokenizer(Protocol):
    """Name what `to_requests` needs of a tokenizer; dejavu.model.tokenizer.Tokenizer has it."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Give the tokens of `text`."""

    def chat(self, messages: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Give the tokens of a conversation, or of one user's text; raise UsageError where that is impossible."""


def derive_seed(run_seed: int, request_id: str) -> int:
    """Give the sampling seed, in [0, 2**63), of a request that names none: a stable hash of the run's and its id."""
    digest = hashlib.blake2b(f"{run_seed}/{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# -- reading ----------------------------------------------------------------------------------------------------------


def read_workload(path: Path | str) -> list[WorkloadItem]:
    """Read a JSONL workload or a JSON trace, in the file's order; the id of a request without one is its line's number.

    Lines are counted from 0 for that id, from 1 in errors. Raises WorkloadError, naming the file and the line, for
    anything that is not a request.
    """
    text = _read_text(Path(path))
    items = _read_trace(text, str(path)) if text.lstrip().startswith("[") else list(_read_lines(text, str(path)))
    if not items:
        raise WorkloadError(f'{path} holds no request: write one object a line, such as {{"prompt": "Hello"}}')
    _check_unique(items)
    return items


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise WorkloadError(f"cannot read workload {path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8 text") from None


def _read_lines(text: str, path: str) -> Iterator[WorkloadItem]:
    for index, line in enumerate(text.split("\n")):  # not splitlines: JSON strings may hold other line separators
        if line.strip():
            source = f"{path}:{index + 1}"
            yield _make_item(_parse_json(line, source, "write one object a line"), source, str(index))


def _parse_json(text: str, source: str, remedy: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise WorkloadError(f"{source}: no JSON at {place} ({error.msg.lower()}): {remedy}") from None
    except RecursionError:
        raise WorkloadError(f"{source}: brackets are nested too deeply: {remedy}") from None
    except ValueError as error:
        raise WorkloadError(f"{source}: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key in values if sum(key == name for name, _ in pairs) > 1)
        raise ValueError(f"field {show(twice)} is given twice: leave one")
    return values


def _make_item(values: Any, source: str, default_id: str) -> WorkloadItem:
    try:
        if type(values) is not dict:
            raise ValueError(f'{show(values)} is no object: write one such as {{"prompt": "Hello"}}')
        fields = check_fields(values)
        _check_together(fields)
    except ValueError as error:
        raise WorkloadError(f"{source}: {error}") from None
    sampling = {name: fields.pop(name) for name in SAMPLING_FIELDS if name in fields}
    return WorkloadItem(fields.pop("request_id", default_id), source, sampling=sampling, **fields)


def _check_together(fields: dict[str, Any]) -> None:
    """Check what one field says against another."""
    forms = [name for name in PROMPT_FORMS if name in fields]
    if len(forms) != 1:
        found = f"{' and '.join(forms)} are given together" if forms else "there is no prompt"
        raise ValueError(f"{found}: give one of {', '.join(PROMPT_FORMS)}")
    most = fields.get("max_tokens")
    if most is not None and fields.get("min_tokens", 0) > most:
        raise ValueError(f"min_tokens is {fields['min_tokens']}: give at most max_tokens, which is {most}")


def _check_unique(items: Sequence[WorkloadItem]) -> None:
    seen: dict[str, WorkloadItem] = {}
    for item in items:
        first = seen.setdefault(item.request_id, item)
        if first is not item:
            raise WorkloadError(
                f"{item.source}: request_id {show(item.request_id)} is that of {first.source} too: "
                "give each request its own"
            )


def _read_trace(text: str, path: str) -> list[WorkloadItem]:
    entries = _parse_json(text, path, "write [[prompt_tokens, output_tokens], ...]")
    return [_make_traced(entry, f"{path}[{index}]", str(index)) for index, entry in enumerate(entries)]


TRACE_COLUMNS = {"prompt_tokens": whole(1), "output_tokens": whole(0), "arrival_s": number(0)}


def _make_traced(entry: Any, source: str, request_id: str) -> WorkloadItem:
    """Make a request of random tokens; no output asks for prompt processing alone, which yields one token."""
    if type(entry) is not list or len(entry) not in (2, 3):
        raise WorkloadError(f"{source}: {show(entry)} is no entry: give [prompt_tokens, output_tokens(, arrival_s)]")
    for (name, kind), value in zip(TRACE_COLUMNS.items(), entry, strict=False):
        try:
            kind.check(value)
        except InvalidValueError:
            raise WorkloadError(f"{source}: {name} is {show(value)}: give {kind.accepts}") from None
    arrival_s = float(entry[2]) if len(entry) == 3 else 0.0
    sampling = {"max_tokens": max(1, entry[1]), "ignore_eos": True}
    return WorkloadItem(request_id, source, prompt_len=entry[0], arrival_s=arrival_s, sampling=sampling)


# -- making up --------------------------------------------------------------------------------------------------------


def make_workload(num_requests: int, prompt_len: int, output_len: int) -> list[WorkloadItem]:
    """Make up equal requests of random tokens, which all arrive at the start and end after `output_len` tokens."""
    sampling = {"max_tokens": output_len, "ignore_eos": True}
    return [
        WorkloadItem(str(index), f"request {index}", prompt_len=prompt_len, sampling=sampling)
        for index in range(num_requests)
    ]


def with_poisson_arrivals(items: Sequence[WorkloadItem], rate: float, seed: int) -> list[WorkloadItem]:
    """Let the items arrive in their order as a Poisson process of `rate` requests per second, from `seed` alone."""
    generator = random.Random(derive_seed(seed, "arrivals"))  # noqa: S311 (no secret)
    arrivals = itertools.accumulate(generator.expovariate(rate) for _ in items)
    return [replace(item, arrival_s=arrival_s) for item, arrival_s in zip(items, arrivals, strict=True)]


# -- making requests --------------------------------------------------------------------------------------------------


def to_requests(
    items: Sequence[WorkloadItem],
    tokenizer: PromptTokenizer | None,
    vocab_size: int,
    *,
    seed: int,
    defaults: SamplingParams,
    max_row_tokens: int,
    chat: bool = False,
    lowest_random_token: int = 0,
) -> list[Request]:
    """Tokenise the items and complete their sampling parameters; in the items' order.

    A request takes what it does not name from `defaults`, but its seed, which is derived from `seed` and its id.
    `chat` puts text prompts into the chat template (messages always are). Random tokens are in [lowest_random_token,
    vocab_size). A max_tokens that comes from `defaults` is lowered to what the row still holds. Raises WorkloadError
    for tokens outside the vocabulary, for a prompt and max_tokens longer than a row, and for text without a tokenizer.
    """
    requests = []
    for item in items:
        prompt = _tokenize_prompt(item, tokenizer, random_tokens=(seed, lowest_random_token, vocab_size), chat=chat)
        sampling = replace(defaults, **{"seed": derive_seed(seed, item.request_id), **item.sampling})
        sampling = _with_bad_words(sampling, item, tokenizer)
        _check_vocabulary(item, prompt, sampling, vocab_size)
        sampling = _fit_row(item, len(prompt), sampling, max_row_tokens)
        requests.append(Request(item.request_id, prompt, sampling, item.arrival_s))
    return requests


def _tokenize_prompt(
    item: WorkloadItem, tokenizer: PromptTokenizer | None, random_tokens: tuple[int, int, int], chat: bool
) -> tuple[int, ...]:
    if item.prompt_len is not None:
        seed, low, high = random_tokens
        generator = random.Random(derive_seed(seed, f"prompt/{item.request_id}"))  # noqa: S311 (no secret)
        return tuple(generator.choices(range(low, high), k=item.prompt_len))
    if item.prompt_token_ids is not None:
        return item.prompt_token_ids
    tokenizer = _need(tokenizer, item, "a text prompt", "prompt_token_ids")
    text = item.prompt or ""
    try:
        tokens = tokenizer.encode(text) if text and not chat else tokenizer.chat(item.messages or text)
    except UsageError as error:
        raise WorkloadError(f"{item.source}: {error}") from error
    if not tokens:
        raise WorkloadError(f"{item.source}: prompt {show(text)} has no tokens: give at least one")
    return tuple(tokens)


def _need(tokenizer: PromptTokenizer | None, item: WorkloadItem, what: str, instead: str) -> PromptTokenizer:
    if tokenizer is None:
        raise WorkloadError(f"{item.source}: {what} needs a tokenizer and this model has none: give {instead}")
    return tokenizer


def _with_bad_words(sampling: SamplingParams, item: WorkloadItem, tokenizer: PromptTokenizer | None) -> SamplingParams:
    """Add the tokens of the bad words, each at the start of a text and after a space, as vLLM does."""
    if sampling.stop:
        _need(tokenizer, item, "a stop string", "stop_token_ids")
    if not item.bad_words:
        return sampling
    tokenizer = _need(tokenizer, item, "a bad word", "bad_words_ids")
    spellings = [prefix + word.lstrip() for word in item.bad_words for prefix in ("", " ")]
    encoded = [tuple(tokenizer.encode(spelling, add_special_tokens=False)) for spelling in spellings]
    words = dict.fromkeys([*sampling.bad_words_ids, *encoded])
    return replace(sampling, bad_words_ids=tuple(word for word in words if word))


def _check_vocabulary(item: WorkloadItem, prompt: Sequence[int], sampling: SamplingParams, vocab_size: int) -> None:
    bad_words = tuple(itertools.chain.from_iterable(sampling.bad_words_ids))
    biased = tuple(token for token, _ in sampling.logit_bias)
    named = {"prompt": prompt, "logit_bias": biased, "bad_words": bad_words, "stop_token_ids": sampling.stop_token_ids}
    for name, token_ids in named.items():
        if max(token_ids, default=0) >= vocab_size:
            token_id = next(token_id for token_id in token_ids if token_id >= vocab_size)
            raise WorkloadError(
                f"{item.source}: token {token_id} in {name} is outside the vocabulary: "
                f"give ids from 0 to {vocab_size - 1}"
            )


def _fit_row(item: WorkloadItem, prompt_len: int, sampling: SamplingParams, max_row_tokens: int) -> SamplingParams:
    """Lower a max_tokens that the request does not name itself to what a row holds behind the prompt."""
    room = max_row_tokens - prompt_len
    if room < 1:
        raise WorkloadError(
            f"{item.source}: {prompt_len} prompt tokens leave no room for output in a row of {max_row_tokens} tokens: "
            f"shorten the prompt to at most {max_row_tokens - 1}, or use longer rows"
        )
    if "max_tokens" not in item.sampling:
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
    if sampling.max_tokens > room:
        raise WorkloadError(
            f"{item.source}: {prompt_len} prompt tokens and max_tokens {sampling.max_tokens} need "
            f"{prompt_len + sampling.max_tokens} of a row's {max_row_tokens} tokens: lower max_tokens to {room}, "
            "or use longer rows"
        )
    if sampling.min_tokens > sampling.max_tokens:
        raise WorkloadError(
            f"{item.source}: min_tokens is {sampling.min_tokens}: "
            f"give at most max_tokens, which is {sampling.max_tokens}"
        )
    return sampling
