"""What one process compiled, the next reads: nothing is compiled twice, and a damaged entry is no error."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from msd_jax.io import jsonl, program_cache
from tests.conftest import REPOSITORY

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from msd_jax.io import compilations, program_cache

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
program_cache.keep(sys.argv[1])
jax.block_until_ready(jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.ones((8, 8))))
counts = {name: events.count(name) for name in ("compile_requests_use_cache", "cache_hits", "cache_misses")}
print(json.dumps(counts | vars(compilations.so_far())))
"""
ENVIRONMENT = os.environ | {"XLA_FLAGS": ""}
ENVIRONMENT.pop("JAX_COMPILATION_CACHE_DIR")


def compile_once(directory: pathlib.Path | str, **environment: str) -> tuple[dict, list[str]]:
    """(what a new process counted, the lines that it printed)."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory)],
        env=ENVIRONMENT | environment, cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not done.stderr
    *lines, counts = done.stdout.splitlines()
    return json.loads(counts), lines


def entries(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(directory.rglob("*-cache"))


def test_a_second_process_compiles_nothing(tmp_path):
    first, lines = compile_once(tmp_path / "made" / "here")
    assert first["compiled"] == first["cache_misses"] > 1 and first["read"] == first["cache_hits"] == 0 and not lines
    assert first["seconds"] > 0
    second, _ = compile_once(tmp_path / "made" / "here")
    assert second["compiled"] == second["cache_misses"] == 0
    assert second["read"] == second["cache_hits"] == second["compile_requests_use_cache"] == first["compiled"]
    assert {path.parent for path in entries(tmp_path)} == {tmp_path / "made" / "here" / program_cache.cpu()}
    assert {path.parent.stat().st_mode & 0o777 for path in entries(tmp_path)} == {0o700}


@pytest.mark.parametrize("damage", ["cut", "empty", "exchanged", "flipped"])
def test_a_damaged_entry_is_compiled_anew_and_replaced(tmp_path, damage):
    compile_once(tmp_path)
    [path] = [path for path in entries(tmp_path) if path.name.startswith("jit__lambda")]
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "exchanged": b"x" * 100, "flipped": flipped}[damage])
    counts, [line] = compile_once(tmp_path)
    assert counts["compiled"] == counts["cache_misses"] == 1 and counts["read"] == len(entries(tmp_path)) - 1
    assert line.startswith("note: a compiled jit__lambda") and line.endswith(": compiled anew")
    counts, lines = compile_once(tmp_path)
    assert counts["compiled"] == 0 and not lines


def test_no_directory_and_one_that_cannot_be_written(tmp_path):
    counts, lines = compile_once("")
    assert counts["compiled"] > 1 and counts["compile_requests_use_cache"] == 0 and not lines
    (tmp_path / "file").write_text("")
    counts, [line] = compile_once(tmp_path / "file" / "cache")
    assert counts["compiled"] > 1 and counts["compile_requests_use_cache"] == 0
    assert line.startswith(f"note: config.compilation_cache={tmp_path}/file/cache/cpu-") and "compiled anew" in line


def test_the_environment_goes_first(tmp_path):
    compile_once(tmp_path / "config", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "environment"))
    assert entries(tmp_path / "environment") and not entries(tmp_path / "config")


@pytest.mark.parametrize(
    "place, message", [("ftp://b/cache", "ftp:// is not read or written"), ("az://b/cache", "cannot be reached: ")]
)
def test_an_object_store_that_cannot_be_used_is_one_line(place, message, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setitem(sys.modules, "adlfs", None)  # as where it is not installed
    with pytest.raises(ValueError, match=rf"^config.compilation_cache={place}.*{message}.*$"):
        program_cache.keep(place)


def test_each_kind_of_cpu_has_a_directory_of_its_own(monkeypatch, tmp_path):
    info = "vendor_id : A\nmodel : 1\nflags : sse avx2{}\ncpu MHz : {}\n\nvendor_id : A\n"

    def name(extra: str, megahertz: int) -> str:
        (tmp_path / "cpuinfo").write_text(info.format(extra, megahertz))
        return program_cache.cpu()

    monkeypatch.setattr(program_cache, "_CPUINFO", tmp_path / "cpuinfo")
    assert name("", 2400) == name("", 3600) != name(" avx512f", 2400)
    (tmp_path / "cpuinfo").unlink()  # another operating system
    assert program_cache.cpu() != name("", 2400)


def test_the_oldest_entries_make_room(monkeypatch, tmp_path):
    for age, name in enumerate("abcd"):
        path = tmp_path / f"jit_{name}-0-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(program_cache, "MOST_BYTES", 250)
    program_cache._make(str(tmp_path), stored=False)
    assert [path.name[4] for path in entries(tmp_path)] == ["a", "b"]


def test_a_second_run_compiles_nothing_and_gives_the_same_bytes(tmp_path):
    """Without a cache, with an empty one and with a full one."""

    def run(name: str, cache: str) -> dict:
        flags = (f"--workdir={tmp_path / name}", f"--config.compilation_cache={cache}", "--config.train.steps=2")
        flags += ("--config.eval.passes=('greedy',)",)
        done = subprocess.run(
            [sys.executable, "-m", "msd_jax.main", "--config=configs/quickstart.py", *flags, "--config.eval.limit=4"],
            env=ENVIRONMENT, cwd=REPOSITORY, capture_output=True, text=True, check=True,
        )  # fmt: skip
        [row] = jsonl.read(tmp_path / name / "goodput.jsonl")
        assert f"{row['compiled']} programs compiled, {row['read']} read from the cache" in done.stdout
        assert "Error" not in done.stderr
        return row

    rows = [run("off", ""), run("cold", f"{tmp_path}/cache"), run("warm", f"{tmp_path}/cache")]
    assert [bool(row["compiled"]) for row in rows] == [True, True, False]
    assert rows[0]["read"] == 0 and rows[2]["read"] == rows[0]["compiled"]
    assert rows[1]["compiled"] + rows[1]["read"] == rows[0]["compiled"]  # it meets some programs a second time
    assert rows[2]["seconds"]["compilation"] < rows[1]["seconds"]["compilation"]
    for name in ("model/model.safetensors", "eval/0/responses.jsonl", "eval/2/summary.json", "completions.jsonl"):
        assert len({(tmp_path / run / name).read_bytes() for run in ("off", "cold", "warm")}) == 1, name
