"""The loop: evaluate, then generate and update step after step, then export and evaluate again."""

from collections.abc import Callable

import grain
import jax

from msd_jax.data.batches import Batch
from msd_jax.errors import UserError
from msd_jax.evaluation.rates import Summary
from msd_jax.generation import analyses
from msd_jax.io import compilations, stores
from msd_jax.io.console import log, progress
from msd_jax.models import decoder, export
from msd_jax.parallel import peers, preemption
from msd_jax.training import checkpoint, completions, goodput, profile, trackers, train_step, watch
from msd_jax.training.generate import generate
from msd_jax.training.metrics import Dispatched, LateRows, Metrics
from msd_jax.training.run import Run, check, describe, encode, eval_params, make_batches, rollout_params, teacher_store
from msd_jax.training.train_step import TrainState


def train(run: Run) -> Summary:
    """Trains from the last checkpoint, or from the initial weights, to the end; evaluates before and after.

    Returns:
      The last evaluation's summary; {} where the config asks for none.
    """
    state, frozen = initial_state(run)
    queries = iter(with_analyses(run, frozen, state) if run.config.prompts.cot == "generated" else run.batches)
    step = 0
    with run.clock.phase("checkpoints"):
        last = next(run.checkpoints.restorable(checkpoint.abstract(state)), None)
    if last:
        step, state, position = last
        queries.set_state(position)
        log(f"resumed from step {step} of {stores.told(run.workdir)}")
    run.clock.resume(step)
    describe(run)
    evaluate(run, 0, lambda: eval_params(run, frozen, run.model.params(run.mesh)))
    if run.monitor:
        run.monitor.start(run.workdir / "eval" / "0")
    with preemption.finishing_steps():
        try:
            with run.clock.phase("steps"):
                step, state = take_steps(run, frozen, state, queries, step)
        except UserError:  # on every process; what was saved before is whole
            run.checkpoints.close()
            raise
        with run.clock.phase("checkpoints"):
            run.checkpoints.close()
    if run.config.train.export and step:
        watch.require_fit(state.params)
        export_model(run, frozen, state)
    summary = evaluate(run, step, lambda: eval_params(run, frozen, state.params))
    log(goodput.describe([run.clock.keep(step)]))
    return summary


def take_steps(
    run: Run, frozen: decoder.Params, state: TrainState, queries: grain.DatasetIterator[Batch], step: int
) -> tuple[int, TrainState]:
    """Takes the steps from `step` on: (number of steps, state), those gone back to where the slice broke a bound.

    While the devices are at a step, the host writes the row of the one before. Only where a state is measured or saved
    the host waits for its step, so that the rows up to a checkpoint are on disk before it is.
    """
    config, low, saved = run.config.train, "", step
    files = Metrics(run.workdir, step, trackers.of(run.config, run.workdir, step))
    watched = watch.Watch(config, run.workdir, run.model, step)
    window = profile.Window(run.workdir / "profile", config.profile_steps, step, config.steps)
    with progress("training", config.steps, step) as advance:
        rows = LateRows(files, config.log_every, config.steps, advance, watched, run.utilisation)
        while step < config.steps:
            compiled = compilations.so_far().seconds
            with (
                window.step(step),
                jax.transfer_guard("disallow"),
            ):  # nothing goes to or from devices but by put_batch and fetch
                generated = generate(run, frozen, state, next(queries), step)
                if (step + 1) % config.completions.every == 0 and config.completions.kept:
                    files.completions(step + 1, completions.entries(run, frozen, state, generated))
                state, scalars = run.train_step(state, frozen, generated.packs)
            learning_rate, step = float(run.learning_rates[step]), step + 1
            window.end(step, scalars)
            check(run)
            counts = run.generator.compilations, compilations.so_far().seconds - compiled
            rows.add(Dispatched(step, scalars, learning_rate, generated, *counts))
            if run.monitor and run.monitor.due(step):
                done = rows.wait()
                with run.clock.phase("evaluation"):
                    seen = run.monitor.look(eval_params(run, frozen, state.params))
                row = rows.flush(seen, done)
                if fault := run.monitor.fault(row):
                    low = f"the slice's {fault}"
                    break
            preempted, again = preemption.agreed(run.checkpoints.due_again)
            ends = preempted or step == config.steps
            # Whoever asked for a save before the last one, at the step before, has got it.
            if ends or step % config.checkpoints.every == 0 or (again and saved < step - 1):
                rows.flush()
                if not watched.skipping or ends:  # else good ones would make room for it
                    save(run, step, state, queries)
                    saved = step
            if ends:
                finish_saving(run, step, state, queries)
            if preempted and step < config.steps:
                run.clock.keep(step)
                stores.close(run.workdir)
                preemption.end_preempted(f"preempted: step {step} is saved; run the same command again to resume")
    files.close()
    return go_back(run, frozen, state, step, low) if low else (step, state)


