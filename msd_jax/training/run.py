"""A run: what stays fixed while it trains, set up with every check done before anything long begins."""

import collections
import dataclasses
import functools
import json
import operator
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from msd_jax import losses
from msd_jax.data import batches, near_duplicates, prompts, sources
from msd_jax.data.batches import Batch
from msd_jax.data.records import Query
from msd_jax.errors import UserError, UserFileError
from msd_jax.evaluation import evaluator
from msd_jax.generation import responses, rollout
from msd_jax.io import jsonl, lock, provenance, stores
from msd_jax.io.console import log
from msd_jax.models import decoder, pretrained
from msd_jax.parallel import distributed, sharding
from msd_jax.training import checkpoint, fingerprint, goodput, optimizer, packing, trackers, utilisation
from msd_jax.training.monitor import Monitor
from msd_jax.training.pack_shape import pack_shape
from msd_jax.training.train_step import TrainState, TrainStep, beta_schedule, check_batch, loss_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads, checked.

    Attributes:
      config: the whole config.
      mesh: of all devices.
      model: everything but its weights.
      rollout_mesh, rollout_model: both as responses are generated.
      evaluation: before and after training; None where the config asks for none.
      monitor: of the slice while training; None where the config asks for none.
      records: the queries to train on.
      duplicates: rows of near_duplicates.jsonl.
      examples: the encoded records; without the teacher's analyses where it is to write them first.
      batches: of the records, endless; without the teacher's analyses where it is to write them first.
      fingerprint: of the files behind all this, see fingerprint.of.
    """

    config: ml_collections.ConfigDict
    mesh: Mesh
    model: pretrained.Pretrained
    rollout_mesh: Mesh
    rollout_model: pretrained.Pretrained
    evaluation: evaluator.Evaluator | None
    monitor: Monitor | None
    records: tuple[Query, ...]
    duplicates: list[dict[str, Any]]
    examples: tuple[prompts.Example, ...]
    batches: grain.IterDataset[Batch]
    fingerprint: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Inputs):
    """What stays fixed while a run trains.

    Attributes:
      workdir: the run's own directory.
      lock: on it.
      clock: began with the set-up.
      utilisation: of the devices, step by step.
      checkpoints: in it.
      optimize: the optax chain.
      learning_rates: of each step.
      loss: its options.
      beta: the loss's, by the number of finished steps.
      pack_shape: of the packs that a step is computed in.
      train_step: train_step(state, frozen, packs), as train_step.TrainStep.
      rollout_layout, eval_layout: rollout.layout of all weights while they generate, in a rollout or an evaluation.
      generator: the program that writes responses.
      respond: gives a batch its responses.
    """

    workdir: pathlib.Path
    lock: lock.Lock | None
    clock: goodput.Clock
    utilisation: utilisation.Utilisation
    checkpoints: checkpoint.Checkpoints
    optimize: optax.GradientTransformation
    learning_rates: np.ndarray
    loss: losses.LossSettings
    beta: optax.Schedule
    pack_shape: packing.Shape
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    rollout_layout: Any
    eval_layout: Any
    generator: responses.Generator
    respond: responses.Responder | responses.GivenResponder


def setup(config: ml_collections.ConfigDict, workdir: pathlib.Path, peak: utilisation.Peak | None = None) -> Run:
    """Reads and checks everything, then makes `workdir` the run's own; no weight is read and no step compiled.

    Args:
      config: checked and frozen.
      workdir: of this run or, to resume it, of an interrupted one.
      peak: of each device, to relate the run's speed to; None where it is not known.

    Raises:
      UserError: names what is wrong with the config, a file or the workdir; `workdir` is then as it was.
    """
    began = time.perf_counter()
    inputs = read(config)
    model, mesh = inputs.model, inputs.mesh
    held = claim(workdir, config, inputs.fingerprint)
    provenance.record(workdir, config.seed, inputs.fingerprint)
    if inputs.evaluation and distributed.is_first():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in inputs.duplicates)
        jsonl.replace_text(workdir / "near_duplicates.jsonl", lines)
    # The teacher's prompts hold analyses that are yet to be written.
    examples = None if config.prompts.cot == "generated" else inputs.examples
    shape = pack_shape(config, model, mesh, examples)
    optimize, schedule = optimizer.make_optimizer(config.optimizer, config.train.steps)
    generator = responses.make_generator(config, inputs.rollout_model, inputs.rollout_mesh)
    store = None
    if config.rollout.policy in ("off_policy", "mixed") and config.rollout.reuse_teacher_responses:
        store = teacher_store(config, model, workdir / "teacher_responses.jsonl")
    return Run(
        **vars(inputs),
        workdir=workdir,
        lock=held,
        clock=goodput.Clock(workdir, began),
        utilisation=utilisation.Utilisation(model, inputs.rollout_mesh, peak, config.rollout.weights),
        checkpoints=checkpoint.Checkpoints(
            workdir,
            config.train.checkpoints.kept,
            {"config": checkpoint.plain(config), "inputs": inputs.fingerprint},
            config.train.stall_limit,
        ),
        optimize=optimize,
        learning_rates=np.asarray(jax.jit(jax.vmap(schedule))(np.arange(config.train.steps))),
        loss=loss_settings(config),
        beta=beta_schedule(config),
        pack_shape=shape,
        train_step=TrainStep(config, model, mesh, optimize, shape),
        rollout_layout=rollout.layout(model, inputs.rollout_mesh, config.rollout.weights),
        eval_layout=rollout.layout(model, inputs.rollout_mesh, config.eval.weights),
        generator=generator,
        respond=(
            responses.GivenResponder(generator)
            if config.rollout.policy == "reference"
            else responses.Responder(config, generator, store)
        ),
    )


def read(config: ml_collections.ConfigDict) -> Inputs:
    """Reads and checks everything that a run needs; writes nothing. Raises UserError as `setup`."""
    distributed.require_same("config", lambda: checkpoint.without_paths(config))
    trackers.require_installed(config.train.trackers)
    mesh = sharding.train_mesh(config.mesh)
    check_batch(config, mesh)
    model = pretrained.load(**config.model, chat_template=config.prompts.chat_template, mesh=mesh)
    rollout_mesh = sharding.rollout_mesh(mesh, config.mesh.rollout_tensor, config.mesh.rollout_ffw)
    rollout_model = model.on(rollout_mesh)
    _check_vocabulary(config.loss, model.config.vocab_size)
    _check_lengths(config, model)
    records = sources.load(config.data, log, teacher=prompts.shows_teacher(config))
    evaluation = evaluator.of_model(config, rollout_model, rollout_mesh) if evaluator.wanted(config) else None
    watch = Monitor(config, evaluation) if evaluation and config.eval.monitor.every else None
    records, duplicates = _look_for_duplicates(records, config.data, evaluation)
    encoded = encode(config, model, records)
    files = fingerprint.of(model.directory, encoded)
    _require_same_files(files, evaluation)
    return Inputs(
        config=config,
        mesh=mesh,
        model=model,
        rollout_mesh=rollout_mesh,
        rollout_model=rollout_model,
        evaluation=evaluation,
        monitor=watch,
        records=records,
        duplicates=duplicates,
        examples=tuple(encoded.examples()),
        batches=make_batches(config, model, encoded),
        fingerprint=files,
    )


def _check_vocabulary(loss: ml_collections.ConfigDict, vocab_size: int) -> None:
    for key in ("top_k", "weight_top_k"):
        if loss[key] > vocab_size:
            raise UserError(f"config.loss.{key}={loss[key]} exceeds the vocabulary of {vocab_size}")


def _check_lengths(config: ml_collections.ConfigDict, model: pretrained.Pretrained) -> None:
    pairs = [("prompts.student_limit", "rollout.max_new_tokens")]
    if prompts.shows_teacher(config):
        pairs.append(("prompts.teacher_limit", "rollout.max_new_tokens"))
    if config.prompts.cot == "generated":
        pairs.append(("prompts.teacher_limit", "prompts.analysis_tokens"))
    for pair in pairs:
        model.require_length({f"config.{key}": operator.attrgetter(key)(config) for key in pair})


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
    encoded = batches.encode_all(records, tuple(config.data.languages), model.tokenizer, config, analyses)
    for example in encoded.examples():
        for ids in (example.student_ids, example.teacher_ids, example.response_ids):
            if ids is not None:
                model.require_embedded(ids, f"query {example.query_id!r} in {example.language}")
    return encoded


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


def _require_same_files(files: dict[str, str], evaluation: evaluator.Evaluator | None) -> None:
    """All processes build the same batches and programs, so they must have read the same; see distributed.py."""

    def under(key: str) -> dict[str, str]:
        return {name: value for name, value in files.items() if name.startswith(key)}

    for key in ("config.model.path", "config.data.path"):
        distributed.require_same(key, functools.partial(under, key))
    prompts = evaluation.prompts if evaluation else ()
    distributed.require_same("config.eval", lambda: [[*p.key, p.ids.tolist()] for p in prompts])


def claim(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, files: Mapping[str, str] | None = None
) -> lock.Lock | None:
    """Makes `workdir` this run's own, and locks it; refuses one that holds another run. Process 0 gets the lock.

    Args:
      workdir: made if there is none.
      config: compared with that of WORKDIR/config.json and of the last checkpoint.
      files: as fingerprint.of gives them, compared with those of WORKDIR/inputs.json and of the last checkpoint; None
        compares nothing.

    Raises:
      UserError: another run is writing to it; or keys or files differ that must not, which are listed.
      UserFileError: the directory cannot be written.
    """
    held = None
    if distributed.is_first():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            held = lock.take(workdir)
            _refuse_another_run(workdir, config, files)
            jsonl.replace_text(workdir / "config.json", json.dumps(checkpoint.plain(config), indent=1) + "\n")
            if files is not None:
                jsonl.replace_text(workdir / "inputs.json", json.dumps(files, indent=1) + "\n")
        except (UserError, OSError) as error:
            if held:
                held.release()
            if isinstance(error, UserError):
                raise
            raise UserFileError(f"--workdir={workdir} cannot be written: {error.strerror or error}") from error
    if stores.is_shared(workdir):
        distributed.require_shared(workdir)
    return held


def _refuse_another_run(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, files: Mapping[str, str] | None
) -> None:
    """The last checkpoint says what a workdir holds, and WORKDIR's own files, which may be edited or removed, too."""
    for old in (checkpoint.recorded(workdir, "config"), jsonl.read_object(workdir / "config.json")):
        if changes := checkpoint.config_changes(old, config) if old else []:
            raise UserError(
                f"{workdir} holds a run with another config; use a new --workdir, or revert these keys:\n  "
                + "\n  ".join(changes)
            )
    for old in (checkpoint.recorded(workdir, "inputs"), jsonl.read_object(workdir / "inputs.json")):
        if changes := fingerprint.changes(old, files) if old and files is not None else []:
            raise UserError(
                f"{workdir} holds a run on other files of the same paths; use a new --workdir, or put these back:\n  "
                + "\n  ".join(changes)
            )


