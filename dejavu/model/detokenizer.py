"""Turn a stream of tokens into text piece by piece, so that the pieces together are the text of all tokens."""

import codecs
import re
from typing import Any, Protocol


class Detokenizer(Protocol):
    """Give the text of a sequence that grows by one token at a time; never a part of a character."""

    def push(self, token_id: int) -> str:
        """Take the next token; give the text that is certain now, often one word, "" within a character."""

    def flush(self) -> str:
        """Give what is still held back, with U+FFFD for an unfinished character; ends the stream."""


def make_detokenizer(backend: Any, hidden_ids: frozenset[int]) -> Detokenizer:
    """Make a detokenizer for the `tokenizers.Tokenizer` `backend`; the tokens `hidden_ids` give no text."""
    if type(backend.decoder).__name__ == "ByteLevel":
        return ByteLevelDetokenizer(backend, hidden_ids)
    return PieceDetokenizer(backend, hidden_ids)


def byte_alphabet() -> dict[str, int]:
    """Give the byte that each character of GPT-2's alphabet stands for: itself where printable, else shifted up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_ALPHABET = byte_alphabet()


class ByteLevelDetokenizer:
    """Detokenize a byte-level vocabulary: tokens are bytes, and their concatenation is UTF-8."""

    __slots__ = ("_backend", "_hidden_ids", "_utf8")

    def __init__(self, backend: Any, hidden_ids: frozenset[int]) -> None:
        self._backend = backend
        self._hidden_ids = hidden_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take the next token; give the characters that it completes."""
        token = None if token_id in self._hidden_ids else self._backend.id_to_token(token_id)
        return "" if token is None else self._utf8.decode(_token_bytes(token))

    def flush(self) -> str:
        """Give U+FFFD for a character whose last bytes never came, else ""."""
        return self._utf8.decode(b"", final=True)


def _token_bytes(token: str) -> bytes:
    """Give a token's bytes; one with a character outside the alphabet is an added token, written as it is."""
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:
        return token.encode()


class PieceDetokenizer:
    """Detokenize a vocabulary of text pieces, where single bytes are written `<0x0A>` (SentencePiece).

    The library decodes a run of bytes as a whole, so such a run is held until another piece ends it. A piece's text may
    depend on its being the first, so each is decoded behind one that was given out already.
    """

    __slots__ = ("_anchor", "_backend", "_held", "_hidden_ids")

    def __init__(self, backend: Any, hidden_ids: frozenset[int]) -> None:
        self._backend = backend
        self._hidden_ids = hidden_ids
        self._anchor: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """Take the next token; give its text, behind that of the bytes held so far; "" for a byte."""
        token = None if token_id in self._hidden_ids else self._backend.id_to_token(token_id)
        if not token:
            return ""
        self._held.append(token_id)
        return "" if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else self.flush()

    def flush(self) -> str:
        """Give the text of the bytes that are held."""
        if not self._held:
            return ""
        known = self._backend.decode(self._anchor, skip_special_tokens=False)
        text = self._backend.decode(self._anchor + self._held, skip_special_tokens=False)
        self._anchor, self._held = self._held[-1:], []
        return str(text[len(known) :])
