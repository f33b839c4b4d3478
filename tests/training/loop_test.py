"""The loop, on a tiny random model: nothing is lost at a resume, and what is written says what was trained."""

import json
import pathlib

import jax
import ml_collections
import numpy as np
import pytest
from msd_jax.configs import default
from safetensors.numpy import load_file

from msd_jax.io import jsonl
from msd_jax.models import pretrained, trained
from msd_jax.parallel import sharding
from msd_jax.training import checkpoint, loop, metrics
from tests.conftest import WORDS


@pytest.fixture
def config(model_dir, tmp_path) -> ml_collections.ConfigDict:
    path = tmp_path / "queries.jsonl"
    lines = [
        {"id": str(i), "harmful": i % 2 == 0, "texts": {"en": f"make a {w} ?", "sw": f"kikombe {w} bomu"}}
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


def run(config, workdir: pathlib.Path):
    trainer = loop.Trainer(ml_collections.FrozenConfigDict(config), workdir)
    trainer.train()
    state, _ = checkpoint.Checkpoints(workdir).restore(config.train.steps, checkpoint.abstract(trainer.initial_state()))
    return state, jsonl.read(workdir / "metrics.jsonl")


TIMES = ("seconds", "per_second", "compilations")


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in rows]


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "policy, kind, rank",
    [("on_policy", "ema", 0), ("on_policy", "ema", 2), ("off_policy", "frozen", 0), ("mixed", "frozen", 0)],
)
def test_a_killed_run_ends_bit_identical(config, tmp_path, policy, kind, rank):
    """Killed after step 5, whose checkpoint is that of step 4: parameters, EMA teacher, moments, metrics."""
    config.rollout.policy, config.teacher.kind, config.model.lora.rank = policy, kind, rank
    unbroken, unbroken_rows = run(config, tmp_path / "unbroken")

    class Dies(loop.Trainer):
        def step(self, step, state, writer):
            if step == 5:
                self.checkpoints.close()
                raise Killed
            return super().step(step, state, writer)

    with pytest.raises(Killed):
        Dies(ml_collections.FrozenConfigDict(config), tmp_path / "killed").train()
    assert len(jsonl.read(tmp_path / "killed" / "metrics.jsonl")) == 5
    resumed, resumed_rows = run(config, tmp_path / "killed")
    jax.tree.map(np.testing.assert_array_equal, resumed, unbroken)
    assert without_times(resumed_rows) == without_times(unbroken_rows)
    assert [row["step"] for row in resumed_rows] == [1, 2, 3, 4, 5, 6]
    seen = jsonl.read(tmp_path / "killed" / "completions.jsonl")
    assert seen == jsonl.read(tmp_path / "unbroken" / "completions.jsonl") and len(seen) == 8


@pytest.mark.parametrize("policy", ["on_policy", "off_policy"])
def test_responses_are_written_to_the_prompts_that_are_trained_on(config, tmp_path, policy):
    config.rollout.policy = policy
    trainer = loop.Trainer(ml_collections.FrozenConfigDict(config), tmp_path / "run")
    seen, generate, train_step = {}, trainer.generator, trainer.train_step

    class Recorder:
        sampling, pad_id = generate.sampling, generate.pad_id

        def __call__(self, params, prompt_BxP, length_B, *rest):
            seen["rollout"] = (prompt_BxP, length_B)
            return generate(params, prompt_BxP, length_B, *rest)

    def recorded(state, frozen, batch):
        seen["batch"] = jax.device_get(batch)
        return train_step(state, frozen, batch)

    trainer.respond._generator, trainer.train_step = Recorder(), recorded
    trainer.step(0, trainer.initial_state(), metrics.Metrics(tmp_path / "run", 0))
    batch = seen["batch"]
    trained = {
        "on_policy": (batch.student_prompt_BxP, batch.student_length_B),
        "off_policy": (batch.teacher_prompt_BxP, batch.teacher_length_B),
    }
    for generated, wanted in zip(seen["rollout"], trained[policy]):
        np.testing.assert_array_equal(generated, wanted)


def test_completions_tell_what_each_role_saw(config, tmp_path):
    config.train.steps = 3
    run(config, tmp_path / "run")
    entry = jsonl.read(tmp_path / "run" / "completions.jsonl")[0]
    assert entry["step"] == 3 and entry["language"] == "sw" and entry["policy"] == "on_policy"
    assert "kikombe" in entry["student_prompt"] and "answer in" not in entry["student_prompt"]
    assert "answer in" in entry["teacher_prompt"] and "kikombe" not in entry["teacher_prompt"]
    for name in ("kl", "weight", "w_T", "w_S"):
        assert len(entry[name]) == len(entry["tokens"]) > 0


