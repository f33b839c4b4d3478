"""A run: what stays fixed while it trains, set up with every check done before anything long begins."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from msd_jax import losses
from msd_jax.data import batches, near_duplicates, sources
from msd_jax.data.batches import Batch
from msd_jax.data.records import Query
from msd_jax.errors import UserError, UserFileError
from msd_jax.evaluation import evaluator
from msd_jax.generation import responses, rollout
from msd_jax.io import jsonl
from msd_jax.io.console import log
from msd_jax.models import decoder, pretrained
from msd_jax.parallel import distributed, sharding
from msd_jax.training import checkpoint, optimizer
from msd_jax.training.monitor import Monitor
from msd_jax.training.train_step import TrainState, check_batch, jit_train_step, loss_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads, checked.

    Attributes:
      config: the whole config.
      mesh: of all devices.
      model: everything but its weights.
      evaluation: before and after training; None where the config asks for none.
      monitor: of the slice while training; None where the config asks for none.
      records: the queries to train on.
      duplicates: rows of near_duplicates.jsonl.
      batches: of the records, endless; without the teacher's analyses where it is to write them first.
    """

    config: ml_collections.ConfigDict
    mesh: Mesh
    model: pretrained.Pretrained
    evaluation: evaluator.Evaluator | None
    monitor: Monitor | None
    records: tuple[Query, ...]
    duplicates: list[dict[str, Any]]
    batches: grain.IterDataset[Batch]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Inputs):
    """What stays fixed while a run trains.

    Attributes:
      workdir: the run's own directory.
      checkpoints: in it.
      optimize: the optax chain.
      learning_rates: of each step.
      loss: its options.
      train_step: the program train_step(state, frozen, batch).
      rollout_shardings: of all weights while they generate.
      generator: the program that writes responses.
      respond: gives a batch its responses.
    """

    workdir: pathlib.Path
    checkpoints: checkpoint.Checkpoints
    optimize: optax.GradientTransformation
    learning_rates: np.ndarray
    loss: losses.LossSettings
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    rollout_shardings: Any
    generator: rollout.Generator
    respond: responses.Responder


def setup(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Run:
    """Reads and checks everything, then makes `workdir` the run's own; no weight is read and no step compiled.

    Raises:
      UserError: names what is wrong with the config, a file or the workdir; `workdir` is then as it was.
    """
    inputs = read(config)
    model, mesh = inputs.model, inputs.mesh
    claim(workdir, config)
    if inputs.evaluation and distributed.is_first():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in inputs.duplicates)
        jsonl.replace_text(workdir / "near_duplicates.jsonl", lines)
    optimize, schedule = optimizer.make_optimizer(config.optimizer, config.train.steps)
    sampling = {key: config.rollout[key] for key in ("max_new_tokens", "temperature", "top_k", "top_p")}
    generator = rollout.Generator(model.graphdef, mesh, rollout.Sampling(**sampling), model.stop_ids, model.pad_id)
    store = None
    if config.rollout.policy != "on_policy" and config.rollout.reuse_teacher_responses:
        store = teacher_store(config, model, workdir / "teacher_responses.jsonl")
    return Run(
        **vars(inputs),
        workdir=workdir,
        checkpoints=checkpoint.Checkpoints(workdir, config.train.checkpoints_kept),
        optimize=optimize,
        learning_rates=np.asarray(jax.jit(jax.vmap(schedule))(np.arange(config.train.steps))),
        loss=loss_settings(config),
        train_step=jit_train_step(config, model, mesh, optimize),
        rollout_shardings=model.shardings(mesh, sharding.ROLLOUT),
        generator=generator,
        respond=responses.Responder(config, generator, store),
    )


def read(config: ml_collections.ConfigDict) -> Inputs:
    """Reads and checks everything that a run needs; writes nothing. Raises UserError as `setup`."""
    distributed.require_same("config", lambda: checkpoint.without_paths(config))
    mesh = sharding.make_mesh(**config.mesh)
    check_batch(config, mesh)
    model = pretrained.load(**config.model, mesh=mesh)
    _check_vocabulary(config.loss, model.config.vocab_size)
    records = sources.load(config.data, log)
    evaluation = evaluator.Evaluator(config, model, mesh) if evaluator.wanted(config) else None
    watch = Monitor(config, evaluation) if evaluation and config.eval.every else None
    records, duplicates = _look_for_duplicates(records, config.data, evaluation)
    encoded = encode(config, model, records)
    _require_same_files(model, encoded, evaluation)
    return Inputs(
        config=config,
        mesh=mesh,
        model=model,
        evaluation=evaluation,
        monitor=watch,
        records=records,
        duplicates=duplicates,
        batches=make_batches(config, model, encoded),
    )


def _check_vocabulary(loss: ml_collections.ConfigDict, vocab_size: int) -> None:
    for key in ("top_k", "weight_top_k"):
        if loss[key] > vocab_size:
            raise UserError(f"config.loss.{key}={loss[key]} exceeds the vocabulary of {vocab_size}")


