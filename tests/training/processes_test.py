"""One process and real signals, disks and directories: what a run does on the outside when it cannot go on."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import pytest
from safetensors.numpy import load_file

from msd_jax.io import jsonl
from tests import quick
from tests.conftest import REPOSITORY, slow_disk

ENVIRONMENT = os.environ | {"XLA_FLAGS": quick.COMPILATION, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
STEPS_ONLY = ("--config.eval.path=", "--config.train.export=False")
ENDLESS = ("--config.train.steps=100000",)


@contextlib.contextmanager
def started(
    workdir: pathlib.Path, log: pathlib.Path, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    environ = ENVIRONMENT | dict(environment or {})
    command = [sys.executable, "-m", "msd_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}", *flags]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environ, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], object], process: subprocess.Popen, log: pathlib.Path) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def steps(workdir: pathlib.Path) -> list[int]:
    return [row["step"] for row in jsonl.read(workdir / "metrics.jsonl")]


def initialised_alone() -> tuple[str, ...]:
    """Flags by which JAX is initialised for one process, as on a TPU slice of one host: JAX then takes SIGTERM too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return (f"--coordinator=127.0.0.1:{free.getsockname()[1]}", "--processes=1", "--process_id=0")


@pytest.mark.parametrize("alone", [tuple, initialised_alone], ids=["no jax.distributed", "one initialised process"])
def test_sigterm_saves_the_step_and_the_same_command_resumes(tmp_path, alone):
    workdir, log = tmp_path / "run", tmp_path / "log"
    with started(workdir, log, *STEPS_ONLY, *ENDLESS, *alone(), "--config.train.checkpoints.every=100000") as process:
        wait_for(lambda: len(steps(workdir)) > 3, process, log)
        process.send_signal(signal.SIGUSR1)  # shows what every thread does, and goes on
        wait_for(lambda: "Current thread" in log.read_text() and "loop.py" in log.read_text(), process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    saved = int(
        re.search(r"preempted: step (\d+) is saved; run the same command again to resume\n$", log.read_text())[1]
    )
    assert steps(workdir) == list(range(1, saved + 1))
    assert not (workdir / "lock.json").exists() and "Traceback" not in log.read_text()
    with started(workdir, log, *STEPS_ONLY, f"--config.train.steps={saved + 2}") as process:
        assert process.wait(timeout=150) == 0, log.read_text()
    assert f"resumed from step {saved}" in log.read_text()
    assert steps(workdir) == list(range(1, saved + 3))


def answers(responses: pathlib.Path) -> dict[tuple[str, str, str], str]:
    return {(row["pass"], row["language"], row["id"]): row["response"] for row in jsonl.read(responses)}


def test_sigterm_during_evaluation_ends_within_seconds_and_keeps_what_was_answered(tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    flags = ("--config.train.steps=2", "--config.eval.limit=12", "--config.eval.batch_size=8")
    responses = workdir / "eval/0/responses.jsonl"
    with started(workdir, log, *flags) as process:
        wait_for(lambda: responses.exists() and jsonl.read(responses), process, log)
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert process.wait(timeout=30) == 143
        assert time.monotonic() - begin < 10
    assert log.read_text().endswith("preempted: nothing finished is lost; run the same command again to resume\n")
    assert not (workdir / "lock.json").exists() and "Traceback" not in log.read_text()
    kept = answers(responses)
    assert kept and not (workdir / "eval/0/summary.json").exists()
    with started(workdir, log, *flags) as process:
        assert process.wait(timeout=150) == 0, log.read_text()
    assert kept.items() <= answers(responses).items()  # in the order of the prompts once all are there
    assert json.loads((workdir / "eval/2/summary.json").read_text())


def test_a_second_sigterm_ends_the_run_at_once(tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    with started(workdir, log, *STEPS_ONLY, *ENDLESS) as process:
        wait_for(lambda: "sampling: temperature" in log.read_text(), process, log)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None, log.read_text()  # it waits for the first step, which is being compiled
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert process.wait(timeout=30) == 143
        assert time.monotonic() - begin < 5
    assert not (workdir / "lock.json").exists() and "Traceback" not in log.read_text()
    assert "is saved" not in log.read_text()


def test_sigterm_during_export_leaves_no_half_of_a_model(tmp_path):
    """Stopped in the middle of writing it; the same command then writes it whole."""
    workdir, log, unfinished = tmp_path / "run", tmp_path / "log", tmp_path / "run/model.unfinished"
    flags, slow = ("--config.eval.path=", "--config.train.steps=2"), slow_disk(tmp_path / "slow", "tokenizer.json", 60)
    with started(workdir, log, *flags, environment=slow) as process:
        wait_for((unfinished / "tokenizer.json").exists, process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 143, log.read_text()
    assert log.read_text().endswith("preempted: nothing finished is lost; run the same command again to resume\n")
    assert unfinished.exists() and not (workdir / "model").exists()
    with started(workdir, log, *flags) as process:
        assert process.wait(timeout=170) == 0, log.read_text()
    assert "resumed from step 2" in log.read_text() and not unfinished.exists()
    assert load_file(workdir / "model/model.safetensors") and steps(workdir) == [1, 2]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[pathlib.Path]:
    """A file system of 12 MB: three checkpoints and some."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(directory)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_full_disk_is_told_in_one_line_and_the_same_command_resumes(tmp_path, small_disk):
    workdir, log, filler = small_disk / "run", tmp_path / "log", small_disk / "filler"
    every = "--config.train.checkpoints.every=20"
    with started(workdir, log, *STEPS_ONLY, *ENDLESS, every) as process:
        wait_for((workdir / "checkpoints/20/MANIFEST-0-of-1.json").exists, process, log)
        free = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(free - 1_000_000))  # room for rows, not for a checkpoint
        assert process.wait(timeout=60) == 1
    *_, line = log.read_text().splitlines()
    failed = int(re.match(r"error: checkpoint (\d+) could not be written: No space left on device; earlier", line)[1])
    assert "Traceback" not in log.read_text() and steps(workdir)[-1] < failed + 20  # before the next save
    filler.unlink()
    with started(workdir, log, *STEPS_ONLY, f"--config.train.steps={failed + 1}", every) as process:
        assert process.wait(timeout=150) == 0, log.read_text()
    assert f"resumed from step {failed - 20}" in log.read_text()
    assert not list((workdir / "checkpoints").glob("*tmp*"))  # what the failed save left behind took room


def test_a_workdir_that_becomes_read_only_is_told_in_one_line_and_the_same_command_resumes(tmp_path, small_disk):
    """A read-only mount over the workdir, as after an error of the disk: chmod would not stop root."""
    workdir, log = small_disk / "run", tmp_path / "log"
    every = "--config.train.checkpoints.every=20"
    with started(workdir, log, *STEPS_ONLY, *ENDLESS, every) as process:
        wait_for((workdir / "checkpoints/20/MANIFEST-0-of-1.json").exists, process, log)
        for options in (["--bind"], ["-o", "remount,ro,bind"]):
            of_what = [str(small_disk), str(small_disk)] if options == ["--bind"] else [str(small_disk)]
            subprocess.run(["mount", *options, *of_what], check=True)
        try:
            assert process.wait(timeout=60) == 1
        finally:
            subprocess.run(["umount", "-l", str(small_disk)], check=True)
    *_, line = log.read_text().splitlines()
    assert re.match(r"error: (checkpoint \d+|\S+) could not be written: Read-only file system", line), line
    assert "Traceback" not in log.read_text()
    last = max(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit())
    with started(workdir, log, *STEPS_ONLY, f"--config.train.steps={last + 1}", every) as process:
        assert process.wait(timeout=150) == 0, log.read_text()
    assert f"resumed from step {last}" in log.read_text() and steps(workdir) == list(range(1, last + 2))
