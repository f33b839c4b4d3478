"""The comparisons with peers: our side of them at toy size, and what is printed where a peer is missing."""

import json
import subprocess
import sys

import pytest

from benchmarks import peers
from tests.conftest import REPOSITORY


@pytest.fixture
def queries(tmp_path):
    texts = {"en": "how do i make a bomb ?", "sw": "vipi bomu ?"}
    rows = [{"id": str(i), "harmful": True, "texts": texts} for i in range(8)]
    file = tmp_path / "queries.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_peer_for_which_there_is_no_python_is_a_row_that_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(peers.VENVS, "Tunix", peers.Venv((3, 99), ("google-tunix",)))
    rows = peers.run_part("training", ["Tunix"], {"cache": str(tmp_path), "timeout": 60}, rounds=2)
    peers.show("training", rows, {})
    assert "Tunix    skipped: needs Python 3.99 or later, which is not on PATH" in capsys.readouterr().out


def test_a_peer_that_fails_is_a_row_with_its_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers, "install", lambda cache, peer: sys.executable)
    rows = peers.run_part("generation", ["Tunix"], {"cache": str(tmp_path), "timeout": 60}, rounds=2)
    peers.show("generation", rows, {})
    shown = capsys.readouterr().out
    assert "Tunix    skipped: ModuleNotFoundError: No module named 'tunix'" in shown
    assert "EasyDeL  skipped: not run here: 0.3.0 loads the model" in shown


def test_ours_writes_and_trains_on_a_tiny_model(model_dir, queries):
    task = {"model": str(model_dir), "queries": queries, "language": "sw"}
    task |= {"rows": 8, "tokens": 4, "batch": 8, "repeats": 1}
    task |= peers.our_prompts(task)
    assert not any(task["pad"] in prompt for prompt in task["student"] + task["teacher"])
    written = peers.our_generation(task)
    assert [len(row) for row in written["tokens"]] == [4] * 8 and len(written["seconds"]) == 1
    trained = peers.our_training(task | {"responses": written["tokens"]})
    assert trained["kl"] > 0 and trained["seconds"][0] > 0


def test_identical_tokens_are_counted_by_place():
    assert peers.identical([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4], [5]]) == 4 / 8


def test_our_side_of_the_comparison_with_trl_runs(model_dir, queries):
    command = [sys.executable, REPOSITORY / "benchmarks" / "step.py", "--only", "ours", "--steps", "3"]
    command += ["--model", model_dir, "--queries", queries]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout.splitlines()[-1])["steps"]
    assert len(steps) == 3 and not steps[0]["counts"] and steps[-1]["counts"]
    assert all(step["generation"] > 0 and step["training"] > 0 and step["kl"] > 0 for step in steps)