def _look_for_duplicates(
    records: tuple[Query, ...], data: ml_collections.ConfigDict, evaluation: evaluator.Evaluator | None
) -> tuple[tuple[Query, ...], list[dict[str, Any]]]:
    """(records to train on, rows of near_duplicates.jsonl); prints how many queries the evaluation shares."""
    benchmarks: dict[str, dict[str, Query]] = collections.defaultdict(dict)
    for prompt in evaluation.prompts if evaluation else ():
        benchmarks[prompt.benchmark.name][prompt.query.id] = prompt.query
    rows, lines = near_duplicates.find_in_benchmarks(
        records, {name: tuple(by_id.values()) for name, by_id in benchmarks.items()}
    )
    for line in lines:
        log(line)
    if not rows or data.near_duplicates != "drop":
        return records, rows
    shared = {row["train_id"] for row in rows}
    kept = tuple(record for record in records if record.id not in shared)
    log(f"near-duplicates: {len(records) - len(kept)} of {len(records)} training queries dropped")
    if not kept:
        raise UserError("config.data.near_duplicates='drop' leaves no query: all are in the evaluation too")
    return kept, rows


def encode(
    config: ml_collections.ConfigDict,
    model: pretrained.Pretrained,
    records: tuple[Query, ...],
    analyses: Mapping[str, str] | None = None,
) -> batches.Encoded:
    """The records in each target language, with the teacher's `analyses` by id where it has written them."""
    return batches.encode_all(records, tuple(config.data.languages), model.tokenizer, config, analyses)


def make_batches(
    config: ml_collections.ConfigDict, model: pretrained.Pretrained, encoded: batches.Encoded
) -> grain.IterDataset[Batch]:
    """Endless batches; prints how many prompts are too long to be among them, and how many queries are hostile."""
    data = config.data
    for line in encoded.describe():
        log(line)
    return batches.batches(
        encoded,
        dict(data.languages),
        data.batch_size,
        config.seed,
        model.pad_id,
        data.length_window,
        source_weights=sources.weights(data),
        harmful_share=None if data.harmful_share < 0 else data.harmful_share,
        retain_fraction=data.retain_fraction,
    )


def _require_same_files(
    model: pretrained.Pretrained, encoded: batches.Encoded, evaluation: evaluator.Evaluator | None
) -> None:
    """All processes build the same batches and programs, so they must have read the same; see distributed.py."""
    weights = model.directory.glob("*.safetensors")
    distributed.require_same("config.model.path", lambda: sorted([f.name, f.stat().st_size] for f in weights))
    examples = list(encoded.examples())
    distributed.require_same(
        "config.data.path",
        lambda: [[e.query_id, e.language, e.student_ids.tolist(), e.teacher_ids.tolist()] for e in examples],
    )
    prompts = evaluation.prompts if evaluation else ()
    distributed.require_same("config.eval", lambda: [[*p.key, p.ids.tolist()] for p in prompts])


def claim(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Makes `workdir` this config's own; refuses one that holds the run of another config.

    Raises:
      UserError: keys differ that must not; they are listed.
      UserFileError: the directory cannot be written.
    """
    path = workdir / "config.json"

    def compare() -> list[str]:
        return checkpoint.config_changes(json.loads(path.read_text("utf-8")), config) if path.exists() else []

    if changes := distributed.from_first(compare):
        raise UserError(
            f"{workdir} holds a run with another config; use a new --workdir, or revert these keys:\n  "
            + "\n  ".join(changes)
        )
    try:
        if distributed.is_first():
            workdir.mkdir(parents=True, exist_ok=True)
            jsonl.replace_text(path, json.dumps(checkpoint.plain(config), indent=1) + "\n")
        distributed.require_shared(workdir)
    except OSError as error:
        raise UserFileError(f"--workdir={workdir} cannot be written: {error.strerror or error}") from error


def teacher_store(
    config: ml_collections.ConfigDict, model: pretrained.Pretrained, path: pathlib.Path
) -> responses.Store:
    """What the frozen teacher writes once, in the file `path`."""
    return responses.Store(path, responses.fingerprint(config, model.directory))


def rollout_params(run: Run, frozen: decoder.Params, trained: decoder.Params) -> decoder.Params:
    """All weights as generation takes them; `frozen` and `trained` are the two parts of model.split."""
    return rollout.relayout(decoder.join(frozen, trained), run.model.dtype, run.rollout_shardings)


def describe(run: Run) -> None:
    """Prints what is trained, how, and on what."""
    config, model, sampling = run.config, run.model, run.generator.sampling
    count = sum(leaf.size for leaf in jax.tree.leaves(model.abstract))
    trained = sum(leaf.size for leaf in jax.tree.leaves(model.split(model.abstract)[0]))
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    log(
        f"model: {model.directory}, {count:,} parameters"
        + (f", {trained:,} of them trained" if trained < count else "")
        + f"; mesh: {mesh} ({jax.devices()[0].device_kind})"
    )
    log(
        f"MSD: {config.rollout.policy}, {config.teacher.kind} teacher, {run.loss.divergence}, "
        f"{run.loss.weighting} weights; scored at temperature {run.loss.temperature}"
    )
    log(
        f"sampling: temperature {sampling.temperature}, top_k {sampling.top_k}, top_p {sampling.top_p}, "
        f"at most {sampling.max_new_tokens} tokens, stop at {list(model.stop_ids)}"
    )
    if sampling.temperature != run.loss.temperature:
        log(
            f"note: responses are sampled at temperature {sampling.temperature} and scored at "
            f"{run.loss.temperature} (config.rollout.temperature, config.loss.temperature)"
        )
    if config.teacher.kind == "live":
        log("note: a live teacher can collapse within 100 steps; ema with decay 0.95 held where it did not")
