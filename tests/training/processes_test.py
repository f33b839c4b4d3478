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
from collections.abc import Callable, Iterator

import pytest

from msd_jax.io import jsonl
from tests.conftest import REPOSITORY

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
ENVIRONMENT = os.environ | {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
STEPS_ONLY = ("--config.eval.path=", "--config.train.export=False")
ENDLESS = ("--config.train.steps=100000",)


@contextlib.contextmanager
def started(workdir: pathlib.Path, log: pathlib.Path, *flags: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "msd_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}", *flags]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, stdout=file, stderr=file)
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
