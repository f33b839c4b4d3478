"""The loop: evaluate, then generate and update step after step, then export and evaluate again."""

from collections.abc import Callable

import grain
import jax

from msd_jax.data.batches import Batch
from msd_jax.generation import analyses
from msd_jax.io.console import log, progress
from msd_jax.models import decoder, export
from msd_jax.parallel import distributed, sharding
from msd_jax.training import checkpoint, completions, train_step
from msd_jax.training.generate import generate
from msd_jax.training.metrics import Dispatched, LateRows, Metrics
from msd_jax.training.run import Run, describe, encode, make_batches, rollout_params, teacher_store
from msd_jax.training.train_step import TrainState


def train(run: Run) -> None:
    """Trains from the last checkpoint, or from the initial weights, to the end; evaluates before and after."""
    state, frozen = initial_state(run)
    queries = iter(with_analyses(run, frozen, state) if run.config.prompts.cot == "generated" else run.batches)
    step = distributed.from_first(lambda: run.checkpoints.latest) or 0
    if step:
        state, position = run.checkpoints.restore(step, checkpoint.abstract(state))
        queries.set_state(position)
        log(f"resumed from step {step} of {run.workdir}")
    describe(run)
    evaluate(run, 0, lambda: rollout_params(run, frozen, run.model.params(run.mesh)))
    if run.monitor:
        run.monitor.start(run.workdir / "eval" / "0")
    step, state = take_steps(run, frozen, state, queries, step)
    run.checkpoints.close()
    if run.config.train.export and step:
        export_model(run, frozen, state)
    evaluate(run, step, lambda: rollout_params(run, frozen, state.params))


def take_steps(
    run: Run, frozen: decoder.Params, state: TrainState, queries: grain.DatasetIterator[Batch], step: int
) -> tuple[int, TrainState]:
    """Takes the steps from `step` on: (number of steps, state), those gone back to where utility fell below the floor.

    While the devices are at a step, the host writes the row of the one before. Only where a state is measured or saved
    the host waits for its step, so that the rows up to a checkpoint are on disk before it is.
    """
    config, files, low = run.config.train, Metrics(run.workdir, step), {}
    with progress("training", config.steps, step) as advance:
        rows = LateRows(files, config.log_every, config.steps, advance)
        while step < config.steps:
            with jax.transfer_guard("disallow"):  # nothing goes to or from devices but by put_batch and fetch
                generated = generate(run, frozen, state, next(queries), step)
                if (step + 1) % config.completions_every == 0 and config.completions_kept:
                    files.completions(step + 1, completions.entries(run, frozen, state, generated))
                state, scalars = run.train_step(state, frozen, sharding.put_batch(run.mesh, generated.batch))
            learning_rate, step = float(run.learning_rates[step]), step + 1
            rows.add(Dispatched(step, scalars, learning_rate, generated, run.generator.compilations))
            if run.monitor and run.monitor.due(step):
                done = rows.wait()
                row = rows.flush(run.monitor.look(rollout_params(run, frozen, state.params)), done)
                if not run.monitor.holds(row):
                    low = row
                    break
            preempted = distributed.preempted()
            if preempted or step % config.checkpoint_every == 0 or step == config.steps:
                rows.flush()
                run.checkpoints.save(step, state, queries.get_state(), run.config)
            if preempted and step < config.steps:
                run.checkpoints.close()
                distributed.end_preempted(f"preempted: step {step} is saved; run the same command again to resume")
    files.close()
    return go_back(run, frozen, state, step, low) if low else (step, state)


def go_back(
    run: Run, frozen: decoder.Params, state: TrainState, step: int, row: dict[str, float]
) -> tuple[int, TrainState]:
    """(step, state) of the last checkpoint whose utility holds the floor, or of the initial weights."""
    assert run.monitor  # it measured the row
    log(
        f"stopped after step {step}: the slice's utility is {row['slice_utility']:.1%}, below "
        f"{run.monitor.floor:.1%} (config.eval.utility_floor={run.config.eval.utility_floor} of what it was)"
    )
    run.checkpoints.wait()
    like = checkpoint.abstract(state)
    jax.tree.map(lambda x: x.delete(), state)  # room for what is restored, though the caller still names it
    for earlier in distributed.from_first(lambda: run.checkpoints.steps):
        restored, _ = run.checkpoints.restore(earlier, like)
        measured = run.monitor.look(rollout_params(run, frozen, restored.params))
        if run.monitor.holds(measured):
            log(f"went back to step {earlier}, whose utility is {measured['slice_utility']:.1%}")
            return earlier, restored
        jax.tree.map(lambda x: x.delete(), restored)
    log("went back to the initial weights: no checkpoint that is kept holds the floor")
    return 0, initial_state(run)[0]


def initial_state(run: Run) -> tuple[TrainState, decoder.Params]:
    """(state, the weights that are not trained), as the model comes."""
    return train_step.initial_state(run.model, run.mesh, run.optimize, run.config.teacher.kind, run.config.seed)


def with_analyses(run: Run, frozen: decoder.Params, state: TrainState) -> grain.IterDataset[Batch]:
    """The run's batches with the teacher's analyses, which it writes now unless they are stored."""
    store = teacher_store(run.config, run.model, run.workdir / "analyses.jsonl")
    written = analyses.write(
        run.records, run.config, run.model, run.mesh, lambda: rollout_params(run, frozen, state.params), store
    )
    return make_batches(run.config, run.model, encode(run.config, run.model, run.records, written))


def evaluate(run: Run, step: int, params: Callable[[], decoder.Params]) -> None:
    """Evaluates what `params` gives, unless the config asks for no evaluation or it is stored already."""
    if run.evaluation:
        run.evaluation.run(params, run.workdir / "eval" / str(step))


def export_model(run: Run, frozen: decoder.Params, state: TrainState) -> None:
    """Writes WORKDIR/model, and the adapters alone to WORKDIR/adapter where they are what was trained."""
    model, directory = run.model, run.workdir / "model"
    export.save(directory, decoder.join(frozen, state.params), model.directory, lora=model.lora)
    log(f"aligned model: {directory}")
    if model.lora:
        export.save_adapter(run.workdir / "adapter", state.params, model, run.config.model.path)
        log(f"its adapter: {run.workdir / 'adapter'}")
