"""config.rollout.policy = "reference": training on the records' own answers."""

import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from msd_jax import settings
from msd_jax.errors import UserError
from msd_jax.models import decoder, forward
from msd_jax.parallel import sharding
from msd_jax.planning.flops import count_flops
from msd_jax.planning.programs import run_programs
from msd_jax.training import loop, train_step
from msd_jax.training.generate import generate
from tests.training.conftest import set_up, train
from tests.training.train_step_test import CONFIG, RECORD, largest_difference, make_batch, make_state, make_step

END = 3  # <|im_end|>, which ends a turn of the tiny model's template
FINE_TUNING = {"divergence": "cross_entropy", "weighting": "uniform"}


@pytest.fixture
def fine_tuning(config):
    config.rollout.policy = "reference"
    config.loss.update(FINE_TUNING)
    return config


def rewrite(config, change) -> None:
    """Changes the records in the file of queries."""
    with open(config.data.path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    with open(config.data.path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(change(i, record)) + "\n" for i, record in enumerate(records))


@pytest.mark.parametrize("rows, shape", [(8, None), (3, None), (4, (2, 2, 1)), (8, (1, 2, 2))])
def test_fine_tuning_is_the_cross_entropy_of_optax(rng, rows, shape):
    batch = make_batch(rng)._replace(teacher_prompt_BxP=None, teacher_length_B=None)
    state, mesh = make_state(RECORD, live=True), None
    if shape:
        mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    graphdef, _, _ = decoder.abstract(CONFIG)

    def mean_cross_entropy(params):
        prompts = (batch.student_prompt_BxP, batch.student_length_B)
        logits = forward.response_logits(graphdef, params, *prompts, batch.response_BxR, batch.response_length_B)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.response_BxR)
        mask = forward.response_mask(batch.response_length_B, batch.response_BxR.shape[1])
        return jnp.sum(losses, where=mask) / jnp.sum(batch.response_length_B)

    loss, gradient = jax.value_and_grad(mean_cross_entropy)(state.params)
    step = make_step(RECORD, rows=rows, mesh=mesh, **FINE_TUNING)
    new, scalars = step(state, batch)
    assert largest_difference(gradient, jax.device_get(new.opt_state)) < 1e-5
    np.testing.assert_allclose(scalars["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(scalars["kl"], loss, rtol=1e-5)
    assert not {"w_T", "teacher_entropy"} & scalars.keys()


def test_without_a_teacher_its_pass_and_its_weights_are_left_out(fine_tuning, tmp_path):
    def train_flops(config, workdir):
        ready = set_up(config, workdir)
        program = next(run_programs(config, ready.model, ready.mesh))
        return ready, count_flops(program.trace().jaxpr, program.while_trips)

    alone, flops = train_flops(fine_tuning, tmp_path / "alone")
    fine_tuning.loss.weighting = "dpsw"
    with_teacher, more = train_flops(fine_tuning, tmp_path / "dpsw")
    assert flops < 0.75 * more
    for ready, has in ((alone, False), (with_teacher, True)):
        state, frozen = loop.initial_state(ready)
        batch = generate(ready, frozen, state, next(iter(ready.batches)), 0).batch
        assert (state.teacher is not None) == (batch.teacher_prompt_BxP is not None) == has


def test_a_teacher_that_only_writes_is_left_out_of_the_step(config, tmp_path):
    config.rollout.policy = "off_policy"
    config.loss.update(FINE_TUNING)
    ready = set_up(config, tmp_path / "run")
    state, frozen = loop.initial_state(ready)
    generated = generate(ready, frozen, state, next(iter(ready.batches)), 0)
    assert state.teacher is not None and generated.batch.teacher_prompt_BxP is None


def test_the_responses_are_the_answers(fine_tuning, tmp_path):
    ready = set_up(fine_tuning, tmp_path / "run")
    state, frozen = loop.initial_state(ready)
    generated = generate(ready, frozen, state, next(iter(ready.batches)), 0)
    answers = {record.id: record.answers["sw"] for record in ready.records}
    for row, example in enumerate(generated.queries.examples):
        ids = generated.responses.response_BxR[row, : generated.responses.length_B[row]]
        assert ready.model.tokenizer.decode(ids[:-1]) == answers[example.query_id] and ids[-1] == END
    assert generated.responses.stopped_B.all() and generated.free is None


def test_training_on_answers_learns_them(fine_tuning, tmp_path):
    """Without a text in the source language: nothing reads one."""
    rewrite(fine_tuning, lambda _, record: record | {"texts": {"sw": record["texts"]["sw"]}})
    fine_tuning.train.steps = 40
    state, rows = train(fine_tuning, tmp_path / "run")
    assert state.teacher is None
    assert rows[-1]["kl"] < 0.2 * rows[0]["kl"] and {row["on_policy"] for row in rows} == {0.0}


@pytest.mark.parametrize("divergence", ["auto", "reverse_kl"])
def test_a_divergence_on_answers_is_distillation(config, tmp_path, divergence):
    config.rollout.policy, config.loss.divergence, config.data.retain_fraction = "reference", divergence, 0.5
    rewrite(config, lambda _, record: record | {"answers": record["answers"] | {"en": "make a kikombe"}})
    ready = set_up(config, tmp_path / "run")
    assert ready.loss.divergence == ("forward_kl" if divergence == "auto" else divergence)
    state, rows = train(config, tmp_path / "run")
    assert state.teacher is not None and {"w_T", "teacher_entropy"} <= rows[-1].keys()
    assert {row["skipped"] for row in rows} == {0.0}


def test_what_has_no_answer_or_a_long_one_is_counted(fine_tuning, tmp_path, capsys):
    def change(i, record):
        return record | {"answers": {} if i in (0, 1, 2) else {"sw": "kikombe " * (9 if i == 5 else 2)}}

    rewrite(fine_tuning, change)
    ready = set_up(fine_tuning, tmp_path / "run")
    told = " ".join(capsys.readouterr().out.split())
    assert "queries left out in sw: 2 harmful, without an answer" in told
    assert "queries left out in sw: 1 harmless, without an answer" in told
    assert "answers cut in sw: 1, longer than config.rollout.max_new_tokens=6" in told
    state, frozen = loop.initial_state(ready)
    queries = iter(ready.batches)
    seen = {}
    for step in range(3):
        generated = generate(ready, frozen, state, next(queries), step)
        lengths = generated.responses.length_B.tolist()
        seen |= dict(zip([x.query_id for x in generated.queries.examples], zip(lengths, generated.responses.stopped_B)))
    assert set(seen) == {"3", "4", "5", "6", "7", "8"}
    assert seen.pop("5") == (6, False) and set(seen.values()) == {(3, True)}


def test_errors(fine_tuning, tmp_path):
    rewrite(fine_tuning, lambda _, record: record | {"answers": {}})
    with pytest.raises(
        UserError, match=r"queries.jsonl: no record has an answer in sw, and config.rollout.policy='ref"
    ):
        set_up(fine_tuning, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, fault",
    [
        (
            {"teacher.kind": "ema"},
            "config.teacher.kind='ema': fine-tuning on answers .* has no teacher; set it to 'frozen'",
        ),
        ({"prompts.cot": "generated"}, "config.prompts.cot='generated': .*; set it to 'instruction'"),
        ({"data.retain_fraction": 0.2}, "config.data.retain_fraction=0.2: .*; set it to 0.0"),
    ],
)
def test_settings_that_nothing_would_read(fine_tuning, changes, fault):
    fine_tuning.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=fault):
        settings.check(ml_collections.FrozenConfigDict(fine_tuning))
    fine_tuning.loss.weighting = "dpsw"
    settings.check(ml_collections.FrozenConfigDict(fine_tuning))


@pytest.mark.parametrize("loss", [{}, {"weighting": "teacher"}, {"weighting": "student"}, {"divergence": "jsd"}])
def test_a_loss_that_reads_the_teacher_refuses_to_do_without(rng, loss):
    batch = make_batch(rng)._replace(teacher_prompt_BxP=None, teacher_length_B=None)
    with pytest.raises(ValueError, match="needs teacher_logits"):
        make_step(RECORD, **loss)(make_state(RECORD, live=True), batch)
    assert train_step.losses.LossSettings(**loss).reads_teacher


def test_the_students_weight_at_the_response_needs_no_teacher(rng):
    options = {"divergence": "cross_entropy", "weighting": "student", "student_token": "sampled"}
    batch = make_batch(rng)
    state = make_state(RECORD)
    whole, scalars = make_step(RECORD, **options)(state, batch)
    batch = batch._replace(teacher_prompt_BxP=None, teacher_length_B=None)
    alone, fewer = make_step(RECORD, **options)(state, batch)
    assert (
        largest_difference(whole.opt_state, alone.opt_state) < 3e-6
    )  # two programs, of which each sums in its own order
    np.testing.assert_allclose(fewer["w_S"], scalars["w_S"], rtol=1e-6)
