"""The text of one request as its tokens come: what may be shown already, and whether a stop string ended it."""

from collections.abc import Callable, Sequence
from typing import Protocol


class TokenStream(Protocol):
    """Turn tokens into text one by one."""

    def push(self, token_id: int) -> str:
        """Give the text that is certain after one more token."""

    def flush(self) -> str:
        """Give what was held back."""


class TextWatch:
    """Follow a request's text; hold back what could be the beginning of a stop string.

    `text` is what may be shown: it never includes a stop string, and never shrinks.
    """

    def __init__(self, stream: TokenStream, stop: Sequence[str]) -> None:
        self.stream = stream
        self.stop = tuple(s for s in stop if s)
        self.text = ""
        self.held = ""

    def push(self, token_id: int, may_stop: bool = True) -> tuple[str, bool]:
        """Take a token; give the text that can now be shown, and whether a stop string was completed.

        With `may_stop` false (before a request's `min_tokens`) the text so far is shown, whatever it holds.
        """
        return self.take(self.stream.push(token_id), self.stop if may_stop else ())

    def finish(self) -> str:
        """End the request; give the rest of its text."""
        shown, stopped = self.take(self.stream.flush(), self.stop)
        if stopped:
            return shown
        rest, self.held = self.held, ""
        self.text += rest
        return shown + rest

    def take(self, piece: str, stop: Sequence[str]) -> tuple[str, bool]:
        """Add new text to what is held, and split that into what can be shown and what cannot yet."""
        pending = self.held + piece
        found = [position for s in stop if (position := pending.find(s)) >= 0]
        cut = min(found) if found else len(pending) - longest_beginning(pending, stop)
        shown, self.held = pending[:cut], "" if found else pending[cut:]
        self.text += shown
        return shown, bool(found)


def longest_beginning(text: str, stop: Sequence[str]) -> int:
    """Give the length of the longest end of `text` that begins a stop string."""
    lengths = range(min(len(text), max(map(len, stop), default=0)), 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in stop)), 0)


StreamFactory = Callable[[], TokenStream]