def save(run: Run, step: int, state: TrainState, queries: grain.DatasetIterator[Batch]) -> None:
    """Saves a checkpoint, in the background once it is copied to the host."""
    with run.clock.phase("checkpoints"):
        run.checkpoints.save(step, state, queries.get_state())
    run.clock.keep(step)


def finish_saving(run: Run, step: int, state: TrainState, queries: grain.DatasetIterator[Batch]) -> None:
    """Waits until the last checkpoint is complete; saves it again where storage fails for a moment."""
    with run.clock.phase("checkpoints"):
        while not run.checkpoints.wait():
            run.checkpoints.save(step, state, queries.get_state())


def go_back(run: Run, frozen: decoder.Params, state: TrainState, step: int, fault: str) -> tuple[int, TrainState]:
    """(step, state) of the last checkpoint that holds the monitor's bounds, or of the initial weights."""
    assert run.monitor  # it found the fault
    log(f"stopped after step {step}: {fault}")
    run.checkpoints.wait()
    like = checkpoint.abstract(state)
    jax.tree.map(lambda x: x.delete(), state)  # room for what is restored, though the caller still names it
    for earlier, restored, _ in run.checkpoints.restorable(like):
        measured = run.monitor.look(eval_params(run, frozen, restored.params))
        if not run.monitor.fault(measured):
            log(f"went back to step {earlier}, whose " + _rates(measured))
            return earlier, restored
        jax.tree.map(lambda x: x.delete(), restored)
    log("went back to the initial weights: no checkpoint that is kept holds the bounds")
    return 0, initial_state(run)[0]


def _rates(seen: dict[str, float]) -> str:
    named = {"utility": "slice_utility", "over-refusal": "slice_over_refusal"}
    return " and ".join(f"{name} is {seen[key]:.1%}" for name, key in named.items() if key in seen)


def initial_state(run: Run) -> tuple[TrainState, decoder.Params]:
    """(state, the weights that are not trained), as the model comes."""
    config = run.config
    kept, spikes = train_step.kept_teacher(config), config.train.skip_spikes > 0
    return train_step.initial_state(run.model, run.mesh, run.optimize, kept, config.seed, spikes)


def with_analyses(run: Run, frozen: decoder.Params, state: TrainState) -> grain.IterDataset[Batch]:
    """The run's batches with the teacher's analyses, which it writes now unless they are stored."""
    store = teacher_store(run.config, run.model, run.workdir / "analyses.jsonl")
    written = analyses.write(
        run.records,
        run.config,
        run.rollout_model,
        run.rollout_mesh,
        lambda: rollout_params(run, frozen, state.params),
        store,
    )
    return make_batches(run.config, run.model, encode(run.config, run.model, run.records, written))


def evaluate(run: Run, step: int, params: Callable[[], decoder.Params]) -> Summary:
    """The evaluation of what `params` gives, or the stored one; {} where the config asks for none."""
    if run.evaluation is None:
        return {}
    with run.clock.phase("evaluation"):
        return run.evaluation.run(params, run.workdir / "eval" / str(step))


def export_model(run: Run, frozen: decoder.Params, state: TrainState) -> None:
    """Writes WORKDIR/model, and the adapters alone to WORKDIR/adapter where they are what was trained."""
    model, directory = run.model, run.workdir / "model"
    params = decoder.join(frozen, state.params)
    peers.moved("exporting the model")
    export.save(directory, params, model.directory, lora=model.lora, companions=model.companions())
    log(f"aligned model: {stores.told(directory)}")
    if model.lora:
        export.save_adapter(run.workdir / "adapter", state.params, model, run.config.model.path)
        log(f"its adapter: {stores.told(run.workdir / 'adapter')}")
