"""Bad numbers in a run: a skipped step is named, many of them end it, and nothing of it is exported."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from msd_jax.errors import UserError
from msd_jax.io import jsonl
from msd_jax.models import pretrained
from msd_jax.training import checkpoint, loop, watch
from tests.conftest import write_model
from tests.training.conftest import set_up, steps_on_disk, train


def with_nan_at(ready, *steps):
    """A run whose weights are not finite in the given steps' forward passes alone."""

    def train_step(state, frozen, packs):
        params = state.params
        if int(jax.device_get(state.step)) + 1 in steps:
            with jax.transfer_guard("allow"):
                broken = {**params, "final_norm": params["final_norm"] * jnp.nan}
                new, scalars = ready.train_step(dataclasses.replace(state, params=broken), frozen, packs)
                return dataclasses.replace(new, params=params), scalars
        return ready.train_step(state, frozen, packs)

    return dataclasses.replace(ready, train_step=train_step)


@pytest.fixture
def copied_state(monkeypatch):
    """No donation: `with_nan_at` keeps the weights that it breaks a copy of."""
    original = jax.jit

    def jit(*arguments, donate_argnums=None, **options):
        return original(*arguments, **options)

    monkeypatch.setattr("msd_jax.training.train_step.jax.jit", jit)


def test_a_skipped_step_is_named_with_its_queries(config, tmp_path, capsys, copied_state):
    config.train.log_every = 100
    ready = set_up(config, tmp_path / "run")
    loop.train(with_nan_at(ready, 3))
    rows = jsonl.read(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 6] and rows[0]["loss"] is None
    assert rows[0]["skip"] == 1 and rows[1]["skipped"] == 1 and rows[1]["skip"] == 0
    batches = iter(ready.batches)
    third = [next(batches) for _ in range(3)][-1]
    names = [f"{example.query_id} (sw)" for example in third.examples]
    assert rows[0]["skipped_queries"] == names and "skipped_queries" not in rows[1]
    assert f"step 3 skipped: loss nan, gradient norm nan; queries: {', '.join(names)}" in " ".join(
        capsys.readouterr().out.split()
    )


def test_many_skipped_steps_end_the_run(config, tmp_path, copied_state):
    config.train.max_skipped, config.train.export, config.train.steps = 3, True, 20
    ready = set_up(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"^3 steps in a row were skipped up to step 7 .*max_skipped=3.*no model is"):
        loop.train(with_nan_at(ready, *range(5, 20)))
    assert not (tmp_path / "run" / "model").exists()
    assert checkpoint.Checkpoints(tmp_path / "run").steps == [4, 2]  # that of 6 would have been the third
    dump = json.loads((tmp_path / "run" / "skipped_batch.json").read_text())
    assert dump["step"] == 7 and len(dump["batch"]) == 8
    assert {"id", "language", "student_prompt", "teacher_ids", "response"} <= dump["batch"][0].keys()
    assert steps_on_disk(tmp_path / "run")[-1] == 7


def test_absurd_weights_are_not_exported(config, tmp_path):
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e30, 0  # which settings.check would refuse
    config.train.export, config.train.steps = True, 2
    with pytest.raises(UserError, match=r"the largest of the trained weights is .*no model is exported"):
        loop.train(set_up(config, tmp_path / "run"))
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_require_fit(value):
    watch.require_fit({"a": jnp.ones(3), "b": jnp.array([[-65504.0]], jnp.bfloat16) * 0.9})
    with pytest.raises(UserError, match=r"no model is exported"):
        watch.require_fit({"a": jnp.ones(3), "b": jnp.array([-value])})


