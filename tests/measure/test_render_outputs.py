"""How generated texts are drawn: every width, hostile texts, many requests."""

import io

import pytest
from rich.console import Console

from dejavu.measure.ended import output
from dejavu.measure.render import MOST_OUTPUTS, render_outputs
from dejavu.request import Completion, FinishReason, Request


def completion(request_id, text, reason=FinishReason.STOP):
    return Completion(Request(request_id, (1, 2)), text=text, finish_reason=reason)


def drawn(completions, width=80):
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=True, color_system=None).print(
        render_outputs([output(each) for each in completions], len(completions))
    )
    return file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_texts_are_whole_or_cut_and_stay_in_the_width(width):
    lines = drawn([completion("capital", "It is\n\n  Paris."), completion("long", "word " * 200)], width).splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.split() == ["capital", "stop", "It", "is", "Paris."] for line in lines)
    assert len(lines) < 10
    assert "word…" in " ".join(lines)


def test_a_text_can_neither_steer_the_terminal_nor_write_markup():
    text = drawn([completion("[bold]id\x1b]0;x\x07", "a\x1b[2Jb\rc [red]d[/red]\x9b1m")])
    assert not {"\x1b", "\r", "\x07", "\x9b"} & set(text)
    assert "[bold]id" in text
    assert "[red]d[/red]" in text


def test_many_requests_end_with_their_number():
    text = drawn([completion(str(number), "yes") for number in range(MOST_OUTPUTS + 30)])
    assert "and 30 more" in text
    assert text.count("yes") == MOST_OUTPUTS


def test_an_unfinished_request_and_one_without_text():
    text = drawn([completion("a", "", None), completion("b", None)])
    assert "a" in text.split()
    assert "b" not in text.split()
