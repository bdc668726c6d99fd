"""A person at a terminal sees bars; a log gets a line every few seconds, also while a study has no news."""

import io
import re

import pytest
import tiny_studies
from rich.console import Console

from experiments import progress
from experiments.results import Progress


@pytest.mark.parametrize(
    ("seconds", "done", "left"),
    [
        (30.0, 0.25, "1:30 left"),
        (10.0, 0.999, "0:00 left"),
        (1e2, 0.01, "2:45:00 left"),
        (9.0, 1.0, "0:00 left"),
        (9.0, 0.0, ""),
    ],
)
def test_the_time_left_is_that_at_the_mean_speed(seconds, done, left):
    assert progress.time_left(seconds, done) == left


def shown(monkeypatch, work, width=100, output=None, **options):
    output = output or io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=output, width=width, **options))
    with progress.shown(["one", "two"]) as update:
        work(update)
    return output.getvalue()


def test_a_log_tells_beginnings_and_ends(monkeypatch):
    def work(update):
        for study in ("one", "two"):
            for done in (0.0, 0.25, 0.5, 1.0):
                update(study, Progress(done, f"[note] at {done}"))

    assert shown(monkeypatch, work).splitlines() == [
        "one: 0%, [note] at 0.0",
        "one: 100%, [note] at 1.0",
        "two: 0%, [note] at 0.0",
        "two: 100%, [note] at 1.0",
    ]


def test_a_log_repeats_the_state_while_there_is_no_news(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    output = io.StringIO()

    def work(update):
        update("one", Progress(0.0, "starting"))
        update("one", Progress(0.5, "compiling"))
        tiny_studies.wait_until(lambda: output.getvalue().count("compiling") >= 2)

    lines = shown(monkeypatch, work, output=output).splitlines()
    assert lines[0] == "one: 0%, starting"
    # The beginning may be repeated too, before there is other news.
    assert all(re.match(r"one: (0%, starting|50%, \d:\d\d left, compiling)$", line) for line in lines)


def test_a_terminal_shows_a_bar_a_study(monkeypatch):
    def work(update):
        update("one", Progress(1.0, "finished [fully]"))
        update("two", Progress(0.5, "halfway"))

    text = shown(monkeypatch, work, force_terminal=True, _environ={"TERM": "xterm"})
    last = text[text.rindex("one") :]
    for part in ("━", "100%", "finished [fully]", "two", "50%", "left", "halfway"):
        assert part in last


@pytest.mark.parametrize("width", [32, 40, 50, 80])
def test_a_narrow_terminal_keeps_what_counts(monkeypatch, width):
    def work(update):
        update("one", Progress(0.0, "starting"))
        update("one", Progress(0.25, "arm A, momentum, 1234567 steps and more words than there is room for"))

    text = shown(monkeypatch, work, width, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})
    line = re.findall("one .*", text)[-1]
    assert re.match(r"one  25% \d:\d\d left .*arm?.*…", line)
    assert len(line.rstrip()) <= width


def test_a_terminal_that_cannot_move_its_cursor_gets_a_log(monkeypatch):
    text = shown(
        monkeypatch,
        lambda update: update("one", Progress(0.0, "starting")),
        force_terminal=True,
        _environ={"TERM": "dumb"},
    )
    assert text == "one: 0%, starting\n"
