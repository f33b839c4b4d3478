"""Workdirs in an object store, against a local server that speaks S3."""

import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file

from msd_jax.errors import UserError
from msd_jax.io import checksums, jsonl, lease, objects, retries, stores
from msd_jax.models import location, tensor_files, tokenizer
from msd_jax.testbed import tiny
from tests.conftest import REPOSITORY

try:
    import botocore.exceptions
    import s3fs  # noqa: F401
    from moto.server import ThreadedMotoServer
except ImportError as error:
    pytest.skip(f"a local object store needs s3fs and moto[server]: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def environment():
    """Variables with which boto's libraries find the server; set in this process too."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    variables = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    variables |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables
    server.stop()


@pytest.fixture
def bucket(environment, request) -> "Bucket":
    return Bucket("".join(c for c in request.node.name.lower() if c.isalnum())[:60])


class Bucket:
    def __init__(self, name: str):
        self.store, _ = objects.file_system("s3://x")
        self.store.mkdir(name)
        self.name, self.place = name, f"s3://{name}/runs/one"

    def objects(self) -> dict[str, bytes]:
        prefix = f"{self.name}/runs/one/"
        return {path.removeprefix(prefix): self.store.cat_file(path) for path in self.store.find(self.name)}


def made(bucket, tmp_path, name: str = "copy") -> stores.Copy:
    copy = stores.Copy("--workdir", bucket.place, tmp_path / name)
    copy.fetch()
    return copy


def checkpoint(workdir: pathlib.Path, step: int) -> pathlib.Path:
    directory = workdir / "checkpoints" / str(step)
    (directory / "state" / "d").mkdir(parents=True)
    (directory / "state" / "d" / "array").write_bytes(np.random.default_rng(step).bytes(1000))
    (directory / "data").write_text(str(step))
    return directory


def test_what_changes_is_written_back_and_fetched_again(bucket, tmp_path):
    copy, workdir = made(bucket, tmp_path), tmp_path / "copy"
    rows = jsonl.JsonLines(workdir / "metrics.jsonl")
    rows.append([{"step": 1}])
    (workdir / "eval" / "0").mkdir(parents=True)
    (workdir / "eval" / "0" / "summary.json").write_text("{}")
    copy.write()
    rows.append([{"step": 2}])
    (workdir / "eval" / "0" / "summary.json").unlink()
    (workdir / "model.unfinished").mkdir()
    (workdir / "model.unfinished" / "config.json").write_text("{}")
    (workdir / "lock.json").write_text("{}")
    copy.write()
    assert bucket.objects() == {"metrics.jsonl": b'{"step": 1}\n{"step": 2}\n'}
    made(bucket, tmp_path, "again")
    assert jsonl.read(tmp_path / "again" / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_stores_whose_buckets_have_one_name_have_copies_of_their_own(monkeypatch):
    of_one = stores._identity_of_store("s3://bucket/runs/one")
    assert of_one == stores._identity_of_store("s3://bucket/runs/one/") != stores._identity_of_store("s3://bucket/runs")
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AZURE_STORAGE_ACCOUNT_NAME", "STORAGE_EMULATOR_HOST"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "another")
            assert stores._identity_of_store("s3://bucket/runs/one") != of_one


def test_a_store_that_fails_for_a_moment_is_asked_again(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(retries, "PAUSES", (0.0, 0.0, 0.0))
    copy, workdir, failures = made(bucket, tmp_path), tmp_path / "copy", []
    put_file = copy._store.put_file

    def fails(error: Exception, times: int):
        def put(*arguments):
            failures.append(error)
            if len(failures) <= times:
                raise error
            put_file(*arguments)

        failures.clear()
        monkeypatch.setattr(copy._store, "put_file", put)

    slow_down = botocore.exceptions.ClientError({"ResponseMetadata": {"HTTPStatusCode": 503}}, "PutObject")
    for error in (slow_down, TimeoutError(), botocore.exceptions.ReadTimeoutError(endpoint_url="x")):
        (workdir / "a").write_text(repr(error))
        fails(error, times=2)
        copy.write()
        assert len(failures) == 3 and bucket.objects() == {"a": repr(error).encode()}
        assert "retrying in 0 s" in capsys.readouterr().err
    (workdir / "a").write_text("kept here")
    fails(slow_down, times=99)
    with pytest.raises(UserError, match="cannot be reached"):
        copy.write()
    assert len(failures) == 4
    fails(botocore.exceptions.ClientError({"ResponseMetadata": {"HTTPStatusCode": 403}}, "PutObject"), times=99)
    with pytest.raises(UserError, match="cannot be reached"):
        copy.write()
    assert len(failures) == 1  # no pause mends what is forbidden


def test_only_what_has_changed_is_written(bucket, tmp_path, monkeypatch):
    copy, workdir, put = made(bucket, tmp_path), tmp_path / "copy", []
    (workdir / "a").write_text("1")
    (workdir / "b").write_text("1")
    copy.write()
    monkeypatch.setattr(copy, "_write_one", lambda name, path: put.append(name))
    copy.write()
    assert not put
    (workdir / "b").write_text("22")
    copy.write()
    assert put == ["b"]


def test_a_checkpoint_is_written_once_it_is_sealed_its_manifest_last(bucket, tmp_path, monkeypatch):
    copy, workdir, put = made(bucket, tmp_path), tmp_path / "copy", []
    write_one = copy._write_one
    monkeypatch.setattr(copy, "_write_one", lambda name, path: (put.append(name), write_one(name, path)))
    directory = checkpoint(workdir, 4)
    (workdir / "metrics.jsonl").write_text('{"step": 4}\n')
    copy.write()
    assert put == ["metrics.jsonl"]
    (workdir / "metrics.jsonl").write_text('{"step": 4}\n{"step": 5}\n')
    checksums.seal(directory)
    copy.write()
    files = {"checkpoints/4/data", "checkpoints/4/state/d/array"}
    assert put[1] == "metrics.jsonl" and set(put[2:4]) == files and put[4:] == ["checkpoints/4/MANIFEST-0-of-1.json"]


def test_of_a_checkpoint_that_was_not_written_whole_nothing_is_fetched_and_nothing_stays(bucket, tmp_path):
    copy, workdir = made(bucket, tmp_path), tmp_path / "copy"
    for step in (4, 8):
        checksums.seal(checkpoint(workdir, step))
    copy.write()
    bucket.store.rm_file(f"{bucket.name}/runs/one/checkpoints/8/MANIFEST-0-of-1.json")  # as if killed before it
    guest = stores.guest("--checkpoint", f"{bucket.place}/checkpoints/4", everything=True)
    assert checksums.sealed(guest) and checksums.damage(guest) is None and guest.name == "4"
    assert [name for name in bucket.objects() if "/8/" in name]  # a guest removes nothing
    owner = stores.own("--workdir", bucket.place)
    assert [path.name for path in (owner / "checkpoints").iterdir()] == ["4"] and checksums.sealed(
        owner / "checkpoints/4"
    )
    assert not [name for name in bucket.objects() if "/8/" in name]
    stores.close(owner)
    assert "lock.json" not in bucket.objects()


def test_a_step_that_makes_room_is_removed_manifest_first(bucket, tmp_path, monkeypatch):
    copy, workdir, removed = made(bucket, tmp_path), tmp_path / "copy", []
    directory = checkpoint(workdir, 4)
    checksums.seal(directory)
    copy.write()
    remove = copy._remove
    monkeypatch.setattr(copy, "_remove", lambda name: (removed.append(name), remove(name)))
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    directory.rmdir()
    copy.write()
    assert removed[0] == "checkpoints/4/MANIFEST-0-of-1.json" and len(removed) == 3 and not bucket.objects()


def test_a_report_fetches_no_checkpoint_and_no_weights(bucket, tmp_path):
    copy, workdir = made(bucket, tmp_path), tmp_path / "copy"
    checksums.seal(checkpoint(workdir, 4))
    (workdir / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (workdir / "model" / name).write_text("{}")
    copy.write()
    guest = stores.guest("--workdir", bucket.place)
    assert {path.relative_to(guest).as_posix() for path in guest.rglob("*") if path.is_file()} == {"model/config.json"}
    (guest / "report").mkdir()
    (guest / "report" / "summary.md").write_text("new")
    assert stores.told(guest / "report" / "summary.md") == f"{bucket.place}/report/summary.md"
    stores.close(guest)
    objects = bucket.objects()
    assert objects["report/summary.md"] == b"new" and "model/model.safetensors" in objects and len(objects) == 6


def test_a_model_is_fetched_once_for_each_content(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    source, place = tiny.model("llama3_8b"), f"s3://{bucket.name}/models/tiny"
    for path in source.iterdir():
        bucket.store.put_file(str(path), f"{bucket.name}/models/tiny/{path.name}")
    bucket.store.pipe_file(f"{bucket.name}/models/tiny/pytorch_model.bin", b"pickle")
    bucket.store.pipe_file(f"{bucket.name}/models/tiny/original/params.json", b"{}")
    first = location.resolve(place)
    assert first.name == "tiny" and {path.name for path in first.glob("[!.]*")} == {
        path.name for path in source.iterdir()
    }
    read, whole = tensor_files.open_all(first), load_file(source / "model.safetensors")  # by ranges of bytes
    assert read.keys() == whole.keys()
    assert all(np.array_equal(read[name].whole(), tensor) for name, tensor in whole.items())
    inode = (first / "config.json").stat().st_ino
    assert location.resolve(place + "/") == first and (first / "config.json").stat().st_ino == inode
    assert tokenizer.load_tokenizer(place).chat_template
    bucket.store.pipe_file(f"{bucket.name}/models/tiny/generation_config.json", b'{"eos_token_id": 7}')
    assert (location.resolve(place) / "generation_config.json").read_text() == '{"eos_token_id": 7}'
    with pytest.raises(UserError, match=rf"^config.model.path=s3://{bucket.name}/nothing holds none of \*.safetensors"):
        location.resolve(f"s3://{bucket.name}/nothing")


HOLDER = """
import sys, time
from msd_jax.io import stores
stores.own("--workdir", sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_run_is_refused_and_one_that_died_is_not_in_the_way(bucket, environment):
    held = [sys.executable, "-c", HOLDER, bucket.place]
    holder = subprocess.Popen(held, cwd=REPOSITORY, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"^another run is writing to {bucket.place}: process {holder.pid} on "):
        stores.own("--workdir", bucket.place)
    holder.kill()
    holder.wait()
    owner = stores.own("--workdir", bucket.place)
    stores.check(owner / "anywhere")
    stores.close(owner)


ENDS_IN_ERROR = """
import sys
from msd_jax.io import stores
from msd_jax.parallel import distributed
distributed.start(["program"])
with distributed.together():
    workdir = stores.own("--workdir", sys.argv[1])
    (workdir / "metrics.jsonl").write_text("{}")
    sys.exit("error: it ends")
"""


def test_what_ends_in_an_error_is_written_back_and_released(bucket, environment):
    command = [sys.executable, "-c", ENDS_IN_ERROR, bucket.place]
    variables = os.environ | environment | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("error: it ends\n") and "note:" not in done.stderr
    assert bucket.objects() == {"metrics.jsonl": b"{}"}


def test_a_silent_holder_elsewhere_loses_its_lease(bucket, monkeypatch):
    monkeypatch.setattr(lease, "SECONDS_OF_SILENCE", 1.5)
    monkeypatch.setattr(lease, "SECONDS_BETWEEN_BEATS", 0.2)
    path = f"{bucket.name}/runs/one/lock.json"
    first = lease.Lease(bucket.store, path, bucket.place)
    elsewhere = json.loads(bucket.store.cat_file(path)) | {"host": "elsewhere", "token": "another"}
    bucket.store.pipe_file(path, json.dumps(elsewhere).encode())
    deadline = time.monotonic() + 30
    while not first._lost and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(UserError, match=rf"{bucket.place} was taken over by process \d+ on elsewhere"):
        first.check()
    first.release()
    assert bucket.objects()["lock.json"]  # it is the other's
    second = lease.Lease(bucket.store, path, bucket.place)  # after a while without a beat
    second.check()
    second.release()
    assert not bucket.objects()


@pytest.mark.parametrize(
    "place, message",
    [
        ("az://b/x", r"--workdir=az://b/x needs adlfs: pip install adlfs$"),
        ("s3://no-such-bucket/x", r"--workdir=s3://no-such-bucket/x cannot be reached: .*bucket.*"),
        ("hf://b/x", r"--workdir=hf://b/x: hf:// is not read or written directly"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line(environment, monkeypatch, place, message):
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(UserError, match=f"^{message}") as error:
        stores.own("--workdir", place)
    assert "\n" not in str(error.value)


def run(workdir: str, **options) -> subprocess.Popen:
    flags = ("--config.train.steps=20", "--config.train.checkpoints.every=4", "--config.eval.limit=8")
    flags += ("--config.eval.passes=('greedy',)",)
    command = [sys.executable, "-m", "msd_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}", *flags]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=os.environ | {"XLA_FLAGS": ""}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, **options,
    )  # fmt: skip


def finished(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


TIMES = ("seconds", "per_second", "compilations")


def numbers(text: bytes) -> list[dict]:
    rows = map(json.loads, text.decode().splitlines())
    return [{key: value for key, value in row.items() if not key.endswith(TIMES)} for row in rows]


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> pathlib.Path:
    """A run that was not interrupted, on a disk."""
    workdir = tmp_path_factory.mktemp("runs") / "local"
    finished(run(str(workdir)))
    return workdir


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_in_the_store_is_killed_resumed_and_ends_with_the_same_bits(bucket, local, how):
    process = run(bucket.place)
    deadline = time.monotonic() + 400
    while not any("/MANIFEST-" in name for name in bucket.store.find(bucket.name)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (-how, 128 + how), output
    output = finished(run(bucket.place))
    assert f" of {bucket.place}\n" in output and "resumed from step" in output
    assert f"report: {bucket.place}/report/report.html; model card: {bucket.place}/model/README.md" in output
    objects = bucket.objects()
    for name in ("model/model.safetensors", "eval/0/summary.json", "eval/20/summary.json", "completions.jsonl"):
        assert objects[name] == (local / name).read_bytes(), name
    assert numbers(objects["metrics.jsonl"]) == numbers((local / "metrics.jsonl").read_bytes())
    steps = {name.split("/")[1] for name in objects if name.startswith("checkpoints/")}
    assert steps == {"16", "20"} and "lock.json" not in objects
    made = [sys.executable, "-m", "msd_jax.report", f"--workdir={bucket.place}"]
    bucket.store.rm_file(f"{bucket.name}/runs/one/report/summary.json")
    output = subprocess.run(made, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    assert f"report: {bucket.place}/report/report.html" in output
    assert json.loads(bucket.objects()["report/summary.json"])["training"]["steps"] == 20
