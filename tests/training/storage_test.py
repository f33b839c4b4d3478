"""Storage that fails for a moment, answers slowly or not at all: the calls themselves are delayed or fail."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.parallel.distributed_test import free_port

PROGRAM = """
import ctypes, errno, json, pathlib, sys, time
from msd_jax.parallel import distributed, preemption

distributed.start(["program"])
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from msd_jax.errors import UserError
from msd_jax.io import retries
from msd_jax.training import checkpoint

workdir = pathlib.Path(sys.argv[1])
shim = ctypes.CDLL(sys.argv[2])
checkpoint.PAUSES = (0.1, 0.2, 0.3)
me = jax.process_index()
split = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
whole = np.random.default_rng(0).normal(size=(400, 1000)).astype(np.float32)

def state(step):
    return {"x": jax.make_array_from_callback(whole.shape, split, lambda index: (whole + step)[index])}

def inject(operation, where, code, times, milliseconds=0):
    shim.inject(operation.encode(), where.encode(), code, times, milliseconds)

def tell(**values):
    print("TOLD " + json.dumps(values), flush=True)

def restored(checkpoints):
    like = {"x": jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=split)}
    for step, found, data in checkpoints.restorable(like):
        same = all(np.array_equal(part.data, (whole + step)[part.index]) for part in found["x"].addressable_shards)
        yield [step, same and data == {"next_index": step}]

def train(checkpoints, directory, steps):
    "As the loop does; the steps that were begun to be saved."
    saved = [0]
    for step in range(1, steps + 1):
        time.sleep(0.01)
        sealed = directory / "checkpoints" / "4" / f"MANIFEST-{me}-of-{jax.process_count()}.json"
        while step == 20 and not (len(saved) > 2 or checkpoints.due_again or sealed.exists()):
            time.sleep(0.01)
        checkpoints.check()
        _, again = preemption.agreed(checkpoints.due_again)
        if step == steps or step == 4 or (again and saved[-1] < step - 1):
            checkpoints.save(step, state(step), {"next_index": step})
            saved.append(step)
    while not checkpoints.wait():
        checkpoints.save(steps, state(steps), {"next_index": steps})
        saved.append(steps)
    return saved[1:]

with distributed.together():
    jax.block_until_ready(state(0))
