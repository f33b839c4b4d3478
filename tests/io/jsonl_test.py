"""The files of a run: whole lines only, and nothing twice after a resume."""

import json

from msd_jax.io import jsonl
from msd_jax.training import metrics, trackers


def test_a_resume_drops_what_comes_after_its_step_and_a_torn_line(tmp_path):
    tracked = trackers.Trackers(("tensorboard",), tmp_path, {})
    writer = metrics.Metrics(tmp_path, 0, tracked)
    for step in range(1, 5):
        writer.scalars(step, {"loss": step / 2})
        writer.completions(step, [{"response": f"línea {step}"}])
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in jsonl.read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    resumed = metrics.Metrics(tmp_path, 2)
    resumed.scalars(3, {"loss": 7.0})
    resumed.close()
    rows = jsonl.read(tmp_path / "metrics.jsonl")
    assert rows == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 7.0}]
    assert [row["step"] for row in jsonl.read(tmp_path / "completions.jsonl")] == [1, 2]
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_log_loses_its_last_line_at_most(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    log = jsonl.JsonLines(path)
    assert log.read() == [] and not path.exists()
    rows = [{"text": "línea\u2028\n\x85"}, {"n": 1}, {"n": 2}]
    log.append(rows[:2])
    log.append(rows[2:])
    assert log.read() == rows == jsonl.read(path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = jsonl.JsonLines(path).read()
        assert kept == rows[: whole[:size].count(b"\n")]
        jsonl.JsonLines(path).append([{"new": size}])
        assert jsonl.read(path) == [*kept, {"new": size}]


def test_what_is_not_finite_is_null(tmp_path):
    writer = metrics.Metrics(tmp_path, 0)
    writer.scalars(1, {"loss": float("nan"), "grad_norm": float("inf"), "kl": 1.0})
    writer.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "loss": None, "grad_norm": None, "kl": 1.0}
