"""Compare tokenizers with transformers' chat templates, with hand-made splits, and with naive reference algorithms."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.errors import ModelError, UsageError
from dejavu.model.detokenizer import byte_alphabet
from dejavu.model.gguf_tokenizer import build_tokenizer
from dejavu.model.tokenizer import Tokenizer, load_tokenizer

SPECIALS = ["<s>", "</s>", "<unk>"]
BYTE_LEVEL_MERGES = ["Ġ a", "b c", "Ġa bc", "ð Ł", "ðŁ ĺ", "Ã ©", "æĹ ¥", "æ Ĺ", "1 2", "12 3"]
SENTENCEPIECE = {  # each piece can be cut in one way only, so that leftmost-best and ranked merges agree
    **dict.fromkeys("▁abcdefé日", -100.0),
    "bc": -1.0,
    "▁a": -2.0,
    "▁abc": -3.0,
    "de": -4.0,
    "def": -5.0,
    "cde": -6.0,
    "▁▁": -7.0,
}


def byte_level_metadata(pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    merged = [merge.replace(" ", "") for merge in BYTE_LEVEL_MERGES]
    tokens = [*SPECIALS, *byte_alphabet(), *merged, "<tool> 😀"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 4) + [4],
        "tokenizer.ggml.merges": sorted(BYTE_LEVEL_MERGES, key=len),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **changes,
    }


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *byte_tokens, *SENTENCEPIECE],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(SENTENCEPIECE),
        "tokenizer.ggml.scores": [0.0] * 259 + list(SENTENCEPIECE.values()),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **changes,
    }


def save(directory: Path, metadata: dict[str, Any]) -> Path:
    backend, config = build_tokenizer(metadata)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def load(directory: Path) -> Tokenizer:
    loaded = load_tokenizer(directory)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Tokenizer:
    return load(save(tmp_path_factory.mktemp("byte_level"), byte_level_metadata()))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    return load(save(tmp_path_factory.mktemp("sentencepiece"), sentencepiece_metadata()))


ids_of_byte_level = st.lists(st.integers(0, 275), max_size=40)  # a few beyond the vocabulary
ids_of_sentencepiece = st.lists(st.integers(0, 280) | st.integers(3 + 0xC0, 3 + 0xF0), max_size=40)


def check_stream(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    stream = tokenizer.stream(skip_special_tokens=skip)
    pieces = [stream.push(token) for token in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
    for piece in pieces:
        piece.encode()  # raises for half of a surrogate pair


@given(ids_of_byte_level, st.booleans())
@settings(max_examples=400, deadline=None)
def test_byte_level_stream_equals_decode(byte_level, ids, skip):
    check_stream(byte_level, ids, skip)


@given(ids_of_sentencepiece, st.booleans())
@settings(max_examples=400, deadline=None)
def test_sentencepiece_stream_equals_decode(sentencepiece, ids, skip):
    check_stream(sentencepiece, ids, skip)


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_text_survives_and_streams_without_broken_characters(byte_level, text):
    ids = byte_level.encode(text, add_special_tokens=False)
    stream = byte_level.stream(skip_special_tokens=False)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == text
    assert stream.flush() == ""
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_character_split_over_tokens_comes_whole(byte_level):
    ids = byte_level.encode("😀")
    assert len(ids) > 1
    stream = byte_level.stream()
    assert [stream.push(token) for token in ids] == [""] * (len(ids) - 1) + ["😀"]
    stream.push(ids[0])
    assert stream.flush() == "\ufffd"


def split_of(tokenizer: Tokenizer, text: str) -> list[str]:
    alphabet = byte_alphabet()
    pieces = [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]
    return [bytes(alphabet[character] for character in piece).decode() for piece in pieces]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["I", "'m", " 12345", " ", " x", "\n\n", " é", "!?", " ", " 7"]),
        ("smollm", ["I", "'m", " ", "1", "2", "3", "4", "5", " ", " x", "\n\n", " é", "!?", "  ", "7"]),
        ("qwen2", ["I", "'m", " ", "1", "2", "3", "4", "5", " ", " x", "\n\n", " é", "!?", " ", " ", "7"]),
        ("llama-bpe", ["I", "'m", " ", "123", "45", " ", " x", "\n\n", " é", "!?", " ", " ", "7"]),
    ],
)
def test_text_is_split_as_the_family_does(tmp_path, pre, expected):
    tokenizer = load(save(tmp_path, byte_level_metadata(pre)))
    assert split_of(tokenizer, "I'm 12345  x\n\n é!?  7") == expected


def test_smollm2_gives_the_published_ids():
    """Ids checked once against transformers' tokenizer of the same file with the published split."""
    from dejavu import assets
    from dejavu.model.gguf_reader import open_gguf

    try:
        path = assets.demo_model_file()
    except ModelError as error:
        pytest.skip(str(error))
    backend, config = build_tokenizer(open_gguf(path).metadata)
    tokenizer = Tokenizer(backend, chat_template=config["chat_template"])
    assert tokenizer.encode("Hello wörld 123  4") == [19556, 267, 29989, 400, 216, 33, 34, 35, 256, 36]
    assert tokenizer.chat("hi")[-10:] == [1, 4093, 198, 6004, 2, 198, 1, 520, 9531, 198]
    assert tokenizer.decode(tokenizer.chat("hi"), skip_special_tokens=False).startswith("<|im_start|>system\nYou are")