"""

FAULTS = """
    for number, fault in enumerate(json.loads(sys.argv[3])):
        directory = workdir / str(number)
        checkpoints = checkpoint.Checkpoints(directory)
        before = retries.count()
        if fault.pop("process") == me:
            inject(**fault)
        saved = train(checkpoints, directory, 30)
        unused = shim.remaining()
        if fault["operation"] == "read":
            inject(**fault)
        found = list(restored(checkpoints))
        checkpoints.close()
        names = sorted(path.name for path in (directory / "checkpoints").iterdir())
        tell(saved=saved, unused=unused, retries=retries.count() - before, restored=found, names=names)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> pathlib.Path:
    """A library that is loaded before all others."""
    compiler = shutil.which("cc")
    if not compiler or sys.platform != "linux":
        pytest.skip("injecting faults into calls of the C library needs Linux and cc")
    library = tmp_path_factory.mktemp("shim") / "faulty_storage.so"
    source = pathlib.Path(__file__).with_name("faulty_storage.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture
def programs(shim, tmp_path) -> Callable[..., list[tuple[int, str, list[dict]]]]:
    """Runs a program in one or several processes: the exit code, what is printed, and what is told of each."""

    def run(text: str, processes: int, *arguments: str) -> list[tuple[int, str, list[dict]]]:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "LD_PRELOAD": str(shim), "XLA_FLAGS": ""}
        if processes > 1:
            environment |= dict.fromkeys(
                ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"), f"127.0.0.1:{free_port()}"
            ) | {"JAX_NUM_PROCESSES": str(processes)}
        command = [sys.executable, "-c", PROGRAM + text, str(tmp_path), str(shim), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started = [
            subprocess.Popen(command, env=environment | ({"JAX_PROCESS_ID": str(i)} if processes > 1 else {}), **pipes)
            for i in range(processes)
        ]
        try:
            printed = [process.communicate(timeout=200)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        told = [[json.loads(line[5:]) for line in text.splitlines() if line.startswith("TOLD ")] for text in printed]
        return list(zip((process.returncode for process in started), printed, told))

    return run


def fault(operation: str, where: str, code: int, times: int = 1, process: int = 0) -> dict:
    return {"operation": operation, "where": where, "code": code, "times": times, "process": process}


def test_a_save_or_restore_that_fails_for_a_moment_is_repeated(programs):
    faults = [
        fault("fsync", "checkpoints/4.orbax", errno.EIO),  # of an array's file
        fault("mkdir", "checkpoints/4.orbax", errno.ESTALE),
        fault("write", "4.orbax-checkpoint-tmp/_CHECKPOINT_METADATA", errno.EIO, times=2),
        fault("rename", "4.orbax-checkpoint-tmp$", errno.ETIMEDOUT),  # the commit
        fault("rename", "30.orbax-checkpoint-tmp$", errno.EIO, times=3),  # of the last step, which has none after it
        fault("read", "checkpoints/30/state", errno.EIO, times=2),
    ]
    ((code, printed, told),) = programs(FAULTS, 1, json.dumps(faults))
    assert code == 0 and len(told) == len(faults), printed
    for injected, seen in zip(faults, told):
        assert seen["unused"] == 0 or injected["operation"] == "read", (injected, seen, printed)
        assert seen["retries"] >= 1, (injected, seen, printed)
        first, *others, last = seen["saved"]
        assert (first, last) == (4, 30)
        if "4.orbax" in injected["where"]:
            assert len(others) == 1, (injected, seen, printed)  # once, at a later step
            assert [step for step, _ in seen["restored"]] == [30, *others]
        assert all(right for _, right in seen["restored"]), (injected, seen, printed)
        assert seen["names"] == sorted(str(step) for step, _ in seen["restored"])
    assert "note: checkpoint 4 could not be written: Input/output error; retrying in 0.1 s (retry 1 of" in printed
    assert "Traceback" not in printed


def test_all_processes_save_again_where_one_cannot_write(programs):
    faults = [
        fault("fsync", "ocdbt.process_1", errno.EIO, process=1),  # one process alone cannot write its part
        fault("rename", "4.orbax-checkpoint-tmp$", errno.ESTALE),  # the first cannot commit what all have written
    ]
    results = programs(FAULTS, 2, json.dumps(faults))
    assert [code for code, *_ in results] == [0, 0], results
    for injected, one, other in zip(faults, *(told for *_, told in results), strict=True):
        assert one["saved"] == other["saved"] and len(one["saved"]) == 3, results  # at the same step, and once
        _, again, last = one["saved"]
        for seen in (one, other):
            assert seen["restored"] == [[last, True], [again, True]], results
        assert [one["retries"], other["retries"]] == ([0, 1] if injected["process"] else [1, 0]), results


SLOW = """
    checkpoints = checkpoint.Checkpoints(workdir)
    inject("write", "checkpoints/4.orbax", 0, 1000, 100)  # each call takes a tenth of a second
    begin = time.monotonic()
    checkpoints.save(4, state(4), {"next_index": 4})
    held, steps = time.monotonic() - begin, 0
    while not (workdir / "checkpoints" / "4").exists():
        time.sleep(0.01)
        checkpoints.check()
        steps += 1
    assert checkpoints.wait()
    took = time.monotonic() - begin
    inject("fsync", "checkpoints/8.orbax", 0, 1000, 600_000)  # and now it does not answer any more
    impatient = checkpoint.Checkpoints(workdir, patience=1)
    tell(held=held, took=took, steps=steps, restored=list(restored(impatient)))
    begin = time.monotonic()
    impatient.save(8, state(8), {"next_index": 8})
    try:
        while time.monotonic() < begin + 60:
            time.sleep(0.01)
            impatient.check()
    except UserError as error:
        tell(bound=time.monotonic() - begin)
        distributed.end_in_error(f"error: {error}")
"""


def test_slow_storage_holds_no_step_up_and_one_that_never_answers_is_an_error(programs):
    ((code, printed, (slow, silent)),) = programs(SLOW, 1)
    assert slow["took"] > 0.4 and slow["held"] < slow["took"] / 2 and slow["steps"] > 10, printed
    assert slow["restored"] == [[4, True]]
    assert code == 1 and 0.8 < silent["bound"] < 20, printed
    *_, line = printed.splitlines()
    assert line.startswith("error: checkpoint 8 could not be written: storage did not answer in time (config.train.sta")
    assert "Traceback" not in printed and "retrying" not in printed
