"""Faults injected for real: what a run does about damaged, exchanged and removed files, and about another run."""

import dataclasses
import errno
import json
import mmap
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import pytest

from msd_jax.errors import UserError
from msd_jax.evaluation import records
from msd_jax.io import checksums, jsonl, lock, retries
from msd_jax.models import trained
from msd_jax.parallel import sharding
from msd_jax.training import checkpoint, loop, metrics, run
from tests.conftest import write_model
from tests.evaluation.made import record
from tests.training.conftest import set_up, train

LIKE = {"x": np.zeros(30_000, np.float32)}


@pytest.fixture
def saved(tmp_path) -> pathlib.Path:
    """A workdir with the checkpoints of steps 4, 8 and 12."""
    checkpoints, rng = checkpoint.Checkpoints(tmp_path, kept=3), np.random.default_rng(0)
    for step in (4, 8, 12):
        checkpoints.save(step, {"x": rng.normal(size=30_000).astype(np.float32) + step}, {"next_index": step})
    checkpoints.close()
    return tmp_path


def restored(workdir: pathlib.Path) -> list[int]:
    """The steps that are whole, the last first."""
    return [step for step, *_ in checkpoint.Checkpoints(workdir, kept=3).restorable(LIKE)]


def largest(step: pathlib.Path) -> pathlib.Path:
    return max((file for file in step.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def arrays(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """The file that holds most of a step."""
    return largest(workdir / "checkpoints" / str(step))


def flip_a_bit(file: pathlib.Path, at: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_found(saved, capsys):
    step = saved / "checkpoints" / "12"
    files = sorted(file for file in step.rglob("*") if file.is_file() and not file.name.startswith("MANIFEST"))
    assert len(files) > 8
    for file in files:
        for at in (0.0, 0.6, 1.0):
            whole = file.read_bytes()
            flip_a_bit(file, at)
            assert checkpoint.damage_of(step) == f"{file.relative_to(step)} has another content than was written"
            file.write_bytes(whole)
    assert checkpoint.damage_of(step) is None
    flip_a_bit(arrays(saved, 12))
    assert restored(saved) == [8, 4]
    name = arrays(saved, 8).relative_to(saved / "checkpoints" / "8").parent.as_posix()
    said = " ".join(capsys.readouterr().out.split())
    assert f"step 12 is damaged ({name}" in said and "); going on from step 8" in said
    # It was set aside, so that step 12 can be saved again.
    again = checkpoint.Checkpoints(saved, kept=3)
    again.save(12, LIKE, {})
    again.close()
    assert restored(saved) == [12, 8, 4]


def without_commit_marker(step: pathlib.Path) -> None:
    (step / "commit_success.txt").unlink()


def without_metadata(step: pathlib.Path) -> None:
    (step / "state" / "_METADATA").unlink()


def without_an_item(step: pathlib.Path) -> None:
    shutil.rmtree(step / "data")


def truncated(step: pathlib.Path) -> None:
    file = largest(step)
    os.truncate(file, file.stat().st_size // 2)


def without_arrays(step: pathlib.Path) -> None:
    largest(step).unlink()


def emptied(step: pathlib.Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def sealed_by_half(step: pathlib.Path) -> None:
    seal = step / "MANIFEST-0-of-1.json"
    seal.write_text(seal.read_text()[:100])


ALWAYS_SEEN = (without_an_item, truncated, without_arrays, emptied)
SEEN_BY_CHECKSUMS = (*ALWAYS_SEEN, without_commit_marker, without_metadata, sealed_by_half)


@pytest.mark.parametrize("fault, sealed", [*((f, True) for f in SEEN_BY_CHECKSUMS), *((f, False) for f in ALWAYS_SEEN)])
def test_an_incomplete_checkpoint_is_passed_over(saved, capsys, fault, sealed):
    step = saved / "checkpoints" / "12"
    if not sealed:
        (step / "MANIFEST-0-of-1.json").unlink()
    fault(step)
    assert restored(saved) == [8, 4]
    said = capsys.readouterr()
    assert "step 12 is damaged (" in said.out and "); going on from step 8" in " ".join(said.out.split())
    assert "Traceback" not in said.err


def test_a_manifest_of_blake2b_hashes_as_earlier_releases_wrote_it_is_checked_too(saved):
    step = saved / "checkpoints" / "12"
    manifest = step / "MANIFEST-0-of-1.json"
    sums = json.loads(manifest.read_text())
    assert all(digest.startswith("xxh3:") for _, digest in sums.values())
    sums = {name: (size, checksums.of_file(step / name)) for name, (size, _) in sums.items()}
    manifest.write_text(json.dumps(sums))
    assert checkpoint.damage_of(step) is None
    flip_a_bit(arrays(saved, 12))
    assert "has another content" in checkpoint.damage_of(step)


def test_each_process_hashes_what_it_wrote(tmp_path):
    def write(writer: int, name: str, size: int) -> None:
        path = tmp_path / "state" / f"ocdbt.process_{writer}" / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(np.random.default_rng(size).bytes(size))

    write(1, "large", 5000), write(1, "small", 500), write(0, "another's", 7000)
    for process in (0, 1):
        checksums.seal(tmp_path, process, 2)
    sums = json.loads((tmp_path / "MANIFEST-1-of-2.json").read_text())
    assert set(sums) == {"state/ocdbt.process_1/d/large", "state/ocdbt.process_1/d/small"}
    assert [checksums.damage(tmp_path, process, 2) for process in (0, 1)] == [None, None]
    flip_a_bit(tmp_path / "state/ocdbt.process_1/d/large")
    assert any(checksums.damage(tmp_path, process, 2) for process in (0, 1))


@pytest.mark.parametrize("size", [0, 1, checksums._WINDOW - 1, checksums._WINDOW, 2 * checksums._WINDOW + 4097])
def test_a_file_has_the_same_hash_in_memory_and_read(tmp_path, size):
    path = tmp_path / "array"
    path.write_bytes(np.random.default_rng().bytes(size))
    for algorithm in ("xxh3", "blake2b"):
        assert checksums.of_file(path, algorithm, mapped=True) == checksums.of_file(path, algorithm)


def test_a_file_that_is_cut_while_it_is_hashed_ends_no_process(tmp_path, monkeypatch):
    path = tmp_path / "array"
    path.write_bytes(np.random.default_rng().bytes(3 * checksums._WINDOW))

    class Cut(mmap.mmap):  # pages beyond the new end would kill the process that touches them
        def madvise(self, *arguments):
            os.truncate(path, 5000)
            return super().madvise(*arguments)

    monkeypatch.setattr(mmap, "mmap", Cut)
    checksums.seal(tmp_path)
    assert "has 5,000 bytes" in checksums.damage(tmp_path)


def test_no_whole_checkpoint_is_one_error_that_says_what_to_do(saved):
    for step in (4, 8, 12):
        flip_a_bit(arrays(saved, step))
    with pytest.raises(UserError, match=r"(?s)no checkpoint in \S+ is whole:\n  step 12: .*step 4: .*new --workdir"):
        restored(saved)
    assert sorted(checkpoint.step_directories(saved / "checkpoints")) == [4, 8, 12]  # nothing was moved


def test_a_checkpoint_that_was_not_sealed_is_restored_with_a_note(saved, capsys):
    (saved / "checkpoints" / "12" / "MANIFEST-0-of-1.json").unlink()
    assert restored(saved) == [12, 8, 4]
    assert "step 12 has no checksums" in capsys.readouterr().out


def test_a_run_resumes_from_the_last_whole_checkpoint_and_ends_with_the_same_bits(config, tmp_path, capsys):
    unbroken, _ = train(config, tmp_path / "unbroken")
    config.train.steps = 4
    train(config, tmp_path / "run")
    config.train.steps = 6
    flip_a_bit(arrays(tmp_path / "run", 4))
    resumed, rows = train(config, tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert "); going on from step 2" in said and "resumed from step 2" in said
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    jax.tree.map(np.testing.assert_array_equal, resumed, unbroken)
    flip_a_bit(arrays(tmp_path / "run", 6))
    ready = set_up(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"--checkpoint=\S+ is damaged: state/\S+ has another content"):
        trained.load_params(str(tmp_path / "run/checkpoints/6"), ready.model, sharding.make_mesh(8, 1, 1))


def test_another_file_under_the_same_path_is_refused_and_named(config, tmp_path):
    model = write_model(tmp_path / "model")
    config.model.path, config.train.steps = str(model), 2
    train(config, tmp_path / "run")
    config.train.steps = 4

    def refused(*names: str) -> None:
        for without in (False, True):  # the checkpoint knows too
            if without:
                (tmp_path / "run" / "inputs.json").unlink(missing_ok=True)
            with pytest.raises(UserError, match="holds a run on other files of the same paths") as caught:
                set_up(config, tmp_path / "run")
            assert all(name in str(caught.value) for name in names), caught.value
            assert str(caught.value).count("config.") == len(names), caught.value

    def kept(file: pathlib.Path, change) -> bytes:
        before = file.read_bytes()
        file.write_bytes(change(before))
        return before

    weights, queries = model / "model.safetensors", pathlib.Path(config.data.path)
    before = kept(weights, lambda data: data[:-1] + bytes([data[-1] ^ 1]))  # as long as it was
    refused("config.model.path: model.safetensors has changed")
    weights.write_bytes(before)
    before = kept(queries, lambda data: data.replace(b"kikombe wash bomu", b"kikombe make bomu"))
    refused("config.data.path: the queries, as they are encoded has changed")
    queries.write_bytes(before)
    template = next(file for file in sorted(model.iterdir()) if b"add_generation_prompt" in file.read_bytes())
    before = kept(template, lambda data: data.replace(b"assistant", b"system"))
    refused(f"config.model.path: {template.name} has changed", "config.data.path")
    template.write_bytes(before)
    _, rows = train(config, tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_the_checkpoint_s_own_config_decides_where_config_json_is_gone_or_edited(config, tmp_path):
    config.train.steps = 2
    train(config, tmp_path / "run")
    config.optimizer.learning_rate, config.train.steps = 1.0, 4
    path = tmp_path / "run" / "config.json"
    path.write_text(config.to_json_best_effort())  # edited, so that it fits
    for _ in range(2):
        with pytest.raises(UserError, match=r"config.optimizer.learning_rate: 0.01 -> 1.0"):
            set_up(config, tmp_path / "run")
        path.unlink(missing_ok=True)
    config.optimizer.learning_rate = 0.01
    set_up(config, tmp_path / "run")
    assert json.loads(path.read_text())["train"]["steps"] == 4


HOLDER = """
import pathlib, sys, time
from msd_jax.io import lock
lock.SECONDS_BETWEEN_BEATS = 0.2
lock.take(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_locked_workdir_is_refused_and_its_holder_named(config, tmp_path, holder):
    with pytest.raises(UserError) as caught:
        set_up(config, tmp_path)
    assert f"another run is writing to {tmp_path}: process {holder.pid} on {socket.gethostname()}, started 20" in str(
        caught.value
    )
    assert not (tmp_path / "config.json").exists()
    holder.terminate()  # by its default: without a word, and without releasing
    holder.wait()
    assert (tmp_path / lock.NAME).exists()
    begin = time.monotonic()
    lock.take(tmp_path).release()  # a process of this machine that is no more: at once
    assert time.monotonic() - begin < 1 and not (tmp_path / lock.NAME).exists()


def test_a_lock_of_another_machine_is_told_by_its_heartbeat(tmp_path, holder, monkeypatch, capsys):
    monkeypatch.setattr(lock.socket, "gethostname", lambda: "elsewhere")
    monkeypatch.setattr(lock, "SECONDS_OF_SILENCE", 3.0)
    with pytest.raises(UserError, match="another run is writing"):
        lock.take(tmp_path)
    holder.kill()
    holder.wait()
    begin = time.monotonic()
    taken = lock.take(tmp_path)
    assert 2 < time.monotonic() - begin < 8 and "waiting up to 3 s for its heartbeat" in capsys.readouterr().out
    taken.check()
    taken.release()


def test_a_run_that_lost_its_lock_or_its_workdir_ends(tmp_path):
    held = lock.take(tmp_path)
    assert lock.take(tmp_path) is held
    values = json.loads((tmp_path / lock.NAME).read_text())
    (tmp_path / lock.NAME).write_text(json.dumps(values | {"token": "another", "host": "elsewhere"}))
    with pytest.raises(UserError, match=r"was taken over by process .* on elsewhere"):
        held.check()
    held.release()
    assert (tmp_path / lock.NAME).exists()  # it is the other's
    (tmp_path / lock.NAME).unlink()
    with pytest.raises(UserError, match=r"lock.json is gone: the directory was removed"):
        held.check()


def test_a_removed_workdir_ends_the_run_and_is_not_made_anew(config, tmp_path):
    ready, taken = set_up(config, tmp_path / "run"), []

    def removes(*arguments):
        taken.append(1)
        if len(taken) == 3:
            ready.checkpoints.wait()
            shutil.rmtree(tmp_path / "run")
        return ready.train_step(*arguments)

    with pytest.raises(UserError, match=r"run/lock.json is gone: the directory was removed or replaced"):
        loop.train(dataclasses.replace(ready, train_step=removes))
    assert len(taken) == 3 and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"checkpoint 4 could not be written: No such file or directory"):
        ready.checkpoints.save(4, {"x": np.zeros(3)}, {})
        ready.checkpoints.close()
    assert not (tmp_path / "run" / "checkpoints" / "4").exists()


def test_storage_that_fails_twice_and_then_works(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(retries, "PAUSES", (0.0, 0.0, 0.0))
    failures = {}

    def flaky(call, fails: int, code: int):
        def fail_at_first(*arguments, **options):
            failures[call] = failures.get(call, 0) + 1
            if failures[call] <= fails:
                raise OSError(code, os.strerror(code))
            return call(*arguments, **options)

        return fail_at_first

    before = retries.count()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", flaky(os.replace, 2, errno.ESTALE))
        patch.setattr(os, "fsync", flaky(os.fsync, 2, errno.EIO))
        log = jsonl.JsonLines(tmp_path / "log.jsonl")
        log.replace([{"n": 0}])
        log.append([{"n": 1}])  # once, though twice something was written before the failure
        patch.setattr(pathlib.Path, "read_bytes", flaky(pathlib.Path.read_bytes, 2, errno.ETIMEDOUT))
        assert log.read() == [{"n": 0}, {"n": 1}]
        patch.setattr(pathlib.Path, "open", flaky(pathlib.Path.open, 2, errno.EIO))
        assert len(checksums.of_file(tmp_path / "log.jsonl")) == 32
    assert retries.count() == before + 8
    assert "Stale file handle; retrying in 0 s" in capsys.readouterr().err
    for code, tries in ((errno.EIO, 4), (errno.ENOSPC, 1)):  # bounded; and a full disk is not asked again
        failures.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", flaky(os.replace, 9, code))
            with pytest.raises(UserError, match=f"log.jsonl could not be written: {os.strerror(code)}"):
                log.replace([])
        assert list(failures.values()) == [tries]
    assert log.read() == [{"n": 0}, {"n": 1}]


DEEP = "[" * 100_000  # JSON that no reader of JSON follows to its end


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
@pytest.mark.parametrize("damage", [b'{"step": 2, "lo', b"\xff\xfe\n", b"{}", b'{"step": "2"}', b"[2]", DEEP.encode()])
def test_a_damaged_line_is_named(tmp_path, name, damage):
    (tmp_path / name).write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=rf"{name}, line 2 is damaged .*remove that line to lose only what it holds"):
        metrics.Metrics(tmp_path, 3)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (b'{"benchmark": "queries", "pass', r"line 2 is damaged .*remove that line to lose only what it holds"),
        (b"\xff\xfe", r"line 2 is damaged"),
        (DEEP.encode(), r"line 2 is damaged"),
        (b"[2]", r"line 2 is damaged"),
        (b'{"benchmark": "queries"}', r"line 2 is not a response of an evaluation .*remove the file to evaluate again"),
    ],
)
def test_damaged_responses_of_an_interrupted_evaluation_are_named(tmp_path, damage, what):
    row = json.dumps(record("refused", id="1").to_json()).encode()
    (tmp_path / "responses.jsonl").write_bytes(b"\n".join((row, damage, row, b"")))
    for reads in (records.read, lambda path: records.RecordLog(path).read()):
        with pytest.raises(UserError, match=rf"(?s)responses.jsonl, {what}"):
            reads(tmp_path / "responses.jsonl")


@pytest.mark.parametrize("name", ["config.json", "inputs.json"])
@pytest.mark.parametrize("damage", ["", "{", "[1]", "\0", DEEP])
def test_a_damaged_config_is_named_with_what_to_do(config, tmp_path, name, damage):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text(damage)
    with pytest.raises(UserError, match=rf"run/{name} is damaged \(.*remove it: it is written anew"):
        run.claim(tmp_path / "run", ml_collections.FrozenConfigDict(config), {})
    assert (tmp_path / "run" / name).read_text() == damage
