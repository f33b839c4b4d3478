"""Each tracker gets rows, config, tables and page; a resumed run is the same one; and none holds the run up."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import time

import pytest
from msd_jax.configs import default

from msd_jax.errors import UserError
from msd_jax.training import trackers
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(trackers, "PATIENCE", 600.0)  # machines of CI are slow to start the libraries


CONFIG = {"seed": 3, "data.languages.sw": 1.0, "eval.benchmarks": []}


def reads(name):
    """Skips without the package, which is heavy and an extra."""
    missing = importlib.util.find_spec(trackers.KINDS[name][0]) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed (pip install 'msd-jax[{name}]')")


def run_twice(name, workdir):
    """Three steps, the last of which is lost; resumed from the second, the third again and a fourth; the results."""
    first = trackers.Trackers((name,), workdir, CONFIG)
    for step in (1, 2, 3):
        first.scalars(step, {"kl": step / 2, "loss": float("nan") if step == 2 else 1.0})
    first.close()
    resumed = trackers.Trackers((name,), workdir, CONFIG, step=2)
    for step in (3, 4):
        resumed.scalars(step, {"kl": float(step), "loss": 1.0})
    resumed.close()
    (workdir / "report").mkdir()
    for file in ("config.json", "report/summary.json", "report/summary.md", "report/report.html"):
        (workdir / file).write_text(f"<p>{file}</p>")
    config = default.get_config()
    config.train.trackers = (name, "tensorboard")
    trackers.publish(config, workdir)


FILES = {"config.json", "summary.json", "summary.md", "report.html"}


def test_tensorboard(tmp_path):
    from tensorboardX.proto import event_pb2

    run_twice("tensorboard", tmp_path)
    seen, purged = [], []
    for file in sorted((tmp_path / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):  # records: length, its checksum, event, its checksum
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            purged += [event.step] if event.session_log.status == event.session_log.START else []
            seen += [(event.step, value.simple_value) for value in event.summary.value if value.tag == "kl"]
    assert sorted(seen) == [(1, 0.5), (2, 1.0), (3, 1.5), (3, 3.0), (4, 4.0)] and 3 in purged


@reads("mlflow")
def test_mlflow(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    run_twice("mlflow", tmp_path)
    client = mlflow.MlflowClient()
    [experiment] = [e for e in client.search_experiments() if e.name == "msd_jax"]
    [run] = client.search_runs([experiment.experiment_id])
    rows = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "kl")]
    assert sorted(rows) == [(1, 0.5), (2, 1.0), (3, 1.5), (3, 3.0), (4, 4.0)] and run.info.status == "FINISHED"
    assert run.data.params["seed"] == "3" and run.info.run_name.startswith(tmp_path.name)
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == FILES


def wandb_records(path):
    """Of a .wandb file, which is a log of LevelDB's: chunks of records in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


@reads("wandb")
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_twice("wandb", tmp_path)
    sessions = sorted((tmp_path / "wandb").glob("offline-run-*"))
    id_ = json.loads((tmp_path / "tracked.json").read_text())["id"]
    assert len(sessions) == 3 and {session.name.split("-")[3] for session in sessions} == {id_}
    written = [record for session in sessions for record in wandb_records(next(session.glob("*.wandb")))]
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in written
    ]
    assert [(row["step"], row["kl"]) for row in rows if "kl" in row] == [
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
        (3, 3.0),
        (4, 4.0),
    ]
    assert any(key.startswith("report") for row in rows for key in row), rows
    runs = [record.run for record in written if record.HasField("run")]
    assert {run.run_id for run in runs} == {id_} and {run.project for run in runs} == {"msd_jax"}
    assert any("data.languages.sw" in (item.key, *item.nested_key) for run in runs for item in run.config.update)
    uploads = [record.request.log_artifact.artifact for record in written if record.request.HasField("log_artifact")]
    uploads += [record.artifact for record in written if record.HasField("artifact")]
    assert any({entry.path for entry in artifact.manifest.contents} == FILES for artifact in uploads)


@reads("trackio")
def test_trackio_local(tmp_path):
    """In a process of its own: it reads where it writes when it is imported."""
    code = "import pathlib, sys; from tests.training import trackers_test as t"
    command = [sys.executable, "-c", f"{code}; t.run_twice('trackio', pathlib.Path(sys.argv[1]))", str(tmp_path)]
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
    [database] = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    kl = [(step, json.loads(metrics)["kl"]) for _, step, metrics in rows if "kl" in json.loads(metrics)]
    assert sorted(kl) == [(1, 0.5), (2, 1.0), (3, 1.5), (3, 3.0), (4, 4.0)] and len({row[0] for row in rows}) == 1
    kept = {
        path.read_text() for path in (tmp_path / "trackio").rglob("*") if path.is_file() and path.stat().st_size < 99
    }
    assert kept >= {f"<p>{name}</p>" for name in ("config.json", "report/report.html")}


class Broken:
    """A tracker that fails at its second row."""

    def __init__(self, origin):
        self.rows = 0

    def scalars(self, step, values):
        self.rows += 1
        if self.rows == 2:
            raise ConnectionError("no route\nto host")

    def close(self):
        """It is closed all the same."""


class Slow(Broken):
    def scalars(self, step, values):
        time.sleep(5)


def test_one_that_fails_is_told_of_once_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers.KINDS, "wandb", ("json", Broken))
    both = trackers.Trackers(("wandb", "tensorboard"), tmp_path, CONFIG)
    for step in range(1, 6):
        both.scalars(step, {"kl": 1.0})
    both.close()
    told = capsys.readouterr().out
    assert told.count("wandb") == 1
    assert "the tracker wandb failed (ConnectionError: no route to host); the run goes on without it" in told
    assert sum(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir()) > 5 * 20


def test_a_slow_one_holds_nothing_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers.KINDS, "wandb", ("json", Slow))
    slow = trackers.Trackers(("wandb",), tmp_path, CONFIG)
    start = time.monotonic()
    slow.scalars(1, {"kl": 1.0})
    slow.scalars(2, {"kl": 1.0})
    monkeypatch.setattr(trackers, "PATIENCE", 0.1)
    slow.close()
    assert time.monotonic() - start < 4
    assert "note: wandb: not all was sent within 0.1 s; the files here are whole" in capsys.readouterr().out


def test_a_package_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(trackers.KINDS, "mlflow", ("no_such_package", Broken))
    with pytest.raises(
        UserError, match=r"config.train.trackers: mlflow is not installed: pip install 'msd-jax\[mlflow"
    ):
        trackers.require_installed(("tensorboard", "mlflow"))


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.distributed, "is_first", lambda: False)
    quiet = trackers.Trackers(("tensorboard",), tmp_path, CONFIG)
    quiet.scalars(1, {"kl": 1.0})
    quiet.close()
    assert not list(tmp_path.iterdir())
