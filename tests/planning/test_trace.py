"""Check that every published form of trace is read, written back the same, and refused in one clear line."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from dejavu.errors import UsageError, WorkloadError
from dejavu.planning.lengths import Lengths
from dejavu.planning.trace import (
    TraceEntry,
    gaps,
    guess_form,
    histogram,
    make_lmsys_like,
    read_lengths,
    read_trace,
    with_rate,
    write_trace,
)
from dejavu.planning.workload import read_workload


def count_words(text):
    return len(text.split())


CHATS = [
    {"id": "a", "conversations": [{"from": "human", "value": "one two three"}, {"from": "gpt", "value": "four five"}]},
    {"id": "b", "conversations": [{"from": "gpt", "value": "no question"}, {"from": "human", "value": "x"}]},
    {"id": "c", "conversations": [{"from": "human", "value": "alone"}]},
]
TURNS = [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four five"}]
WANTED = [TraceEntry(Lengths(3, 2, 0.0), "one two three")]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_sharegpt(tmp_path):
    path = write(tmp_path / "chats.json", json.dumps(CHATS))
    assert guess_form(path) == "sharegpt"
    assert read_trace(path, count_tokens=count_words) == WANTED


@pytest.mark.parametrize("as_lines", [True, False])
def test_lmsys_json(tmp_path, as_lines):
    chat = {"conversation_id": "x", "model": "m", "conversation": TURNS}
    path = write(tmp_path / "lmsys.json", json.dumps(chat) + "\n" if as_lines else json.dumps([chat]))
    assert guess_form(path) == "lmsys"
    assert read_trace(path, count_tokens=count_words) == WANTED


def test_lmsys_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(WorkloadError, match="needs pyarrow: `pip install pyarrow`"):
        read_trace(write(tmp_path / "chats.parquet", "PAR1"), count_tokens=count_words)


def test_lmsys_parquet(tmp_path, monkeypatch):
    """A stand-in for pyarrow, which the tests do not install: what its table gives is all that is used."""

    def read_table(path, columns):
        assert columns == ["conversation"]
        return SimpleNamespace(to_pylist=lambda: [{"conversation": TURNS}])

    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", SimpleNamespace(read_table=read_table))
    assert read_trace(tmp_path / "chats.parquet", count_tokens=count_words) == WANTED


def test_azure(tmp_path):
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
        "2023-11-16 18:16:46,1,0\n"
    )
    entries = read_lengths(write(tmp_path / "azure.csv", text))
    assert [entry[:2] for entry in entries] == [(374, 44), (396, 109), (1, 0)]
    assert [entry.arrival_s for entry in entries] == pytest.approx([0, 4.314579, 59.31941], abs=1e-5)


def test_azure_2024_with_time_zone(tmp_path):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.5+00:00,5,6\n2024-05-10 00:00:02+00:00,7,8\n"
    assert read_lengths(write(tmp_path / "a.csv", text)) == [Lengths(5, 6, 0.0), Lengths(7, 8, 1.5)]


def test_mooncake(tmp_path):
    text = '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0]}\n'
    text += '{"timestamp": 3052, "input_length": 2, "output_length": 3, "hash_ids": []}\n'
    path = write(tmp_path / "mooncake.jsonl", text)
    assert guess_form(path) == "mooncake"
    assert read_lengths(path) == [Lengths(6758, 500, 0.0), Lengths(2, 3, 3.052)]


def test_text(tmp_path):
    path = write(tmp_path / "prompts.txt", "one two\n\n  three four five  \n")
    entries = read_trace(path, count_tokens=count_words, output_len=9)
    assert entries == [TraceEntry(Lengths(2, 9), "one two"), TraceEntry(Lengths(3, 9), "three four five")]


def test_own_forms_come_back(tmp_path):
    entries = [TraceEntry(Lengths(3, 2, 0.25), "one two three"), TraceEntry(Lengths(1, 5, 1.5), "x")]
    for name in ("out.json", "out.jsonl"):
        write_trace(tmp_path / name, entries)
        assert read_lengths(tmp_path / name, count_tokens=count_words) == [entry.lengths for entry in entries]
    items = read_workload(tmp_path / "out.jsonl")
    assert [item.prompt for item in items] == ["one two three", "x"]
    assert json.loads((tmp_path / "out.json").read_text()) == [[3, 2, 0.25], [1, 5, 1.5]]


def test_lengths_of_prompts_in_tokens(tmp_path):
    path = write(tmp_path / "w.jsonl", '{"prompt_token_ids": [5, 6, 7], "max_tokens": 4}\n{"prompt_token_ids": [1]}\n')
    assert read_lengths(path, output_len=11) == [Lengths(3, 4), Lengths(1, 11)]


def test_limit(tmp_path):
    path = write(tmp_path / "t.json", "[[1, 2], [3, 4], [5, 6]]")
    assert read_lengths(path, limit=2) == [Lengths(1, 2), Lengths(3, 4)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens\n", "a.csv:1: no column GeneratedTokens"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,2\n", "a.csv:2: TIMESTAMP 'noon'"),
        (
            "a.csv",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,1,x\n",
            "a.csv:2: GeneratedTokens 'x'",
        ),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,-1,2\n", "a.csv:2: -1 prompt"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
        ("m.jsonl", '{"timestamp": 0, "input_length": 3}\n', "m.jsonl:1: output_length None"),
        ("m.jsonl", '{"timestamp": 0, "input_length": 3, "output_length": 1}\n{oops\n', "m.jsonl:2: no JSON"),
        ("m.jsonl", '{"timestamp": 0, "input_length": 3, "output_length": 1}\n7\n', "m.jsonl:2: no object"),
        ("c.json", '[{"conversations": "x"}]', r"c.json\[0\]: no list 'conversations'"),
        ("c.json", '[{"conversations": [{"from": "human"}, {"from": "gpt"}]}]', "a turn without text in 'value'"),
        ("t.json", "[[1, 2], [3]]", r"t.json\[1\]"),
        ("t.json", "[[1, -2]]", r"t.json\[0\]"),
    ],
)
def test_malformed(tmp_path, name, text, message):
    with pytest.raises(WorkloadError, match=message) as caught:
        read_trace(write(tmp_path / name, text), count_tokens=count_words)
    assert "\n" not in str(caught.value)


def test_text_needs_a_tokenizer(tmp_path):
    with pytest.raises(WorkloadError, match="--model"):
        read_trace(write(tmp_path / "p.txt", "hello"))


def test_missing_file(tmp_path):
    with pytest.raises(WorkloadError, match=r"cannot read .*nothing\.csv"):
        read_trace(tmp_path / "nothing.csv")


def test_lengths_alone_make_no_prompts(tmp_path):
    with pytest.raises(UsageError, match="lengths and no prompts"):
        write_trace(tmp_path / "x.jsonl", [TraceEntry(Lengths(1, 2))])
    with pytest.raises(UsageError, match="no known form"):
        write_trace(tmp_path / "x.txt", [TraceEntry(Lengths(1, 2))])
    assert list(tmp_path.iterdir()) == []


def test_lmsys_like_is_seeded_and_has_the_published_means():
    entries = [entry.lengths for entry in make_lmsys_like(40_000, seed=3, rate=5.0)]
    assert [entry.lengths for entry in make_lmsys_like(40_000, seed=3, rate=5.0)] == entries
    assert [entry.lengths for entry in make_lmsys_like(40_000, seed=4, rate=5.0)] != entries
    # the longest are cut, which takes a few per cent off the means 69.5 and 214.5
    assert np.mean([entry.prompt_tokens for entry in entries]) == pytest.approx(69.5, rel=0.07)
    assert np.mean([entry.output_tokens for entry in entries]) == pytest.approx(214.5, rel=0.07)
    logs = np.log([entry.output_tokens for entry in entries])
    assert np.std(logs) == pytest.approx(1.0, rel=0.05)
    assert np.mean(gaps(entries)) == pytest.approx(0.2, rel=0.03)


def test_rate_keeps_order_and_prompts():
    entries = with_rate([TraceEntry(Lengths(i, 1, 9.0), str(i)) for i in range(1, 500)], 4.0, seed=1)
    arrivals = [entry.lengths.arrival_s for entry in entries]
    assert arrivals == sorted(arrivals)
    assert [entry.prompt for entry in entries] == [str(i) for i in range(1, 500)]
    assert np.mean(np.diff(arrivals)) == pytest.approx(0.25, rel=0.15)


def test_histogram_counts_everything():
    values = [0, 0, 1, 2, 2.5, 40, 1000]
    bins = histogram(values, 6)
    assert bins[0].count == 2
    assert sum(each.count for each in bins) == len(values)
    ratios = {round(each.high / each.low, 6) for each in bins[1:]}
    assert len(ratios) == 1
    for each in bins[1:-1]:
        assert each.count == sum(each.low <= value < each.high for value in values)
    assert histogram([7, 7]) == [histogram([7, 7])[0]]
    assert histogram([7, 7])[0].count == 2
    assert math.isclose(bins[-1].high, 1000)


@pytest.mark.parametrize(("count", "rate"), [(0, 0.0), (5, -1.0)])
def test_impossible_traces(count, rate):
    with pytest.raises(UsageError):
        make_lmsys_like(count, rate=rate)