def naive_sentencepiece(text: str) -> list[int]:
    """Merge the best-scored adjacent pair, leftmost first, until none is left; then fall back to bytes."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        scored = [
            (SENTENCEPIECE[a + b], -at)
            for at, (a, b) in enumerate(itertools.pairwise(symbols))
            if a + b in SENTENCEPIECE
        ]
        if not scored:
            break
        at = -max(scored)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    order = list(SENTENCEPIECE)
    ids = []
    for symbol in symbols:
        ids += [259 + order.index(symbol)] if symbol in SENTENCEPIECE else [3 + byte for byte in symbol.encode()]
    return ids


@given(st.text("abcdef é日😀z", min_size=1, max_size=25))
@settings(max_examples=300, deadline=None)
def test_sentencepiece_merges_by_score_with_byte_fallback(sentencepiece, text):
    assert sentencepiece.encode(text) == [1, *naive_sentencepiece(text)]
    assert sentencepiece.decode(sentencepiece.encode(text)) == text


def test_begin_and_end_are_added_where_the_model_wants_them(tmp_path):
    metadata = byte_level_metadata() | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = load(save(tmp_path, metadata))
    plain = tokenizer.encode("abc", add_special_tokens=False)
    assert tokenizer.encode("abc") == [0, *plain, 1]
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.special_ids) == (0, 1, frozenset({0, 1, 2}))


TEMPLATES = [
    "{% for message in messages %}\n    {{- bos_token + message['role'] + '\n' + message['content'] + eos_token }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
    "{%- for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}"
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}\n{% endfor %}"
    "{% if tools is none and documents is none %}<none>{% endif %}{{ strftime_now('%%') }}",
]
CONVERSATION = [
    {"role": "system", "content": "Be <b>short</b> & 'kind'.  "},
    {"role": "user", "content": "été\n abc 12"},
    {"role": "assistant", "content": "ok</s>"},
    {"role": "user", "content": "日本"},
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("add_bos", [True, False])
def test_chat_equals_transformers(tmp_path, template, add_bos):
    from transformers import PreTrainedTokenizerFast

    metadata = byte_level_metadata(**{"tokenizer.chat_template": template, "tokenizer.ggml.add_bos_token": add_bos})
    tokenizer = load(save(tmp_path, metadata))
    peer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.encode("abc é") == peer.encode("abc é")
    for conversation in (CONVERSATION, "hi"):
        messages = [{"role": "user", "content": "hi"}] if conversation == "hi" else conversation
        expected = peer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokenizer.chat(conversation) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for x in range(999999999) %}{% endfor %}", "[Rr]ange"),
        ("{{ messages.append(1) }}", "unsafe|append"),
        ("{% if %}", "."),
    ],
)
def test_refusing_and_hostile_templates_are_usage_errors(byte_level, template, message):
    tokenizer = Tokenizer(byte_level.backend, chat_template=template)
    with pytest.raises(UsageError, match=message):
        tokenizer.chat("hi")


def test_model_without_chat_template_says_so(byte_level):
    with pytest.raises(UsageError, match="no chat template"):
        byte_level.chat("hi")


def test_template_of_its_own_file_comes_first(tmp_path):
    save(tmp_path, byte_level_metadata(**{"tokenizer.chat_template": "old"}))
    (tmp_path / "chat_template.jinja").write_text("new")
    assert load(tmp_path).render_chat("hi") == "new"


def test_vocabulary_and_merges_files_are_enough(tmp_path):
    """facebook/opt-* publish no tokenizer.json."""
    vocab = {token: index for index, token in enumerate([*SPECIALS, *byte_alphabet(), "bc", "Ġa"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nb c\nĠ a\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "</s>", "__type": "AddedToken"}, "add_bos_token": True})
    )
    tokenizer = load(tmp_path)
    assert tokenizer.encode("abc a</s>") == [1, vocab["a"], vocab["bc"], vocab["Ġa"], 1]
    assert tokenizer.decode(tokenizer.encode("abc a")) == "abc a"


def test_directory_without_a_tokenizer_gives_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_malformed_files_are_named(tmp_path, name):
    save(tmp_path, byte_level_metadata())
    (tmp_path / name).write_text("{")
    with pytest.raises(ModelError, match="download it again"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "t5.*gpt2, llama"),
        ({"tokenizer.ggml.pre": "viking"}, "viking.*smollm"),
        ({"tokenizer.ggml.merges": ["x yz"]}, "inconsistent"),
        ({"tokenizer.ggml.eos_token_id": 99999}, "inconsistent"),
    ],
)
def test_unsupported_gguf_tokenizers_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        build_tokenizer(byte_level_metadata(**changes))