def check(run: Run) -> None:
    """Raises a UserError as soon as the run cannot keep what it computes: after each step, without waiting."""
    if run.lock:
        run.lock.check()
    run.checkpoints.check()
    stores.check(run.workdir)


def teacher_store(
    config: ml_collections.ConfigDict, model: pretrained.Pretrained, path: pathlib.Path
) -> responses.Store:
    """What the frozen teacher writes once, in the file `path`."""
    return responses.Store(path, responses.fingerprint(config, model.directory))


def rollout_params(run: Run, frozen: decoder.Params, trained: decoder.Params) -> decoder.Params:
    """All weights as rollouts take them; `frozen` and `trained` are the two parts of model.split."""
    return rollout.reshard(decoder.join(frozen, trained), run.model.dtype, run.rollout_layout)


def eval_params(run: Run, frozen: decoder.Params, trained: decoder.Params) -> decoder.Params:
    """All weights as evaluations take them; arguments as in `rollout_params`."""
    return rollout.reshard(decoder.join(frozen, trained), run.model.dtype, run.eval_layout)


def describe(run: Run) -> None:
    """Prints what is trained, how, and on what."""
    config, model = run.config, run.model
    count = sum(leaf.size for leaf in jax.tree.leaves(model.abstract))
    trained = sum(leaf.size for leaf in jax.tree.leaves(model.split(model.abstract)[0]))
    log(
        f"model: {model.directory}, {count:,} parameters"
        + (f", {trained:,} of them trained" if trained < count else "")
        + f"; mesh: {sharding.describe(run.mesh)} ({jax.devices()[0].device_kind})"
    )
    heads, widest = (sharding.parts(run.rollout_mesh, axis) for axis in ("heads", "ffw"))
    if widest > run.mesh.shape["tensor"]:
        log(f"generation: attention over {heads} devices, feed-forward layers and vocabulary over {widest}")
    teacher = f"{config.teacher.kind} teacher" if prompts.shows_teacher(config) else "no teacher"
    log(
        f"{'MSD' if prompts.shows_teacher(config) else 'fine-tuning'}: {config.rollout.policy}, {teacher}, "
        f"{run.loss.divergence}, {run.loss.weighting} weights; scored at temperature {run.loss.temperature}"
    )
    if config.rollout.policy == "reference":
        log(f"responses: the records' answers, at most {config.rollout.max_new_tokens} tokens")
    else:
        _describe_sampling(run)
    if run.loss.normalize == "mean" and run.loss.weighting != "uniform":
        log("note: follow kl; the loss is divided by its weights, which shrink with kl, so that it may rise meanwhile")
    if config.teacher.kind == "live":
        log("note: a live teacher can collapse within 100 steps; ema with decay 0.95 held where it did not")


def _describe_sampling(run: Run) -> None:
    sampling = run.generator.sampling
    log(
        f"sampling: temperature {sampling.temperature}, top_k {sampling.top_k}, top_p {sampling.top_p}, "
        f"at most {sampling.max_new_tokens} tokens, stop at {list(run.model.stop_ids)}"
    )
    if sampling.temperature != run.loss.temperature:
        log(
            f"note: responses are sampled at temperature {sampling.temperature} and scored at "
            f"{run.loss.temperature} (config.rollout.temperature, config.loss.temperature)"
        )