@pytest.mark.parametrize(
    "tensor",
    ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.layers.2.input_layernorm.weight"],
)
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, tensor):
    from msd_jax.parallel import sharding

    directory = write_model(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors[tensor] = tensors[tensor].copy()
    tensors[tensor].reshape(-1)[1] = np.nan
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    mesh = sharding.make_mesh(1, 4, 2)
    model = pretrained.load(str(directory), dtype="float32", param_dtype="bfloat16", remat="none", mesh=mesh)
    with pytest.raises(UserError, match=rf"model: {tensor} holds NaN or infinity"):
        model.params(mesh)


@pytest.mark.parametrize(
    "now, message",
    [
        ((1.0, 1.0, 0.0), r"responses are empty: 1.0 tokens"),
        ((9.0, 1.0, 0.0), r"responses have shrunk: 9.0 tokens in the last 10 steps, 40.0 at first"),
        ((64.0, 0.0, 0.0), r"responses no longer end: 0% do in the last 10 steps, 80% at first"),
        ((64.0, 0.5, 0.9), r"responses loop: 90% do in the last 10 steps, 10% at first"),
        ((30.0, 0.5, 0.3), r"^$"),
    ],
)
def test_what_a_collapse_is(now, message):
    import re

    assert re.search(message, watch.collapse(watch.Rollouts(40.0, 0.8, 0.1), watch.Rollouts(*now)))


def test_looping():
    response = np.stack([np.arange(32), np.arange(32) % 3, np.arange(32) % 3])
    assert watch.looping(response, np.array([32, 32, 8])) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("now", "stands_still"),
    [((0.9, 0.8), True), ((0.9, 0.4), False), ((0.4, 0.9), False), ((1.3, 0.6), True), ((0.0, 0.0), False)],
)
def test_what_a_loss_that_stands_still_is(now, stands_still):
    """Most of it is without a gradient, and it has not fallen by half."""
    fault = watch.saturation(watch.Loss(1.0, 0.7), watch.Loss(*now))
    assert bool(fault) == stands_still
    if fault:
        assert fault.startswith(f"the loss stands still: {now[1]:.0%} of it in the last 10 steps")
        assert f"weighted divergence {now[0]:.3g} nats per token, 1 at first" in fault
        assert "set config.loss.divergence=forward_kl" in fault


@pytest.mark.parametrize("divergence", ["reverse_kl", "auto"])
def test_a_certain_student_is_warned_of_once_under_reverse_kl(config, tmp_path, capsys, divergence):
    """A low temperature makes both roles certain of what they say, and they say different things."""
    config.loss.divergence, config.loss.temperature, config.optimizer.learning_rate = divergence, 0.01, 1e-6
    config.train.steps, config.data.languages = 12, {"sw": 1.0}
    _, rows = train(config, tmp_path / "run")
    saturated = np.mean([row["saturated"] for row in rows[:10]])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("the loss stands still") == (divergence == "reverse_kl")
    if divergence == "reverse_kl":
        assert f"warning: step 10: the loss stands still: {saturated:.0%} of it in the last 10 steps" in printed
        assert saturated > 0.5
    else:
        assert saturated == 0
    assert all(row["weighted_kl"] > 0 and row["beta"] == 0.5 for row in rows)


def test_a_resumed_run_compares_its_rollouts_with_those_of_the_first_steps(config, tmp_path, capsys):
    def see(watched, steps, length):
        tokens = types.SimpleNamespace(response_BxR=np.zeros((2, 64), int), length_B=np.array([length, length]))
        for step in steps:
            dispatched = types.SimpleNamespace(step=step, generated=types.SimpleNamespace(responses=tokens))
            watched.notes(dispatched, {"response_length": float(length), "stopped": 1.0, "skip": 0.0})

    see(watch.Watch(config.train, tmp_path, None, 0), range(1, 8), 40)
    see(watch.Watch(config.train, tmp_path, None, 4), range(5, 15), 40)  # the last checkpoint was that of step 4
    assert [row["step"] for row in jsonl.read(tmp_path / "first_rollouts.jsonl")] == list(range(1, 11))
    assert "warning" not in capsys.readouterr().out
    see(watch.Watch(config.train, tmp_path, None, 14), range(15, 25), 9)
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: step 24: responses have shrunk: 9.0 tokens in the last 10 steps, 40.0 at first" in said


@pytest.mark.parametrize("stops", [False, True])
def test_rollouts_that_collapse_are_warned_of_and_end_a_run_by_setting(config, tmp_path, capsys, stops):
    """From step 4 on, every response ends with its first token."""
    config.train.steps, config.train.stop_on_collapse = 24, stops
    ready = set_up(config, tmp_path / "run")

    def respond(step, queries, **weights):
        responses = ready.respond(step, queries, **weights)
        length_B = np.full_like(responses.length_B, 1 if step >= 4 else 6)
        return dataclasses.replace(responses, length_B=length_B, stopped_B=np.full_like(responses.stopped_B, True))

    changed = dataclasses.replace(ready, respond=respond)
    if stops:
        with pytest.raises(UserError, match=r"^stopped after step 14: responses are empty: 1.0 tokens"):
            loop.train(changed)
        assert not (tmp_path / "run" / "model").exists()
    else:
        loop.train(changed)
        printed = " ".join(capsys.readouterr().out.split())
        assert printed.count("warning: step") == 1 and "warning: step 14: responses are empty: 1.0 tokens" in printed
