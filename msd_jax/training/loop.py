"""Training: what is set up once, and the loop."""

import collections
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from msd_jax import losses, report, settings
from msd_jax.data import batches, near_duplicates, sources
from msd_jax.data.records import Query
from msd_jax.errors import UserError, UserFileError
from msd_jax.evaluation import evaluator
from msd_jax.generation import analyses, responses, rollout
from msd_jax.io import jsonl
from msd_jax.io.console import progress, say
from msd_jax.models import decoder, export, pretrained
from msd_jax.parallel import distributed, host_memory, padding, sharding
from msd_jax.training import checkpoint, metrics, monitor, optimizer, train_step


class Trainer:
    """A run: made from a config and a workdir with every check done, then `train()`."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path):
        """Reads and checks everything; nothing is compiled and nothing long begins.

        Raises:
          UserError: one clear message for what is wrong with the config, a file or the workdir.
        """
        settings.check(config)
        host_memory.give_back_after_compilations()
        distributed.require_same("config", lambda: checkpoint.without_paths(config))
        self.config, self.workdir = config, workdir
        self.mesh = sharding.make_mesh(**config.mesh)
        train_step.check_batch(config, self.mesh)
        self.model = pretrained.load(**config.model, mesh=self.mesh)
        for key in ("top_k", "weight_top_k"):
            if config.loss[key] > self.model.config.vocab_size:
                raise UserError(
                    f"config.loss.{key}={config.loss[key]} exceeds the vocabulary of {self.model.config.vocab_size}"
                )
        self.records = sources.load(config.data, say)
        self.evaluation = evaluator.Evaluation(config, self.model, self.mesh) if evaluator.wanted(config) else None
        self.monitor = monitor.Monitor(config, self.evaluation) if config.eval.every else None
        self.records, duplicates = self._look_for_duplicates()
        # Where the teacher writes analyses first, batches are made anew with them; what can be checked is checked now.
        encoded = batches.encode_all(self.records, tuple(config.data.languages), self.model.tokenizer, config)
        self._require_same_files(encoded)
        self.batches = self._make_batches(encoded)
        claim(workdir, config)
        if self.evaluation and distributed.is_first():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in duplicates)
            jsonl.replace_text(workdir / "near_duplicates.jsonl", lines)
        self.checkpoints = checkpoint.Checkpoints(workdir, config.train.checkpoints.kept)

        self.optimize, schedule = optimizer.make_optimizer(config.optimizer, config.train.steps)
        self.learning_rates = np.asarray(jax.jit(jax.vmap(schedule))(np.arange(config.train.steps)))
        self.rollout_shardings = self.model.shardings(self.mesh, sharding.ROLLOUT)
        sampling = {key: config.rollout[key] for key in ("max_new_tokens", "temperature", "top_k", "top_p")}
        self.generator = rollout.Generator(
            self.model.graphdef, self.mesh, rollout.Sampling(**sampling), self.model.stop_ids, self.model.pad_id
        )
        store = None
        if config.rollout.policy != "on_policy" and config.rollout.reuse_teacher_responses:
            store = self._store("teacher_responses.jsonl")
        self.respond = responses.Responder(config, self.generator, store)
        self.loss = train_step.loss_settings(config)
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()  # each costs one compilation
        self.train_step = train_step.jit_train_step(config, self.model, self.mesh, self.optimize)

    def _make_batches(self, encoded: batches.Encoded) -> Any:
        data = self.config.data
        for line in encoded.describe_dropped():
            say(line)
        stream = batches.batches(
            encoded,
            dict(data.languages),
            data.batch_size,
            self.config.seed,
            self.model.pad_id,
            data.length_window,
            source_weights=sources.weights(data),
            harmful_share=None if data.harmful_share < 0 else data.harmful_share,
            retain_fraction=data.retain_fraction,
        )
        return iter(stream)

    def _look_for_duplicates(self) -> tuple[tuple[Query, ...], list[dict[str, Any]]]:
        """(records to train on, rows of near_duplicates.jsonl); tells how many queries the evaluation shares."""
        benchmarks = collections.defaultdict(dict)
        for prompt in self.evaluation.prompts if self.evaluation else ():
            benchmarks[prompt.benchmark.name][prompt.query.id] = prompt.query
        rows, lines = near_duplicates.find_in_benchmarks(
            self.records, {name: tuple(by_id.values()) for name, by_id in benchmarks.items()}
        )
        for line in lines:
            say(line)
        records, drop = self.records, self.config.data.near_duplicates == "drop"
        if rows and drop:
            shared = {row["train_id"] for row in rows}
            records = tuple(record for record in records if record.id not in shared)
            say(f"near-duplicates: {len(self.records) - len(records)} of {len(self.records)} training queries dropped")
            if not records:
                raise UserError("config.data.near_duplicates='drop' leaves no query: all are in the evaluation too")
        return records, rows

    def _store(self, name: str) -> responses.Store:
        """What the frozen teacher wrote once, in the workdir."""
        return responses.Store(self.workdir / name, responses.fingerprint(self.config, self.model.directory))

    def _analyse(self, initial: train_step.TrainState) -> None:
        """Has the teacher write its analyses, where it has not yet, and makes the batches with them."""
        weights = lambda: self.rollout_params(initial.params)  # noqa: E731
        store, model = self._store("analyses.jsonl"), self.model
        written = analyses.write(self.records, self.config, model, self.mesh, weights, store)
        languages = tuple(self.config.data.languages)
        encoded = batches.encode_all(self.records, languages, model.tokenizer, self.config, written)
        self.batches = self._make_batches(encoded)

    def _require_same_files(self, encoded: batches.Encoded) -> None:
        """All processes build the same batches and programs, so they must have read the same; see distributed.py."""
        weights = self.model.directory.glob("*.safetensors")
        distributed.require_same("config.model.path", lambda: sorted([f.name, f.stat().st_size] for f in weights))
        examples = list(encoded.examples())
        distributed.require_same(
            "config.data.path",
            lambda: [[e.query_id, e.language, e.student_ids.tolist(), e.teacher_ids.tolist()] for e in examples],
        )
        prompts = self.evaluation.prompts if self.evaluation else ()
        distributed.require_same("config.eval", lambda: [[*p.key, p.ids.tolist()] for p in prompts])

    def initial_state(self) -> train_step.TrainState:
        """Weights as they come, in the layout of update.abstract_state. Also sets `frozen`."""
        params, self.frozen = self.model.split(self.model.params(self.mesh, seed=self.config.seed))
        target, _ = train_step.abstract_state(self.model, self.mesh, self.optimize, self.config.teacher.kind)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, target.opt_state)
        opt_state = jax.jit(self.optimize.init, out_shardings=shardings)(params)
        step, skipped = (sharding.put_replicated(self.mesh, np.zeros((), np.int32)) for _ in range(2))
        teacher = None
        if target.teacher is not None:  # a copy: params are donated to every step, and the teacher must outlive them
            copy = lambda p, leaf: jnp.array(p, leaf.dtype, copy=True)  # noqa: E731
            shardings = jax.tree.map(lambda leaf: leaf.sharding, target.teacher)
            teacher = jax.jit(lambda p: jax.tree.map(copy, p, target.teacher), out_shardings=shardings)(params)
        return train_step.TrainState(step, params, teacher, opt_state, skipped)

    def train(self) -> None:
        """Runs, or goes on with, the whole job: evaluation, training, export, evaluation."""
        config = self.config
        state = self.initial_state()
        if config.prompts.cot == "generated":
            self._analyse(state)
        step = distributed.from_first(lambda: self.checkpoints.latest) or 0
        if step:
            state, position = self.checkpoints.restore(step, checkpoint.abstract(state))
            self.batches.set_state(position)
            say(f"resumed from step {step} of {self.workdir}")
        self._describe()
        if self.evaluation:
            initial = lambda: self.rollout_params(self.model.params(self.mesh))  # noqa: E731
            self.evaluation.run(initial, self.workdir / "eval" / "0")
        if self.monitor:
            self.monitor.start(self.workdir / "eval" / "0")
        writer, stopped = metrics.Metrics(self.workdir, step), False
        with progress("training", config.train.steps, step) as advance:
            while step < config.train.steps and not stopped:
                with jax.transfer_guard("disallow"):  # nothing goes to or from devices but by put_batch and fetch
                    state, row = self.step(step, state, writer)
                step += 1
                looked = bool(self.monitor and self.monitor.due(step))
                if looked:
                    row |= self.monitor.look(self.rollout_params(state.params))
                    stopped = not self.monitor.holds(row)
                if step % config.train.log_every == 0 or step == config.train.steps or looked:
                    writer.scalars(step, row)
                preempted = distributed.preempted(step) and not stopped
                due = step % config.train.checkpoints.every == 0 or step == config.train.steps or preempted
                if due and not stopped:
                    self.checkpoints.save(step, state, self.batches.get_state(), config)
                advance(step, describe(row))
                if preempted and step < config.train.steps:
                    self.checkpoints.close()
                    distributed.end_preempted(f"preempted: step {step} is saved; the same command goes on from there")
        writer.close()
        if stopped:
            step, state = self._go_back(step, state, row)
        self.checkpoints.close()
        if config.train.export and step:
            self.export(state)
        if self.evaluation:
            self.evaluation.run(lambda: self.rollout_params(state.params), self.workdir / "eval" / str(step))

    def report(self) -> None:
        """Shows the table, and writes WORKDIR/report."""
        report.write(self.workdir)

    def _go_back(
        self, step: int, state: train_step.TrainState, row: dict[str, float]
    ) -> tuple[int, train_step.TrainState]:
        """The last checkpoint whose utility holds the floor, or the initial weights: (its step, its state)."""
        say(
            f"stopped after step {step}: the slice's utility is {row['slice_utility']:.1%}, below "
            f"{self.monitor.floor:.1%} (config.eval.utility_floor={self.config.eval.utility_floor} of what it was)"
        )
        self.checkpoints.wait()
        like = checkpoint.abstract(state)
        jax.tree.map(lambda x: x.delete(), state)  # room for what is restored, though the caller still names it
        for earlier in distributed.from_first(lambda: self.checkpoints.steps):
            restored, _ = self.checkpoints.restore(earlier, like)
            seen = self.monitor.look(self.rollout_params(restored.params))
            if self.monitor.holds(seen):
                say(f"gone back to step {earlier}, whose utility is {seen['slice_utility']:.1%}")
                return earlier, restored
            jax.tree.map(lambda x: x.delete(), restored)
        say("gone back to the initial weights: no checkpoint that is kept holds the floor")
        return 0, self.initial_state()

    def step(
        self, step: int, state: train_step.TrainState, writer: metrics.Metrics
    ) -> tuple[train_step.TrainState, dict[str, float]]:
        """Responses for the next batch, then one train_step; returns the new state and the step's scalars."""
        batch = next(self.batches)
        teacher = state.params if state.teacher is None else state.teacher
        start = time.perf_counter()
        written = self.respond(
            step, batch, lambda: self.rollout_params(state.params), lambda: self.rollout_params(teacher)
        )
        rollout_seconds = time.perf_counter() - start

        start = time.perf_counter()
        R = padding.bucket(max(int(written.length_B.max()), 1), self.config.rollout.max_new_tokens)
        train_batch = train_step.TrainBatch(
            batch.student_prompt_BxP,
            batch.student_length_B,
            batch.teacher_prompt_BxP,
            batch.teacher_length_B,
            written.response_BxR[:, :R],
            written.length_B,
        )
        on_device = sharding.put_batch(self.mesh, train_batch)
        self._shapes.add(tuple(x.shape for x in train_batch))
        if (step + 1) % self.config.train.completions.every == 0 and self.config.train.completions.kept:
            writer.completions(step + 1, self.completions(state, batch, written, train_batch))
        state, scalars = self.train_step(state, self.frozen, on_device)
        row = {name: float(value) for name, value in sharding.fetch(scalars).items()}
        train_seconds = time.perf_counter() - start

        columns = sum(x.size for x in (train_batch.student_prompt_BxP, train_batch.teacher_prompt_BxP))
        columns += 2 * train_batch.response_BxR.size
        real = int(train_batch.student_length_B.sum() + train_batch.teacher_length_B.sum() + 2 * written.length_B.sum())
        row |= {
            "learning_rate": float(self.learning_rates[step]),
            "response_length": float(written.length_B.mean()),
            "stopped": float(written.stopped_B.mean()),
            "on_policy": float(written.on_policy_B.mean()),
            "rollout_seconds": rollout_seconds,
            "train_seconds": train_seconds,
            "rollout_tokens_per_second": written.generated / rollout_seconds,
            "train_tokens_per_second": real / train_seconds,
            "padding": 1 - real / columns,
            "rollout_compilations": self.generator.compilations,
            "train_compilations": len(self._shapes),
        }
        return state, row

    def rollout_params(self, trained: decoder.Params) -> decoder.Params:
        return rollout.relayout(decoder.join(self.frozen, trained), self.model.dtype, self.rollout_shardings)

    def export(self, state: train_step.TrainState) -> None:
        """Writes WORKDIR/model, and the adapters alone to WORKDIR/adapter where they are what was trained."""
        export.save(
            self.workdir / "model",
            decoder.join(self.frozen, state.params),
            self.model.directory,
            lora=self.model.lora,
        )
        say(f"aligned model: {self.workdir / 'model'}")
        if self.model.lora:
            export.save_adapter(self.workdir / "adapter", state.params, self.model, self.config.model.path)
            say(f"its adapter: {self.workdir / 'adapter'}")

    def completions(
        self,
        state: train_step.TrainState,
        batch: batches.Batch,
        written: responses.Responses,
        train_batch: train_step.TrainBatch,
    ) -> list[dict[str, Any]]:
        """For a few rows: both prompts, the response, and each token's divergence and weights before the update."""
        rows = sharding.batch_rows(self.mesh, self.config.train.completions.kept)
        train_batch = sharding.put_batch(self.mesh, train_step.TrainBatch(*(array[:rows] for array in train_batch)))
        teacher = state.params if state.teacher is None else state.teacher
        both = (decoder.join(self.frozen, trained) for trained in (state.params, teacher))
        tokens = sharding.fetch(self._per_token_loss(*both, train_batch))
        decode = self.model.tokenizer.decode
        entries = []
        for row in range(min(self.config.train.completions.kept, len(batch.examples))):
            example, length = batch.examples[row], int(written.length_B[row])
            ids = written.response_BxR[row, :length].tolist()
            entries.append(
                {
                    "id": example.query_id,
                    "language": example.language,
                    "harmful": example.harmful,
                    "policy": "on_policy" if written.on_policy_B[row] else "off_policy",
                    "student_prompt": decode(example.student_ids),
                    "teacher_prompt": decode(example.teacher_ids),
                    "response": decode(ids),
                    "tokens": [decode([i]) for i in ids],
                }
                | {name: np.round(value[row, :length].astype(float), 5).tolist() for name, value in tokens.items()}
            )
        return entries

    @functools.cached_property
    def _per_token_loss(self) -> Any:
        keywords = {k: v for k, v in vars(self.loss).items() if k != "normalize"}

        def run(student, teacher, batch):
            logits = train_step.both_logits(self.model.graphdef, student, teacher, batch)
            return losses.per_token_loss(*logits, batch.response_BxR, **keywords)

        return jax.jit(run)

    def _describe(self) -> None:
        c, sampling = self.config, self.generator.sampling
        count = sum(leaf.size for leaf in jax.tree.leaves(self.model.abstract))
        mesh = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        trained = sum(leaf.size for leaf in jax.tree.leaves(self.model.split(self.model.abstract)[0]))
        say(
            f"model: {self.model.directory}, {count:,} parameters"
            + (f", {trained:,} of them trained" if trained < count else "")
            + f"; mesh: {mesh} ({jax.devices()[0].device_kind})"
        )
        say(
            f"MSD: {c.rollout.policy}, {c.teacher.kind} teacher, {self.loss.divergence}, "
            f"{c.loss.weighting} weights; scored at temperature {c.loss.temperature}"
        )
        say(
            f"sampling: temperature {sampling.temperature}, top_k {sampling.top_k}, top_p {sampling.top_p}, "
            f"at most {sampling.max_new_tokens} tokens, stop at {list(self.model.stop_ids)}"
        )
        if sampling.temperature != c.loss.temperature:
            say(
                f"note: responses are sampled at temperature {sampling.temperature} and scored at "
                f"{c.loss.temperature} (config.rollout.temperature, config.loss.temperature)"
            )
        if c.teacher.kind == "live":
            say("note: a live teacher can collapse within 100 steps; ema with decay 0.95 held where it did not")


def describe(row: dict[str, float]) -> str:
    """A step's scalars in a few words, for the progress bar."""
    return (
        f"loss {row['loss']:.4f}  kl {row['kl']:.4f}  "
        f"{row['rollout_tokens_per_second']:,.0f} + {row['train_tokens_per_second']:,.0f} tok/s"
    )


def claim(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Makes `workdir` this config's own; refuses one that holds the run of another config.

    Raises:
      UserError: keys differ that may not; they are listed.
      UserFileError: the directory cannot be written.
    """
    path = workdir / "config.json"

    def compare() -> list[str]:
        return checkpoint.config_changes(json.loads(path.read_text("utf-8")), config) if path.exists() else []

    if changes := distributed.from_first(compare):
        raise UserError(
            f"{workdir} holds a run with another config; take another --workdir, or undo\n  " + "\n  ".join(changes)
        )
    try:
        if distributed.is_first():
            workdir.mkdir(parents=True, exist_ok=True)
            jsonl.replace_text(path, json.dumps(json.loads(config.to_json_best_effort()), indent=1) + "\n")
        distributed.require_shared(workdir)
    except OSError as error:
        raise UserFileError(f"--workdir={workdir} cannot be written: {error.strerror or error}") from error
