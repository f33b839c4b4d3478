"""Checkpoints in Google Cloud Storage, which have no copy on a disk: several machines, kills and damage."""

import importlib.util
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from msd_jax.errors import UserError
from msd_jax.io import checksums, jsonl, objects, stores
from msd_jax.training import checkpoint
from tests.conftest import REPOSITORY

if not (importlib.util.find_spec("gcsfs") and importlib.util.find_spec("gcp_storage_emulator")):
    pytest.skip("a local Google Cloud Storage needs gcsfs and gcp-storage-emulator", allow_module_level=True)

from tests.io import gcs

LIKE = {"x": jax.ShapeDtypeStruct((4, 1024), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}


@pytest.fixture(scope="module")
def environment():
    server = gcs.start(0, "bucket")
    with pytest.MonkeyPatch.context() as patch:
        variables = gcs.variables(server)
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon", "use_listings_cache": False})
        yield variables
    server.shutdown()


@pytest.fixture
def place(environment, request, monkeypatch, tmp_path) -> str:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return "gs://bucket/" + "".join(c for c in request.node.name if c.isalnum())


def content(place: str) -> dict[str, bytes]:
    store, root = objects.file_system(place)
    return {path.removeprefix(f"{root}/"): store.cat_file(path) for path in store.find(root)}


def state(step: int) -> dict[str, jax.Array]:
    return {"x": jnp.asarray(np.random.default_rng(step).normal(size=(4, 1024)), jnp.float32)}


def saved(place: str, *steps: int) -> tuple[pathlib.Path, checkpoint.Checkpoints]:
    workdir = stores.own("--workdir", place)
    checkpoints = checkpoint.Checkpoints(workdir, kept=5, record={"config": {"seed": 0}})
    for step in steps:
        jsonl.JsonLines(workdir / "metrics.jsonl").append([{"step": step}])
        checkpoints.save(step, state(step), {"at": step})
    checkpoints.wait()
    return workdir, checkpoints


def restored(checkpoints: checkpoint.Checkpoints) -> int:
    step, found, data = next(checkpoints.restorable(LIKE))
    np.testing.assert_array_equal(found["x"], state(step)["x"])
    assert data == {"at": step}
    return step


def test_a_checkpoint_is_written_there_alone_with_the_rows_before_it(place):
    workdir, checkpoints = saved(place, 2, 4)
    found = content(place)  # nothing was closed
    assert jsonl.read(workdir / "metrics.jsonl") == [json.loads(row) for row in found["metrics.jsonl"].splitlines()]
    assert found["checkpoints/4/MANIFEST-0-of-1.json"] and not (workdir / "checkpoints").exists()
    assert checkpoint.recorded(workdir, "config") == {"seed": 0} and restored(checkpoints) == 4
    checkpoints.close()
    stores.close(workdir)
    assert "lock.json" not in content(place)


def replace(store, path):
    content = bytearray(store.cat_file(path))
    content[len(content) // 2] ^= 1
    store.pipe_file(path, bytes(content))


def cut(store, path):
    store.pipe_file(path, store.cat_file(path)[:-1])


def test_damaged_ones_are_named_and_passed_over(place, capsys):
    workdir, checkpoints = saved(place, 2, 4, 6, 8)
    for step, harm in {4: lambda store, path: store.rm_file(path), 6: cut, 8: replace}.items():
        store, root = objects.file_system(f"{place}/checkpoints/{step}")
        harm(store, max(store.find(f"{root}/state", detail=True).items(), key=lambda item: item[1]["size"])[0])
    assert restored(checkpoints) == 2
    printed = capsys.readouterr().out
    for step, what in {4: "is missing", 6: "bytes instead of", 8: "has another content"}.items():
        assert re.search(rf"step {step} is damaged \(state/.*{what}.*\); going on from step 2\n", printed)
    assert checkpoints.steps == [2] and any("checkpoints/4.damaged/" in name for name in content(place))
    checkpoints.close()
    stores.close(workdir)


def test_what_was_not_sealed_is_removed_and_what_a_disk_held_is_taken_over(place, tmp_path):
    disk = checkpoint.Checkpoints(tmp_path / "run", kept=5)
    for step in (2, 4):
        disk.save(step, state(step), {"at": step})
    disk.close()
    (tmp_path / "run/checkpoints/4/MANIFEST-0-of-1.json").unlink()  # as if it were killed before
    store, root = objects.file_system(place)
    store.put(f"{tmp_path}/run/", f"{root}/", recursive=True)
    workdir = stores.own("--workdir", place)
    checkpoints = checkpoint.Checkpoints(workdir, kept=5)
    assert checkpoints.steps == [2] and restored(checkpoints) == 2
    checkpoints.close()
    stores.close(workdir)
    back = tmp_path / "back"
    store.get(f"{root}/checkpoints/2/", f"{back}/checkpoints/2/", recursive=True)
    assert restored(checkpoint.Checkpoints(back)) == 2


def test_a_disk_takes_over_what_was_written_there(place, tmp_path):
    workdir, checkpoints = saved(place, 6)
    checkpoints.close()
    stores.close(workdir)
    store, root = objects.file_system(place)
    store.get(f"{root}/checkpoints/6/", f"{tmp_path}/run/checkpoints/6/", recursive=True)
    assert checksums.damage(tmp_path / "run/checkpoints/6") is None
    assert restored(checkpoint.Checkpoints(tmp_path / "run")) == 6
    assert stores.checkpoint("--checkpoint", f"{place}/checkpoints/6/") == f"{place}/checkpoints/6"
    assert (epath.Path(f"{place}/checkpoints/6") / "state").is_dir()


PROGRAM = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from msd_jax.io import jsonl, stores
from msd_jax.parallel import distributed
from msd_jax.training import checkpoint

place, steps, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
distributed.start(sys.argv)
with distributed.together():
    workdir = stores.own("--workdir", place)
    checkpoints = checkpoint.Checkpoints(workdir)
    rows = jsonl.JsonLines(workdir / "metrics.jsonl")
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    x = jax.make_array_from_callback((4, 1024), sharding, lambda index: np.ones((4, 1024), np.float32)[index])
    step = 0
    for step, found, _ in checkpoints.restorable({"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}):
        x = found["x"]
        if distributed.is_first():
            print("resumed from", step, flush=True)
        break
    rows.replace([row for row in rows.read() if row["step"] <= step])
    take = jax.jit(lambda x, step: jnp.sin(1.3 * x + step))
    while step < steps:
        x, step = take(x, step), step + 1
        rows.append([{"step": step}])
        stores.check(workdir)
        if step % 2 == 0:
            checkpoints.save(step, {"x": x}, {})
        time.sleep(pause)
    checkpoints.close()
    stores.close(workdir)
"""


def start(place: str, tmp_path: pathlib.Path, environment, steps: int, pause: float) -> list[subprocess.Popen]:
    """Two processes, each with a directory of its own, as two machines have them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    made = []
    for number in (0, 1):
        (tmp_path / str(number)).mkdir(exist_ok=True)
        flags = (place, str(steps), str(pause), coordinator, "--processes=2", f"--process_id={number}")
        variables = os.environ | environment | {"JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path / str(number))}
        variables["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *flags], cwd=REPOSITORY, env=variables, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        made.append(process)
    return made


def test_two_machines_are_killed_resumed_and_end_with_the_same_bits(place, tmp_path, environment):
    killed = start(place, tmp_path, environment, 1000, 0.05)
    deadline = time.monotonic() + 150
    while "checkpoints/4/MANIFEST-0-of-1.json" not in content(place):
        assert time.monotonic() < deadline and killed[0].poll() is None, killed[0].communicate()[0]
        time.sleep(0.05)
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (tmp_path / "0").rename(tmp_path / "gone")  # the machine's successor has an empty disk
    whole = [int(name.split("/")[1]) for name in content(place) if "MANIFEST" in name]
    steps = max(whole) + 4
    outputs = [process.communicate(timeout=150)[0] for process in start(place, tmp_path, environment, steps, 0)]
    assert f"resumed from {max(whole)}\n" in outputs[0], outputs
    x, take = jnp.ones((4, 1024)), jax.jit(lambda x, step: jnp.sin(1.3 * x + step))
    for step in range(steps):
        x = take(x, step)
    args = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=LIKE["x"].sharding)}
    workdir = stores.own("--workdir", place)
    step, found, _ = next(checkpoint.Checkpoints(workdir).restorable(args))
    assert step == steps and np.array_equal(found["x"], x)
    assert [row["step"] for row in jsonl.read(workdir / "metrics.jsonl")] == list(range(1, steps + 1))
    stores.close(workdir)


def test_another_store_for_several_machines_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(stores.distributed, "from_all", lambda look_up: ["one", "two"])
    with pytest.raises(UserError, match=r"^--workdir=s3://b/x: the processes are on 2 machines \(one, two, ...\), "):
        stores.own("--workdir", "s3://b/x")
