"""Build a tokenizer from a GGUF file's metadata, as the model's own `tokenizer.json` describes it.

Sources: llama.cpp (`src/llama-vocab.cpp`: which pre-tokenizer a name stands for, defaults of flags that are absent)
and the published `tokenizer.json` of each family.
"""

from collections.abc import Mapping
from typing import Any

from dejavu.errors import ModelError
from dejavu.model.tokenizer import set_affixes

Metadata = Mapping[str, Any]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # values of tokenizer.ggml.token_type
_SPACE = "\u2581"

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_GPT2 = ("default", "gpt-2", "gpt2")
_DIGITS = ("smollm", "starcoder", "refact")  # GPT-2's, after every digit was set apart
_QWEN2 = ("qwen2", "deepseek-r1-qwen")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")


def build_tokenizer(metadata: Metadata) -> tuple[Any, dict[str, Any]]:
    """Build the `tokenizers.Tokenizer` and the `tokenizer_config.json` that the metadata describe.

    Raises ModelError for a kind of tokenizer, or of pre-tokenizer, that is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level_tokenizer, "llama": _sentencepiece_tokenizer}
    if kind not in builders:
        raise ModelError(
            f"GGUF tokenizer {kind!r} is not supported: use a file with one of {', '.join(builders)}, "
            f"or the model's own directory with tokenizer.json"
        )
    try:
        tokens = metadata["tokenizer.ggml.tokens"]
        tokenizer = builders[kind](metadata, tokens)
        config = _build_config(metadata, tokens)
    except ModelError:
        raise
    except Exception as error:  # the library raises bare Exception where merges and vocabulary disagree
        raise ModelError(f"the GGUF file's tokenizer is inconsistent ({error}): download it again") from error
    _add_marked_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type"))
    set_affixes(tokenizer, config)
    return tokenizer, config


def _build_config(metadata: Metadata, tokens: list[str]) -> dict[str, Any]:
    """Build `tokenizer_config.json`: special tokens, whether they are added to a text, and the chat template."""
    adds_bos = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)),
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            config[f"{name}_token"] = tokens[token_id]
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _add_marked_tokens(tokenizer: Any, tokens: list[str], types: list[int] | None) -> None:
    """Let the tokens that the file marks as control or user-defined be matched whole, before any splitting."""
    from tokenizers import AddedToken

    marked = list(zip(tokens, types or [], strict=False))
    for kind in (CONTROL, USER_DEFINED):
        special = kind == CONTROL
        chosen = [AddedToken(token, normalized=False, special=special) for token, type_ in marked if type_ == kind]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(chosen)


def _byte_level_tokenizer(metadata: Metadata, tokens: list[str]) -> Any:
    """Build a byte-level BPE: GPT-2's alphabet, this file's merges, its family's way to split a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _LLAMA3))
    tokenizer.pre_tokenizer = _byte_level_splitter(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre in _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _byte_level_splitter(pre: str) -> Any:
    """Build the pre-tokenizer that llama.cpp calls `pre`; raises ModelError for an unknown one."""
    from tokenizers import Regex, pre_tokenizers

    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _GPT2:
        return whole
    if pre in _DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    if pre not in (*_QWEN2, *_LLAMA3):
        known = ", ".join((*_GPT2, *_DIGITS, *_QWEN2, *_LLAMA3))
        raise ModelError(f"GGUF pre-tokenizer {pre!r} is not supported: use a file with one of {known}")
    split = Regex(_QWEN2_SPLIT if pre in _QWEN2 else _LLAMA3_SPLIT)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(split, behavior="isolated"), plain])


def _sentencepiece_tokenizer(metadata: Metadata, tokens: list[str]) -> Any:
    """Build a SentencePiece BPE with byte fallback, as Llama 2's `tokenizer.json` states it."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    types = metadata["tokenizer.ggml.token_type"]
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    merges = _merges_from_scores(vocab, metadata["tokenizer.ggml.scores"], types)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    prefix = [normalizers.Prepend(_SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_from_scores(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """List the merges that a scored vocabulary implies, best first: every way to cut a token into two others."""
    ranked = []
    for token, index in vocab.items():
        if types[index] != NORMAL:
            continue
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        ranked += [(scores[index], len(left), len(right), left, right) for left, right in known]
    ranked.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in ranked]
