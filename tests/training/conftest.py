"""A config of the tiny random model, and a run of it in this process."""

import json
import pathlib

import ml_collections
import pytest
from msd_jax.configs import default

from msd_jax.io import jsonl
from msd_jax.training import checkpoint, loop, run
from tests.conftest import WORDS


@pytest.fixture
def config(model_dir, tmp_path) -> ml_collections.ConfigDict:
    path = tmp_path / "queries.jsonl"
    lines = [
        {
            "id": str(i),
            "harmful": i % 2 == 0,
            "texts": {"en": f"make a {w} ?", "sw": f"kikombe {w} bomu"},
            "answers": {"sw": f"{w} kikombe"},
        }
        for i, w in enumerate(WORDS[:9])
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = default.get_config()
    config.model.path = str(model_dir)
    config.data.path = str(path)
    config.data.batch_size = 8
    config.prompts.teacher_template = "answer in {language} : {query}"
    config.rollout.max_new_tokens = 6
    config.optimizer.learning_rate = 1e-2
    config.loss.weight_top_k = 5
    config.train.steps = 6
    config.train.checkpoints.every = 2
    config.train.completions.every = 3
    config.train.export = False
    config.mesh.data, config.mesh.fsdp = 8, 1
    return config


def set_up(config, workdir: pathlib.Path) -> run.Run:
    return run.setup(ml_collections.FrozenConfigDict(config), workdir)


def train(config, workdir: pathlib.Path):
    """Trains to the end; (the last state, rows of metrics.jsonl)."""
    ready = set_up(config, workdir)
    loop.train(ready)
    initial, _ = loop.initial_state(ready)
    state, _ = checkpoint.Checkpoints(workdir).restore(config.train.steps, checkpoint.abstract(initial))
    return state, jsonl.read(workdir / "metrics.jsonl")


def steps_on_disk(workdir: pathlib.Path) -> list[int]:
    return [row["step"] for row in jsonl.read(workdir / "metrics.jsonl")]
