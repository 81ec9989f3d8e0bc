import io

from rich.console import Console

from dejavu.cluster.progress import LineDisplay, LiveDisplay, QuietDisplay, Status, TokenRate, describe, open_display

SERVING = Status("serving", 8, 3, 5, 0, tokens_out=90, elapsed_s=4.0, rows=8, busy_rows=5)


def test_rate_is_of_the_last_seconds_only():
    rate = TokenRate()
    for second in range(11):
        measured = rate.update(Status(elapsed_s=second, tokens_out=100 * min(second, 5)))
    assert measured == 0
    rate = TokenRate()
    assert rate.update(Status()) == 0
    assert rate.update(Status(elapsed_s=0.5, tokens_out=10)) == 20
    assert rate.update(Status(elapsed_s=0.5, tokens_out=10)) == 20


def test_line_says_what_the_status_holds():
    assert describe(SERVING, 42.26, 9.0) == "serving: 3/8 requests, 90 tokens, 42.3 tokens/s, 5/8 rows busy, 4 s"
    assert describe(Status("loading"), 0, 2.4) == "loading, 2 s"


def test_lines_come_with_news_only(capsys):
    display = LineDisplay()
    for status in (Status("loading"), Status("loading"), SERVING, SERVING):
        display.update(status)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(",")[0] for line in err.splitlines()] == ["loading", "serving: 3/8 requests"]


def test_live_display_draws_below_the_output():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    with LiveDisplay(console) as display:
        display.write("\x1b[32mgreen\x1b[0m " + "x" * 100)
        display.update(SERVING)
        display.progress.refresh()
    shown = file.getvalue()
    assert "3/8 requests" in shown
    assert "5/8 rows busy" in shown
    assert "green" in shown
    assert "x" * 100 in shown


def test_error_lines_go_to_stderr_where_that_is_elsewhere(capsys):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with LiveDisplay(console) as display:
        display.write("shown")
        display.write("rank 1: elsewhere", error=True)
    assert capsys.readouterr().err == "rank 1: elsewhere\n"
    assert "elsewhere" not in console.file.getvalue()
    assert "shown" in console.file.getvalue()


class Tty(io.StringIO):
    def isatty(self):
        return True


def test_display_suits_the_terminal():
    live, plain = Console(file=Tty(), force_terminal=True), Console(file=io.StringIO())
    colored_file = Console(file=io.StringIO(), force_terminal=True)
    assert isinstance(open_display(colored_file, progress=True), LineDisplay)
    assert isinstance(open_display(live, progress=True), LiveDisplay)
    assert isinstance(open_display(plain, progress=True), LineDisplay)
    assert type(open_display(live, progress=False)) is QuietDisplay
