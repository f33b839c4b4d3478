"""A judge that does not answer: results are written, no attack success is shown, and the exit code says so."""

import json
import os
import subprocess
import sys

import pytest

from msd_jax.evaluation import rates
from tests.conftest import REPOSITORY
from tests.evaluation.judges.server import Server, send

GRID = """
import ml_collections
from msd_jax.configs import quickstart

def get_config():
    config = quickstart.get_config()
    config.ablation.variants = ml_collections.ConfigDict({"one": {}})
    return config
"""


@pytest.mark.parametrize(
    ("command", "config", "evaluation"),
    [
        ("main", "configs/quickstart.py", "eval/0"),
        ("evaluate", "configs/quickstart.py", "."),
        ("main", "grid.py", "one/0/eval/0"),  # a grid of runs
    ],
)
def test_a_dead_judge_is_exit_code_3(tmp_path, command, config, evaluation):
    (tmp_path / "grid.py").write_text(GRID)
    config = REPOSITORY / config if config.startswith("configs/") else tmp_path / config
    server, out = Server(lambda number, body: send(404, {"error": "gone"})), tmp_path / "out"
    flags = [
        *(f"--config={config}", "--config.eval.limit=3", "--config.eval.max_new_tokens=4"),
        *("--config.judge.kind=openai", f"--config.judge.openai.url={server.url}", "--config.judge.openai.model=x"),
        *("--config.judge.openai.addresses=private", "--config.judge.openai.key_variable="),
        *("--config.judge.openai.retries=0", "--config.train.steps=0", "--config.eval.languages=('en', 'sw')"),
        f"--{dict(main='workdir', evaluate='out')[command]}={out}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", f"msd_jax.{command}", *flags],
        cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""}, check=False,
    )  # fmt: skip
    server.close()
    assert done.returncode == 3, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: the judge gave no verdict") and server.requests
    assert "Traceback" not in done.stderr and "0.0% to 0.0%" not in done.stdout
    summary = json.loads((out / evaluation / "summary.json").read_text())
    entries = [entry for levels in summary.values() for entry in levels["languages"].values()]
    assert all(entry["asr"] is None for entry in entries) and any(entry["unjudged"] for entry in entries)


def test_without_verdict():
    def summary(**entry):
        return {"queries": {"languages": {"en": entry}, "groups": {}}}

    assert rates.without_verdict(summary(unjudged_n=2, asr_n=0, over_refusal_n=0))
    assert rates.without_verdict(summary(unjudged_t1_n=2, asr_t1_n=0))
    assert not rates.without_verdict(summary(unjudged_n=2, asr_n=1, over_refusal_n=0))
    assert not rates.without_verdict(summary(unjudged_n=2, asr_n=0, over_refusal_n=1))
    assert not rates.without_verdict(summary(accuracy_n=2))  # no judge was asked
    assert not rates.without_verdict({})
