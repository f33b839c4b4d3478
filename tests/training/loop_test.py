"""The loop, on a tiny random model: nothing is lost at a resume, and what is written says what was trained."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from msd_jax import report
from msd_jax.generation import responses
from msd_jax.io import jsonl
from msd_jax.models import pretrained, trained
from msd_jax.parallel import sharding
from msd_jax.training import completions, loop, run
from msd_jax.training.generate import generate
from tests.training.conftest import set_up, steps_on_disk, train

TIMES = ("seconds", "per_second", "compilations")


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in rows]


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "policy, kind, rank",
    [
        *(("on_policy", "ema", 0), ("on_policy", "ema", 2), ("off_policy", "frozen", 0), ("mixed", "frozen", 0)),
        *(("reference", "ema", 0), ("reference", "frozen", 2)),
    ],
)
def test_a_killed_run_ends_bit_identical(config, tmp_path, policy, kind, rank):
    """Killed after step 5, whose checkpoint is that of step 4: parameters, EMA teacher, moments, metrics."""
    config.rollout.policy, config.teacher.kind, config.model.lora.rank = policy, kind, rank
    unbroken, unbroken_rows = train(config, tmp_path / "unbroken")
    ready = set_up(config, tmp_path / "killed")

    def dies(state, *rest):
        if sharding.fetch(state.step) == 5:
            ready.checkpoints.close()
            raise Killed
        return ready.train_step(state, *rest)

    with pytest.raises(Killed):
        loop.train(dataclasses.replace(ready, train_step=dies))
    assert steps_on_disk(tmp_path / "killed") == [1, 2, 3, 4]  # that of step 5 was to be written during step 6
    resumed, resumed_rows = train(config, tmp_path / "killed")
    jax.tree.map(np.testing.assert_array_equal, resumed, unbroken)
    assert without_times(resumed_rows) == without_times(unbroken_rows)
    assert [row["step"] for row in resumed_rows] == [1, 2, 3, 4, 5, 6]
    seen = jsonl.read(tmp_path / "killed" / "completions.jsonl")
    assert seen == jsonl.read(tmp_path / "unbroken" / "completions.jsonl") and len(seen) == 8


def test_rows_are_written_a_step_late_and_before_a_checkpoint(config, tmp_path, monkeypatch):
    """While step n is dispatched, the row of n - 1 is still to be written; none up to a checkpoint is missing."""
    config.train.steps, config.train.checkpoints.every = 8, 5
    ready, dispatched, saved = set_up(config, tmp_path / "run"), [], {}

    def train_step(*arguments):
        dispatched.append(len(steps_on_disk(tmp_path / "run")))
        return ready.train_step(*arguments)

    def save(step, *rest):
        saved[step] = steps_on_disk(tmp_path / "run")

    monkeypatch.setattr(ready.checkpoints, "save", save)
    loop.train(dataclasses.replace(ready, train_step=train_step))
    assert dispatched == [0, 0, 1, 2, 3, 5, 5, 6]
    assert saved == {step: list(range(1, step + 1)) for step in (5, 8)}


@pytest.mark.parametrize("log_every, expected", [(3, [3, 6, 7]), (100, [7])])
def test_every_so_many_steps_and_the_last_are_logged(config, tmp_path, log_every, expected):
    config.train.steps, config.train.log_every = 7, log_every
    train(config, tmp_path / "run")
    assert steps_on_disk(tmp_path / "run") == expected


@pytest.mark.parametrize("policy, rows", [("on_policy", 0), ("off_policy", 2)])
def test_responses_are_written_to_the_prompts_that_are_trained_on(config, tmp_path, policy, rows):
    config.rollout.policy, config.rollout.rows = policy, rows
    ready, seen = set_up(config, tmp_path / "run"), {}

    class Recorder:
        sampling, pad_id, decoded = ready.generator.sampling, ready.generator.pad_id, ready.generator.decoded

        def __call__(self, params, prompt_BxP, length_B, *rest):
            seen["rollout"] = (prompt_BxP, length_B)
            return ready.generator(params, prompt_BxP, length_B, *rest)

    ready.respond._generator = Recorder()
    state, frozen = loop.initial_state(ready)
    batch = generate(ready, frozen, state, next(iter(ready.batches)), 0).batch
    trained = {
        "on_policy": (batch.student_prompt_BxP, batch.student_length_B),
        "off_policy": (batch.teacher_prompt_BxP, batch.teacher_length_B),
    }
    for generated, wanted in zip(seen["rollout"], trained[policy]):
        np.testing.assert_array_equal(generated, wanted)


def test_completions_tell_what_each_role_saw(config, tmp_path):
    config.train.steps = 3
    train(config, tmp_path / "run")
    entry = jsonl.read(tmp_path / "run" / "completions.jsonl")[0]
    assert entry["step"] == 3 and entry["language"] == "sw" and entry["policy"] == "on_policy"
    assert "kikombe" in entry["student_prompt"] and "answer in" not in entry["student_prompt"]
    assert "answer in" in entry["teacher_prompt"] and "kikombe" not in entry["teacher_prompt"]
    for name in ("kl", "weight", "w_T", "w_S"):
        assert len(entry[name]) == len(entry["tokens"]) > 0


def test_completions_of_all_steps_take_one_program(config, tmp_path):
    """Whatever the lengths of their prompts and responses."""
    config.train.completions.every, before = 1, completions.per_token_values._cache_size()
    config.rollout.max_new_tokens = 64
    train(config, tmp_path / "run")
    rows = jsonl.read(tmp_path / "run" / "completions.jsonl")
    assert len({max(len(row["tokens"]) for row in rows if row["step"] == step) // 16 for step in range(1, 7)}) > 1
    assert completions.per_token_values._cache_size() == before + 1


@pytest.mark.parametrize("policy", ["on_policy", "off_policy"])
def test_a_retained_query_costs_nothing_while_the_student_is_the_initial_model(config, tmp_path, policy):
    """Both roles see the same prompt, and the same weights give the same row: a divergence of exactly 0."""
    config.data.retain_fraction, config.rollout.policy = 0.5, policy
    config.train.steps, config.train.completions.every, config.train.completions.kept = 1, 1, 8
    train(config, tmp_path / "run")
    kl = {True: [], False: []}
    for row in jsonl.read(tmp_path / "run" / "completions.jsonl"):
        assert (row["student_prompt"] == row["teacher_prompt"]) == (row["language"] == "en")
        kl[row["language"] == "en"] += row["kl"]
    assert kl[True] and set(kl[True]) == {0.0} and min(kl[False]) > 0


def test_no_steps_evaluate_the_model_as_it_comes(config, tmp_path):
    config.train.steps, config.train.export = 0, True
    config.eval.path, config.eval.max_new_tokens = config.data.path, 6
    loop.train(set_up(config, tmp_path / "run"))
    report.write(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "eval").iterdir()] == ["0"]
    assert not (tmp_path / "run" / "model").exists()  # nothing was trained
    assert "before training" in (tmp_path / "run" / "report" / "summary.md").read_text()


def test_training_moves_the_student_towards_the_teacher(config, tmp_path):
    config.train.steps, config.optimizer.warmup_steps, config.optimizer.learning_rate = 40, 0, 3e-2
    _, rows = train(config, tmp_path / "run")
    kl = [row["kl"] for row in rows]
    assert np.mean(kl[-10:]) < 0.6 * np.mean(kl[:10])
    assert rows[-1]["rollout_compilations"] == 1


def test_another_config_is_refused_and_named(config, tmp_path):
    set_up(config, tmp_path / "run").checkpoints.close()
    config.train.steps, config.train.log_every = 9, 2  # these may change
    set_up(config, tmp_path / "run").checkpoints.close()
    config.loss.weighting = "uniform"
    with pytest.raises(ValueError, match=r"config.loss.weighting: 'dpsw' -> 'uniform'"):
        set_up(config, tmp_path / "run")


def test_more_steps_go_on_from_the_last_checkpoint(config, tmp_path):
    config.optimizer.schedule = "constant"
    config.train.steps = 6
    longer, _rows = train(config, tmp_path / "at_once")
    config.train.steps = 4
    train(config, tmp_path / "extended")
    config.train.steps = 6
    extended, _ = train(config, tmp_path / "extended")
    jax.tree.map(np.testing.assert_array_equal, extended.params, longer.params)
    # One step's weights alone, as evaluation and export read them.
    model, mesh = pretrained.load(**config.model), sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])
    params = trained.load_params(str(tmp_path / "extended" / "checkpoints" / "6"), model, mesh)
    jax.tree.map(np.testing.assert_array_equal, params, longer.params)
    with pytest.raises(FileNotFoundError, match=r"neither a Hugging Face directory nor WORKDIR/checkpoints/STEP"):
        trained.load_params(str(tmp_path / "extended"), model, mesh)


def test_frozen_embeddings_stay_and_have_no_optimizer_state(config, tmp_path):
    config.train.steps, config.train.export, config.model.freeze_embeddings = 2, True, True
    state, _ = train(config, tmp_path / "run")
    assert "embedding" not in state.params and "embedding" not in state.teacher
    before = load_file(pathlib.Path(config.model.path) / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {"model.embed_tokens.weight"}


def test_batches_that_do_not_divide_over_the_devices(config, tmp_path):
    config.data.batch_size = 12
    with pytest.raises(ValueError, match=r"batch_size=12.*8 devices"):
        set_up(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weights", [("float", "float"), ("int8", "float"), ("float", "int8")])
def test_rollouts_and_evaluations_have_int8_where_it_is_asked_for(config, tmp_path, weights):
    """What is trained has none, and stored responses of other weights are not taken over."""
    before = responses.fingerprint(config, tmp_path)
    config.rollout.weights, config.eval.weights = weights
    assert (responses.fingerprint(config, tmp_path) == before) == (weights[0] == "float")
    ready = set_up(config, tmp_path / "run")
    state, frozen = loop.initial_state(ready)
    given = run.rollout_params(ready, frozen, state.params), run.eval_params(ready, frozen, state.params)
    held = [{leaf.dtype.name for leaf in jax.tree.leaves(params["layers"])} for params in given]
    assert [("int8" if "int8" in dtypes else "float") for dtypes in held] == list(weights)
    generated = generate(ready, frozen, state, next(iter(ready.batches)), 0)
    state, scalars = ready.train_step(state, frozen, generated.packs)
    assert generated.responses.generated and np.isfinite(jax.device_get(scalars)["loss"])
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))
