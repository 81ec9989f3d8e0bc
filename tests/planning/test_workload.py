"""Workload files: what is read, what is refused and how it is said, and what requests come of it."""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.errors import UsageError, WorkloadError
from dejavu.planning.workload import (
    WorkloadItem,
    derive_seed,
    make_workload,
    read_workload,
    to_requests,
    with_poisson_arrivals,
)
from dejavu.request import Request, SamplingParams

FORMS = "give one of prompt, prompt_token_ids, messages"
FIELDS = (
    "prompt, prompt_token_ids, messages, request_id, arrival_s, bad_words, max_tokens, min_tokens, temperature, top_k, "
    "top_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, bad_words_ids, stop, stop_token_ids, "
    "ignore_eos, logprobs, seed"
)


class Codepoints:
    """Encode each character as its number, after a first token 1; chat writes the roles."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(character) for character in text]

    def chat(self, messages: str | Sequence[Mapping[str, Any]]) -> list[int]:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if messages[0]["role"] == "assistant":
            raise UsageError("this template wants a user first")
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))


def write(folder: Path, *lines: str) -> Path:
    path = folder / "w.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def make_requests(items: Sequence[WorkloadItem], **changes: Any) -> list[Request]:
    options: dict[str, Any] = {
        "tokenizer": Codepoints(),
        "vocab_size": 1000,
        "seed": 0,
        "defaults": SamplingParams(),
        "max_row_tokens": 64,
    }
    return to_requests(items, **(options | changes))


def fails(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(WorkloadError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_field_arrives(tmp_path):
    sampling = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 2,
        "stop": ["END", "\n"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "logprobs": 0,
        "seed": 2**64 - 1,
        "logit_bias": {"50": -100, "7": 1.5},
        "bad_words_ids": [[4], [5, 6]],
    }
    line = {"prompt": "Hi", "request_id": "a", "arrival_s": 1.5, "bad_words": ["no"], **sampling}
    (request,) = make_requests(read_workload(write(tmp_path, json.dumps(line))))
    words = ((4,), (5, 6), (ord("n"), ord("o")), (32, ord("n"), ord("o")))
    changes = {
        "stop": ("END", "\n"),
        "stop_token_ids": (3,),
        "logit_bias": ((7, 1.5), (50, -100.0)),
        "bad_words_ids": words,
    }
    assert request == Request("a", (1, ord("H"), ord("i")), SamplingParams(**(sampling | changes)), 1.5)


def test_three_forms_of_a_prompt(tmp_path):
    path = write(
        tmp_path,
        '{"prompt": "ab"}',
        '{"prompt_token_ids": [5, 6]}',
        '{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], "stop": "z"}',
    )
    plain, tokens, conversation = make_requests(read_workload(path))
    tokenizer = Codepoints()
    assert plain.prompt_token_ids == tuple(tokenizer.encode("ab"))
    assert tokens.prompt_token_ids == (5, 6)
    assert conversation.prompt_token_ids == tuple(tokenizer.encode("<system>x<user>y"))
    assert conversation.sampling.stop == ("z",)
    in_template = make_requests(read_workload(path), chat=True)
    assert in_template[0].prompt_token_ids == tuple(tokenizer.encode("<user>ab"))
    assert in_template[1:] == [tokens, conversation]


def test_ids_are_line_numbers_and_blank_lines_are_left_out(tmp_path):
    path = write(
        tmp_path, '{"prompt": "a"}', "", '  {"prompt": "b\u2028c"}\r', '{"prompt": "d", "request_id": "x"}', ""
    )
    items = read_workload(path)
    assert [(item.request_id, item.prompt) for item in items] == [("0", "a"), ("2", "b\u2028c"), ("x", "d")]
    assert [item.source for item in items] == [f"{path}:{line}" for line in (1, 3, 4)]


BAD_LINES = {
    '{"prompt": "a"': "no JSON at column 15 (expecting ',' delimiter): write one object a line",
    "{" + '"prompt": ' + "[" * 100_000: "brackets are nested too deeply: write one object a line",
    "7": '7 is no object: write one such as {"prompt": "Hello"}',
    '{"prompt": "a", "prompt": "b"}': 'field "prompt" is given twice: leave one',
    "{}": f"there is no prompt: {FORMS}",
    '{"max_tokens": 4}': f"there is no prompt: {FORMS}",
    '{"prompt": "a", "prompt_token_ids": [1]}': f"prompt and prompt_token_ids are given together: {FORMS}",
    '{"prompt": "a", "max_token": 4}': 'unknown field "max_token": did you mean max_tokens?',
    '{"prompt": "a", "Temprature": 1}': 'unknown field "Temprature": did you mean temperature?',
    '{"prompt": "a", "n": 2}': f'unknown field "n": the fields are {FIELDS}',
    '{"prompt": ""}': 'prompt is "": give a string, not empty, of whole characters',
    '{"prompt": 5}': "prompt is 5: give a string, not empty, of whole characters",
    '{"prompt": null}': "prompt is null: give a string, not empty, of whole characters",
    '{"prompt": "\\ud800"}': 'prompt is "\\ud800": give a string, not empty, of whole characters',
    '{"prompt_token_ids": []}': "prompt_token_ids is []: give a list, not empty, of token ids",
    '{"prompt_token_ids": "12"}': 'prompt_token_ids is "12": give a list, not empty, of token ids',
    '{"prompt_token_ids": [1, -2]}': "prompt_token_ids[1] is -2: give a whole number of at least 0",
    '{"prompt_token_ids": [true]}': "prompt_token_ids[0] is true: give a whole number of at least 0",
    '{"messages": [{"role": "user"}]}': (
        'messages[0] is {"role": "user"}: give an object with role and content, and nothing else'
    ),
    '{"messages": [{"role": "robot", "content": "a"}]}': (
        'messages[0].role is "robot": give system, user or assistant'
    ),
    '{"messages": [{"role": "user", "content": [1]}]}': (
        "messages[0].content is [1]: give a string, not empty, of whole characters"
    ),
    '{"prompt": "a", "request_id": 4}': "request_id is 4: give a string, not empty, of whole characters",
    '{"prompt": "a", "arrival_s": -1}': "arrival_s is -1: give a number of at least 0",
    '{"prompt": "a", "arrival_s": NaN}': "arrival_s is NaN: give a number of at least 0",
    '{"prompt": "a", "arrival_s": 1e999}': "arrival_s is Infinity: give a number of at least 0",
    '{"prompt": "a", "arrival_s": 1' + "0" * 400 + "}": f"arrival_s is 1{'0' * 56}...: give a number of at least 0",
    '{"prompt": "a", "max_tokens": 0}': "max_tokens is 0: give a whole number of at least 1",
    '{"prompt": "a", "max_tokens": 2.0}': "max_tokens is 2.0: give a whole number of at least 1",
    '{"prompt": "a", "max_tokens": true}': "max_tokens is true: give a whole number of at least 1",
    '{"prompt": "a", "min_tokens": 5, "max_tokens": 4}': "min_tokens is 5: give at most max_tokens, which is 4",
    '{"prompt": "a", "temperature": "hot"}': 'temperature is "hot": give a number of at least 0',
    '{"prompt": "a", "top_k": -1}': "top_k is -1: give a whole number of at least 0",
    '{"prompt": "a", "top_p": 1.5}': "top_p is 1.5: give a number above 0 and up to 1",
    '{"prompt": "a", "top_p": 0}': "top_p is 0: give a number above 0 and up to 1",
    '{"prompt": "a", "repetition_penalty": 0}': "repetition_penalty is 0: give a number above 0",
    '{"prompt": "a", "presence_penalty": 2.1}': "presence_penalty is 2.1: give a number from -2 to 2",
    '{"prompt": "a", "frequency_penalty": -3}': "frequency_penalty is -3: give a number from -2 to 2",
    '{"prompt": "a", "logit_bias": [1]}': "logit_bias is [1]: give an object of token ids and biases",
    '{"prompt": "a", "logit_bias": {"x": 1}}': 'logit_bias is "x": give token ids as keys',
    '{"prompt": "a", "logit_bias": {"5": 101}}': "logit_bias[5] is 101: give a number from -100 to 100",
    '{"prompt": "a", "bad_words": "no"}': 'bad_words is "no": give a list, not empty, of strings',
    '{"prompt": "a", "bad_words_ids": [[1], []]}': "bad_words_ids[1] is []: give a list, not empty, of token ids",
    '{"prompt": "a", "bad_words_ids": [[1], ["b"]]}': 'bad_words_ids[1][0] is "b": give a whole number of at least 0',
    '{"prompt": "a", "stop": ["b", ""]}': 'stop[1] is "": give a string, not empty, of whole characters',
    '{"prompt": "a", "stop": 3}': "stop is 3: give a string or a list of strings",
    '{"prompt": "a", "ignore_eos": 1}': "ignore_eos is 1: give true or false",
    '{"prompt": "a", "logprobs": 21}': "logprobs is 21: give a whole number from 0 to 20",
    '{"prompt": "a", "seed": 18446744073709551616}': (
        f"seed is 18446744073709551616: give a whole number from {-(2**63)} to {2**64 - 1}"
    ),
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:60])
def test_a_bad_line_is_named(tmp_path, line):
    path = write(tmp_path, '{"prompt": "fine"}', "", line)
    assert fails(read_workload, path) == f"{path}:3: {BAD_LINES[line]}"


def test_request_ids_are_unique(tmp_path):
    path = write(tmp_path, '{"prompt": "a", "request_id": "1"}', '{"prompt": "b"}')
    assert fails(read_workload, path) == (
        f'{path}:2: request_id "1" is that of {path}:1 too: give each request its own'
    )


def test_files_that_hold_no_workload(tmp_path):
    assert (
        fails(read_workload, tmp_path / "none")
        == f"cannot read workload {tmp_path / 'none'}: no such file or directory"
    )
    assert fails(read_workload, tmp_path) == f"cannot read workload {tmp_path}: is a directory"
    empty = write(tmp_path, "", " ")
    remedy = 'write one object a line, such as {"prompt": "Hello"}'
    assert fails(read_workload, empty) == f"{empty} holds no request: {remedy}"
    empty.write_text("[]")
    assert fails(read_workload, empty) == f"{empty} holds no request: {remedy}"
    empty.write_bytes(b'{"prompt": "caf\xe9"}')
    assert fails(read_workload, empty) == f"{empty} is not UTF-8 at byte 15: save it as UTF-8 text"


def test_trace_entries_become_random_prompts(tmp_path):
    path = tmp_path / "t.json"
    path.write_text("[[5, 3], [7, 0, 2.5],\n [5, 3]]")
    first, second, third = make_requests(read_workload(path), vocab_size=100, lowest_random_token=90)
    assert [len(r.prompt_token_ids) for r in (first, second, third)] == [5, 7, 5]
    assert all(90 <= token < 100 for token in first.prompt_token_ids + second.prompt_token_ids)
    assert first.prompt_token_ids != third.prompt_token_ids
    assert [(r.sampling.max_tokens, r.sampling.ignore_eos) for r in (first, second)] == [(3, True), (1, True)]
    assert [r.arrival_s for r in (first, second)] == [0.0, 2.5]
    assert [r.request_id for r in (first, second, third)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[5, 3], [5]]", "[1]: [5] is no entry: give [prompt_tokens, output_tokens(, arrival_s)]"),
        ("[[5, 3, 1, 1]]", "[0]: [5, 3, 1, 1] is no entry: give [prompt_tokens, output_tokens(, arrival_s)]"),
        ("[4]", "[0]: 4 is no entry: give [prompt_tokens, output_tokens(, arrival_s)]"),
        ("[[0, 3]]", "[0]: prompt_tokens is 0: give a whole number of at least 1"),
        ("[[5, -3]]", "[0]: output_tokens is -3: give a whole number of at least 0"),
        ("[[5, 3, -0.5]]", "[0]: arrival_s is -0.5: give a number of at least 0"),
        (
            "[[5, 3],\n[5, 3]",
            ": no JSON at line 2 column 7 (expecting ',' delimiter): write [[prompt_tokens, output_tokens], ...]",
        ),
    ],
)
def test_a_bad_trace_is_named(tmp_path, text, message):
    path = tmp_path / "t.json"
    path.write_text(text)
    assert fails(read_workload, path) == f"{path}{message}"


def test_made_up_requests_are_equal_but_for_their_tokens():
    requests = make_requests(make_workload(4, 6, 9), tokenizer=None, lowest_random_token=10)
    assert [len(request.prompt_token_ids) for request in requests] == [6] * 4
    assert len({request.prompt_token_ids for request in requests}) == 4
    assert len({request.sampling.seed for request in requests}) == 4
    assert {request.arrival_s for request in requests} == {0.0}
    assert {(r.sampling.max_tokens, r.sampling.ignore_eos) for r in requests} == {(9, True)}
    assert min(min(request.prompt_token_ids) for request in requests) >= 10
    assert requests == make_requests(make_workload(4, 6, 9), tokenizer=None, lowest_random_token=10)
    other = make_requests(make_workload(4, 6, 9), tokenizer=None, seed=1)
    assert not {r.prompt_token_ids for r in requests} & {r.prompt_token_ids for r in other}
    assert not {r.sampling.seed for r in requests} & {r.sampling.seed for r in other}


def test_poisson_arrivals_replace_those_of_the_file():
    items = make_workload(4000, 1, 1)
    arrivals = [item.arrival_s for item in with_poisson_arrivals(items, rate=8.0, seed=3)]
    gaps = [b - a for a, b in zip([0.0, *arrivals], arrivals, strict=False)]
    assert min(gaps) > 0
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.05)  # of an exponential: its mean
    assert arrivals == [item.arrival_s for item in with_poisson_arrivals(items, rate=8.0, seed=3)]
    assert arrivals != [item.arrival_s for item in with_poisson_arrivals(items, rate=8.0, seed=4)]


def item(**fields: Any) -> WorkloadItem:
    return WorkloadItem("r", "w:1", **({"prompt_token_ids": (1, 2, 3)} | fields))


def test_seeds_are_derived_unless_given():
    given_seed, derived = make_requests([item(sampling={"seed": 5}), item()], seed=9)
    assert given_seed.sampling.seed == 5
    assert derived.sampling.seed == derive_seed(9, "r")
    assert derive_seed(9, "r") != derive_seed(9, "s") != derive_seed(8, "r")
    assert derive_seed(0, "0") == 2928822574489494037  # by coreutils: printf 0/0 | b2sum -l 64


def test_only_a_max_tokens_that_was_given_has_to_fit():
    defaults = SamplingParams(max_tokens=50, temperature=0.7)
    capped, whole, given_fits = make_requests(
        [item(), item(prompt_token_ids=(1,)), item(sampling={"max_tokens": 7})],
        defaults=defaults,
        max_row_tokens=50,
    )
    assert [r.sampling.max_tokens for r in (capped, whole, given_fits)] == [47, 49, 7]
    assert make_requests([item()], defaults=defaults, max_row_tokens=53)[0].sampling.max_tokens == 50
    assert capped.sampling.temperature == 0.7


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        (
            {"sampling": {"max_tokens": 62}},
            {},
            "3 prompt tokens and max_tokens 62 need 65 of a row's 64 tokens: "
            "lower max_tokens to 61, or use longer rows",
        ),
        (
            {},
            {"max_row_tokens": 3},
            "3 prompt tokens leave no room for output in a row of 3 tokens: "
            "shorten the prompt to at most 2, or use longer rows",
        ),
        (
            {"sampling": {"min_tokens": 14}},
            {"max_row_tokens": 13},
            "min_tokens is 14: give at most max_tokens, which is 10",
        ),
        ({}, {"vocab_size": 3}, "token 3 in prompt is outside the vocabulary: give ids from 0 to 2"),
        (
            {"sampling": {"logit_bias": ((5, 1.0),)}},
            {"vocab_size": 5},
            "token 5 in logit_bias is outside the vocabulary: give ids from 0 to 4",
        ),
        (
            {"sampling": {"bad_words_ids": ((1, 2), (1, 7))}},
            {"vocab_size": 5},
            "token 7 in bad_words is outside the vocabulary: give ids from 0 to 4",
        ),
        (
            {"sampling": {"stop_token_ids": (9,)}},
            {"vocab_size": 5},
            "token 9 in stop_token_ids is outside the vocabulary: give ids from 0 to 4",
        ),
        (
            {"prompt_token_ids": None, "prompt": "a"},
            {"tokenizer": None},
            "a text prompt needs a tokenizer and this model has none: give prompt_token_ids",
        ),
        (
            {"sampling": {"stop": ("a",)}},
            {"tokenizer": None},
            "a stop string needs a tokenizer and this model has none: give stop_token_ids",
        ),
        (
            {"bad_words": ("a",)},
            {"tokenizer": None},
            "a bad word needs a tokenizer and this model has none: give bad_words_ids",
        ),
        (
            {"prompt_token_ids": None, "messages": ({"role": "assistant", "content": "a"},)},
            {},
            "this template wants a user first",
        ),
    ],
)
def test_requests_that_cannot_be_served_are_named(fields, options, message):
    assert fails(make_requests, [item(**fields)], **options) == f"w:1: {message}"


lines_strategy = st.fixed_dictionaries(
    {"prompt_token_ids": st.lists(st.integers(0, 999), min_size=1, max_size=8)},
    optional={
        "arrival_s": st.floats(0, 1e9),
        "max_tokens": st.integers(5, 40),
        "min_tokens": st.integers(0, 5),
        "temperature": st.floats(0, 100),
        "top_k": st.integers(0, 2000),
        "top_p": st.floats(0, 1, exclude_min=True),
        "repetition_penalty": st.floats(0, 10, exclude_min=True),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "ignore_eos": st.booleans(),
        "logprobs": st.integers(0, 20),
        "seed": st.integers(-(2**63), 2**64 - 1),
        "stop": st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=3),
        "logit_bias": st.dictionaries(st.integers(0, 999).map(str), st.floats(-100, 100), max_size=3),
    },
)


@settings(max_examples=100, deadline=None)
@given(st.lists(lines_strategy, min_size=1, max_size=4), st.booleans())
def test_what_is_written_is_what_is_served(tmp_path_factory, lines, ascii_only):
    path = tmp_path_factory.getbasetemp() / "round-trip.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=ascii_only) for line in lines), encoding="utf-8")
    requests = make_requests(read_workload(path))
    assert [request.request_id for request in requests] == [str(index) for index in range(len(lines))]
    for line, request in zip(lines, requests, strict=True):
        assert list(request.prompt_token_ids) == line.pop("prompt_token_ids")
        assert request.arrival_s == line.pop("arrival_s", 0.0)
        expected = {"seed": derive_seed(0, request.request_id), **line, "stop": tuple(line.get("stop", ()))}
        expected["logit_bias"] = tuple(sorted((int(k), v) for k, v in line.get("logit_bias", {}).items()))
        assert request.sampling == SamplingParams(**expected)


def test_planning_needs_no_torch():
    code = "import sys, dejavu.planning.workload; sys.exit(bool({'torch', 'numpy', 'mpi4py'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
