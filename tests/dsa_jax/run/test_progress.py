import io

import pytest

from dsa_jax.run.progress import Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def after(self, seconds):
        self.now += seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def run(progress, clock, steps, *, first=0, seconds=1.0, tokens=500):
    for step in range(first + 1, first + steps + 1):
        clock.after(seconds)
        progress.update(step, tokens=tokens, values={"loss": 2.5})


def test_compile_step_is_reported_apart_and_not_in_the_rate(clock):
    stream = io.StringIO()
    progress = Progress("warmup", 100, stream=stream, clock=clock)
    run(progress, clock, 1, seconds=30.0)
    assert stream.getvalue() == "warmup 1/100, loss 2.5000, compiled in 30 s\n"
    run(progress, clock, 4, first=1)
    timing = progress.timing()
    assert timing == (5, 4.0, 30.0, 2500, 2000, 500.0)
    assert progress.line() == "warmup 5/100, loss 2.5000, 500 tokens/s, 1:35 min left"


def test_flagged_recompilation_is_kept_out_too(clock):
    progress = Progress("pretrain", 10, stream=io.StringIO(), clock=clock)
    run(progress, clock, 3)
    clock.after(20)
    progress.update(4, tokens=500, compiled=True)
    assert progress.timing() == (4, 2.0, 21.0, 2000, 1000, 500.0)


def test_plain_lines_do_not_flood(clock):
    stream = io.StringIO()
    progress = Progress("sparse", 1000, stream=stream, clock=clock, every_seconds=10)
    run(progress, clock, 1000, seconds=0.05)
    lines = stream.getvalue().splitlines()
    assert 5 <= len(lines) <= 8
    assert lines[-1].startswith("sparse 1000/1000") and "left" not in lines[-1]
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_time_left_counts_tokens_where_steps_grow(clock):
    progress = Progress("pretrain", 4, tokens_left=lambda done: 5000 - 1000 * done, stream=io.StringIO(), clock=clock)
    for step in (1, 2):
        clock.now += 2.0
        progress.update(step, tokens=1000)
    assert progress.line() == "pretrain 2/4, 500 tokens/s, 6.0 s left"


def test_time_left_counts_from_the_resumed_step(clock):
    progress = Progress("sparse", 100, start_step=90, stream=io.StringIO(), clock=clock)
    assert progress.line() == "sparse 90/100"
    run(progress, clock, 3, first=90)
    assert progress.line().endswith("7.0 s left")


def test_pause_leaves_time_out(clock):
    progress = Progress("sparse", 100, stream=io.StringIO(), clock=clock)
    run(progress, clock, 2)
    clock.after(1000)
    progress.pause()
    run(progress, clock, 1, first=2)
    assert progress.timing().seconds == 2.0


def test_mfu_only_where_known(clock):
    """2e11 operations a second."""
    lines = []
    for peak, flops in ((4e11, 2e11), (None, 2e11), (4e11, None)):
        progress = Progress("sparse", 100, stream=io.StringIO(), clock=clock, peak_flops=peak)
        for step in range(1, 4):
            clock.after(1)
            progress.update(step, tokens=10, flops=flops)
        lines.append(progress.line())
    assert "MFU 50.0%" in lines[0] and not any("MFU" in line for line in lines[1:])


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.0000"), (3.14159, "3.1416"), (1.5e-5, "1.50e-05"), (float("nan"), "nan"), (-2.0, "-2.0000")]
)
def test_values_are_readable_and_kept(clock, value, text):
    progress = Progress("sparse", 100, stream=io.StringIO(), clock=clock)
    progress.update(1, tokens=1, values={"kl": value})
    progress.update(2, tokens=1)
    assert f"kl {text}" in progress.line()


def test_terminal_redraws_one_line(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with Progress("sparse", 1000, stream=stream, clock=clock) as progress:
        run(progress, clock, 999, seconds=0.01)
    text = stream.getvalue()
    assert text.count("sparse") < 80
    assert "sparse 999/1000, loss 2.5000" in text


def test_dumb_terminal_gets_plain_lines(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress("sparse", 2, stream=stream, clock=clock) as progress:
        run(progress, clock, 2)
    assert "\x1b" not in stream.getvalue() and stream.getvalue().endswith("tokens/s\n")


def test_a_stage_without_steps_prints_nothing(clock):
    stream = io.StringIO()
    with Progress("sparse", 0, stream=stream, clock=clock) as progress:
        assert progress.timing().tokens_per_second is None
    assert stream.getvalue() == ""


def test_tokens_seen_are_those_of_the_whole_stage():
    progress = Progress("sparse", 100, start_step=90, stream=io.StringIO(), clock=lambda: 0.0)
    progress.update(91, tokens=64, seen=5_824_000)
    assert progress.line() == "sparse 91/100, 5.8M tokens"
    progress.extend(120)
    assert progress.line() == "sparse 91/120, 5.8M tokens"
    progress.update(92, tokens=64)
    assert progress.line() == "sparse 92/120"
