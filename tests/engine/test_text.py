"""Stop strings and held-back text, against a naive model that looks at the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dejavu.engine.text import TextWatch


class Pieces:
    """Stand in for a detokenizer: token i is the i-th piece."""

    def __init__(self, pieces, rest=""):
        self.pieces, self.rest = pieces, rest

    def push(self, token_id):
        return self.pieces[token_id]

    def flush(self):
        return self.rest


def watch_all(pieces, stop):
    watch = TextWatch(Pieces(pieces), stop)
    shown = ""
    for token in range(len(pieces)):
        piece, stopped = watch.push(token)
        shown += piece
        assert watch.text == shown
        if stopped:
            return shown + watch.finish(), True
    return shown + watch.finish(), False


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_shows_all_text_up_to_the_first_stop_string(pieces, stop):
    shown, stopped = watch_all(pieces, stop)
    text = ""
    for piece in pieces:
        text += piece
        positions = [text.find(s) for s in stop if s in text]
        if positions:
            assert (shown, stopped) == (text[: min(positions)], True)
            return
    assert (shown, stopped) == (text, False)


def test_holds_back_only_what_may_become_a_stop_string():
    watch = TextWatch(Pieces(["Hello.", "\n", "No", "\n\n", "x"]), ["\n\n"])
    assert [watch.push(t) for t in range(4)] == [("Hello.", False), ("", False), ("\nNo", False), ("", True)]
    assert watch.text == "Hello.\nNo"


def test_rest_of_the_detokenizer_counts():
    watch = TextWatch(Pieces(["a"], rest="END tail"), ["END"])
    assert watch.push(0) == ("a", False)
    assert watch.finish() == ""
    assert watch.text == "a"


@pytest.mark.parametrize("may_stop", [True, False])
def test_stop_strings_wait_for_min_tokens(may_stop):
    watch = TextWatch(Pieces(["a.", "b"]), ["."])
    assert watch.push(0, may_stop) == (("a", True) if may_stop else ("a.", False))
