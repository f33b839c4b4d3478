"""Operations and bytes against the programs themselves, and against loops over tokens; and where the wall time went."""

import subprocess
import sys

import ml_collections
import numpy as np
import pytest

from msd_jax.generation.responses import Responses
from msd_jax.io import compilations, jsonl
from msd_jax.planning.flops import count_flops
from msd_jax.planning.programs import run_programs
from msd_jax.training import goodput, loop, run, utilisation
from msd_jax.training.packing import TrainBatch
from tests.conftest import REPOSITORY
from tests.training.conftest import set_up, train


def full_batch(config) -> TrainBatch:
    """Prompts and responses without padding, as the plan's."""
    B, R = config.data.batch_size, config.rollout.max_new_tokens
    student, teacher = config.prompts.student_limit, config.prompts.teacher_limit
    lengths = (np.full(B, length, np.int32) for length in (student, teacher, R))
    student_B, teacher_B, response_B = lengths
    ids = (np.zeros((B, length), np.int32) for length in (student, teacher, R))
    student_BxP, teacher_BxP, response_BxR = ids
    return TrainBatch(student_BxP, student_B, teacher_BxP, teacher_B, response_BxR, response_B)


@pytest.mark.parametrize("changes", [{}, {"lora.rank": 2}, {"freeze_embeddings": True}], ids=str)
def test_operations_are_those_of_the_step_without_recomputation(config, tmp_path, changes, monkeypatch):
    """But for pairs of tokens that are masked, which XLA's attention computes: here they count."""
    config.model.remat = "none"
    config.model.update_from_flattened_dict(changes)
    config.prompts.student_limit, config.prompts.teacher_limit = 11, 27  # with 5 response tokens, full rows
    config.train.loss_chunk = 2
    ready = set_up(config, tmp_path / "run")
    program = next(run_programs(config, ready.model, ready.mesh))
    counted = count_flops(program.trace().jaxpr, program.while_trips)
    monkeypatch.setattr(utilisation, "_pairs", lambda length_B, window: float((length_B.astype(float) ** 2).sum()))
    model = ready.model
    trains_head = not (model.lora or model.freeze_embeddings)
    flops = utilisation.train_flops(model.config, model.lora, full_batch(config), trains_head)
    assert flops == pytest.approx(counted, rel=0.001)


@pytest.mark.parametrize("window", [None, 4])
def test_pairs_of_tokens_are_those_that_attention_sees(window):
    lengths = np.array([1, 3, 9])
    seen = sum(min(i + 1, window or i + 1) for length in lengths for i in range(length))
    assert utilisation._pairs(lengths, window) == seen


def test_decoding_is_measured_against_the_bytes_that_it_must_read(config, tmp_path):
    """Weights once per token of the longest response, and of each row the keys and values of all tokens so far."""
    ready = set_up(config, tmp_path / "run")
    model, bandwidth = ready.model, 1e6
    prompt_B, length_B = np.array([3, 0, 5, 4, 0, 0, 0, 0]), np.array([2, 6, 4, 1, 2, 2, 2, 2])  # of 0: stored
    config_, read = model.config, 0
    for prompt, length in zip(prompt_B, length_B):
        for t in range(length if prompt else 0):
            read += (prompt + t + 1) * config_.layers * 2 * config_.kv_heads * config_.head_dim * 4
    weights = sum(leaf.size for leaf in _leaves(model.abstract)) * 4  # the embedding is the head
    least = (4 * weights + read / 8) / bandwidth  # of each of eight devices that share the rows
    responses = Responses(np.zeros((8, 6)), length_B, length_B > 0, length_B > 0, 7, prompt_B, 4)
    row = {"rollout_seconds": 2.0, "train_seconds": 1.0}
    row |= {"train_tokens_per_second": 80.0, "rollout_tokens_per_second": 40.0}
    measure = utilisation.Utilisation(model, ready.mesh, utilisation.Peak(1e12, bandwidth, devices_per_chip=2))
    columns = measure(full_batch(config), responses, row)
    assert columns["hbm_share"] == pytest.approx(least / 2.0)
    assert columns["train_tokens_per_second_per_chip"] == 80 / 4
    assert columns["rollout_tokens_per_second_per_chip"] == 40 / 4
    flops = utilisation.train_flops(model.config, None, full_batch(config), trains_head=True)
    assert columns["mfu"] == pytest.approx(flops / 1.0 / 8 / 1e12)
    assert utilisation.Utilisation(model, ready.mesh, None)(full_batch(config), responses, row) == {}


