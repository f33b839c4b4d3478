"""What a run shows while it works."""

import io
import time

import jax
import pytest
import rich.console

from msd_jax.io import compilations, console

EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(compilations, "A_MOMENT", -1.0)
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.02)


@pytest.fixture
def train_step():
    """A program that is being compiled."""
    compilations.listen()
    jax.monitoring.record_scalar(EVENT, time.time(), fun_name="jit(train_step)")
    yield
    jax.monitoring.record_event_duration_secs(EVENT, 1.0, fun_name="jit(train_step)")
    assert compilations.current() == ""


def test_jax_says_what_it_compiles(at_once):
    """By events that are no part of its documented API: this fails when they change."""
    compilations.listen()
    seen = []

    def look(event, value, **labels):
        if event == EVENT:
            seen.append(compilations.current())

    jax.monitoring.register_scalar_listener(look)

    def train_step(x):
        return x * 3

    try:
        jax.jit(train_step)(jax.numpy.ones(5))
    finally:
        jax.monitoring.unregister_scalar_listener(look)
    assert "compiling the train step, 0 s" in seen and compilations.current() == ""


def test_a_moment_is_not_worth_a_word(train_step):
    assert compilations.current() == ""


def test_a_pipe_is_told_of_a_compilation_again_and_again(at_once, train_step, capsys):
    with console.progress("training", 440) as advance:
        time.sleep(0.3)
        advance(1, "kl 0.1")
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("training 0/440  compiling the train step, 0 s") > 1
    assert "training 1/440  kl 0.1" in lines


def test_a_terminal_shows_it_in_place_of_the_status(at_once, train_step, monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(console, "console", rich.console.Console(file=file, width=80, force_terminal=True))
    with console.progress("training", 440) as advance:
        advance(300, "kl 0.0123  loss 0.0456  gen 20k, train 60k tok/s")
        time.sleep(0.2)
    assert "compiling the train step, 0 s" in file.getvalue()


def test_a_step_fits_80_columns(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(console, "console", rich.console.Console(file=file, width=80, force_terminal=True))
    with console.progress("training", 440) as advance:
        advance(300, "kl 0.0123  loss 0.0456  gen 20k, train 60k tok/s")
    assert "train 60k tok/s" in file.getvalue() and "…" not in file.getvalue()