@pytest.mark.parametrize("policy", ["on_policy", "off_policy"])
def test_a_retained_query_costs_nothing_while_the_student_is_the_initial_model(config, tmp_path, policy):
    """Both roles see the same prompt, and the same weights give the same row: a divergence of exactly 0."""
    config.data.retain_fraction, config.rollout.policy = 0.5, policy
    config.train.steps, config.train.completions.every, config.train.completions.kept = 1, 1, 8
    run(config, tmp_path / "run")
    kl = {True: [], False: []}
    for row in jsonl.read(tmp_path / "run" / "completions.jsonl"):
        assert (row["student_prompt"] == row["teacher_prompt"]) == (row["language"] == "en")
        kl[row["language"] == "en"] += row["kl"]
    assert kl[True] and set(kl[True]) == {0.0} and min(kl[False]) > 0


def test_no_steps_evaluate_the_model_as_it_comes(config, tmp_path):
    config.train.steps, config.train.export = 0, True
    config.eval.path, config.eval.max_new_tokens = config.data.path, 6
    trainer = loop.Trainer(ml_collections.FrozenConfigDict(config), tmp_path / "run")
    trainer.train()
    trainer.report()
    assert [path.name for path in (tmp_path / "run" / "eval").iterdir()] == ["0"]
    assert not (tmp_path / "run" / "model").exists()  # nothing was trained
    assert "before training" in (tmp_path / "run" / "report" / "summary.md").read_text()


def test_training_moves_the_student_towards_the_teacher(config, tmp_path):
    config.train.steps, config.optimizer.warmup_steps, config.optimizer.learning_rate = 40, 0, 3e-2
    _, rows = run(config, tmp_path / "run")
    kl = [row["kl"] for row in rows]
    assert np.mean(kl[-10:]) < 0.6 * np.mean(kl[:10])
    assert rows[-1]["rollout_compilations"] == 1


def test_another_config_is_refused_and_named(config, tmp_path):
    trainer = loop.Trainer(ml_collections.FrozenConfigDict(config), tmp_path / "run")
    trainer.checkpoints.close()
    config.train.steps, config.train.log_every = 9, 2  # these may change
    loop.Trainer(ml_collections.FrozenConfigDict(config), tmp_path / "run").checkpoints.close()
    config.loss.weighting = "uniform"
    with pytest.raises(ValueError, match=r"config.loss.weighting: 'dpsw' -> 'uniform'"):
        loop.Trainer(ml_collections.FrozenConfigDict(config), tmp_path / "run")


def test_more_steps_go_on_from_the_last_checkpoint(config, tmp_path):
    config.optimizer.schedule = "constant"
    config.train.steps = 6
    longer, _rows = run(config, tmp_path / "at_once")
    config.train.steps = 4
    run(config, tmp_path / "extended")
    config.train.steps = 6
    extended, _ = run(config, tmp_path / "extended")
    jax.tree.map(np.testing.assert_array_equal, extended.params, longer.params)
    # One step's weights alone, as evaluation and export read them.
    model, mesh = pretrained.load(**config.model), sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])
    params = trained.load_params(str(tmp_path / "extended" / "checkpoints" / "6"), model, mesh)
    jax.tree.map(np.testing.assert_array_equal, params, longer.params)
    with pytest.raises(FileNotFoundError, match=r"neither a Hugging Face directory nor WORKDIR/checkpoints/STEP"):
        trained.load_params(str(tmp_path / "extended"), model, mesh)


def test_frozen_embeddings_stay_and_have_no_optimizer_state(config, tmp_path):
    config.train.steps, config.train.export, config.model.freeze_embeddings = 2, True, True
    state, _ = run(config, tmp_path / "run")
    assert "embedding" not in state.params and "embedding" not in state.teacher
    before = load_file(pathlib.Path(config.model.path) / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {"model.embed_tokens.weight"}


def test_batches_that_do_not_divide_over_the_devices(config, tmp_path):
    config.data.batch_size = 12
    with pytest.raises(ValueError, match=r"batch_size=12.*8 devices"):
        loop.Trainer(ml_collections.FrozenConfigDict(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()