def _leaves(tree) -> list:
    return [leaf for value in tree.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]


def test_a_run_with_a_known_peak(config, tmp_path):
    config.train.steps = 4
    frozen = ml_collections.FrozenConfigDict(config)
    loop.train(run.setup(frozen, tmp_path / "run", utilisation.Peak(1e9, 1e9)))
    rows = jsonl.read(tmp_path / "run" / "metrics.jsonl")
    assert all(row["mfu"] > 0 and row["hbm_share"] > 0 for row in rows)
    assert rows[0]["compile_seconds"] > 0 == rows[-1]["compile_seconds"]
    train(config, tmp_path / "plain")
    for name in ("loss", "grad_norm"):
        plain = jsonl.read(tmp_path / "plain" / "metrics.jsonl")
        assert [row[name] for row in plain] == [row[name] for row in rows]
    assert not (tmp_path / "plain" / "profile").exists() and "mfu" not in plain[0]


def test_a_profile_of_some_steps(tmp_path):
    """In a process of its own: after a thousand other programs JAX's profiler was seen to end the process."""
    flags = "--config=configs/quickstart.py", "--config.eval.path=", "--config.train.export=False"
    steps = "--config.train.steps=4", "--config.train.profile_steps=2"
    command = [sys.executable, "-m", "msd_jax.main", *flags, *steps, f"--workdir={tmp_path}/run"]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    [trace] = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert b"step" in trace.read_bytes()


def test_seconds_go_to_the_phase_that_they_are_spent_in(tmp_path, monkeypatch):
    now, compiled = [100.0], compilations.Compilations()
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(compilations, "so_far", lambda: compilations.Compilations(**vars(compiled)))

    def spend(seconds: float, compiling: float = 0.0) -> None:
        now[0] += seconds
        compiled.seconds += compiling
        compiled.compiled += bool(compiling)

    clock = goodput.Clock(tmp_path, began=90.0)
    clock.resume(3)
    with clock.phase("steps"):
        spend(5, compiling=2)
        clock.enter("generation")
        spend(3)
        clock.enter("steps")
        with clock.phase("checkpoints"):
            spend(1)
        spend(4)
    with pytest.raises(ValueError), clock.phase("evaluation"):
        spend(6, compiling=6)
        raise ValueError
    row = clock.keep(7)
    expected = {"steps": 7, "generation": 3, "compilation": 8, "checkpoints": 1, "evaluation": 0, "other": 10}
    assert row["seconds"] == expected and row["steps"] == [3, 7] and row["compiled"] == 2
    assert sum(expected.values()) == now[0] - 90
    spend(1)
    clock.keep(8)
    again = goodput.Clock(tmp_path, began=now[0])
    again.resume(8)
    with again.phase("steps"):
        spend(30)
    again.keep(9)
    rows = goodput.read(tmp_path)
    assert [row["steps"] for row in rows] == [[3, 8], [8, 9]]
    line = goodput.describe(rows)
    assert line.startswith("goodput 67% of 0:01:00 in 2 starts (steps 62%, generation 5%); compilation 13%, ")
    assert line.endswith("evaluation 0%, other 18%; 2 programs compiled, 0 read from the cache")


def test_the_whole_of_a_run_is_accounted_for(config, tmp_path):
    config.train.steps = 3
    train(config, tmp_path / "run")
    [row] = goodput.read(tmp_path / "run")
    assert row["steps"] == [0, 3] and row["compiled"] > 2
    assert all(row["seconds"][name] > 0 for name in ("steps", "generation", "compilation", "checkpoints", "other"))
    assert row["seconds"]["evaluation"] == 0
