"""The fastest setting that fits: meshes, micro-batches and what the backward pass keeps."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import ml_collections
from jax.sharding import Mesh

from msd_jax.io.console import log
from msd_jax.parallel import sharding
from msd_jax.planning import table
from msd_jax.planning.programs import (
    Pod,
    Program,
    build,
    bytes_a_chip,
    compile_task,
    rollout_params,
    step_seconds,
    tasks,
    with_values,
)
from msd_jax.training import train_step


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One setting of the knobs, and what came of it."""

    config: ml_collections.ConfigDict
    pod: Pod
    programs: dict[str, Program]

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs.values())

    @property
    def flags(self) -> str:
        mesh = ",".join(str(size) for size in self.pod.mesh.shape.values())
        c = self.config
        return (
            f"--mesh {mesh} --config.train.micro_batches={c.train.micro_batches} --config.model.remat={c.model.remat}"
        )


def search(config: ml_collections.ConfigDict, sizes: Any, pod: Pod) -> Candidate | None:
    """The fastest setting that fits, or None: every mesh with the fewest micro-batches that fit, then less remat."""
    best: Candidate | None = None

    def attempt(setting: ml_collections.ConfigDict, mesh: Mesh, known: dict[str, Program]) -> Candidate:
        nonlocal best
        model = build(setting, sizes, mesh)
        place = dataclasses.replace(pod, mesh=mesh)
        programs = dict(known)
        # What generates first: it compiles fastest, and rules out most.
        for task in sorted(tasks(setting, model, mesh), key=lambda task: task.name == "train"):
            if task.name not in programs and all(program.fits for program in programs.values()):
                programs[task.name] = compile_task(task, place)
        candidate = Candidate(setting, place, programs)
        fullest = max(programs.values(), key=lambda program: program.total_hbm_bytes)
        verdict = f"at least {table.si(step_seconds(programs), 's')} a step" if candidate.fits else "does not fit"
        log(f"{candidate.flags}: {table.gib(fullest.total_hbm_bytes)}, {verdict}")
        if candidate.fits and (best is None or step_seconds(programs) < step_seconds(best.programs)):
            best = candidate
        return candidate

    devices = list(pod.mesh.devices.flat)
    for data, fsdp, tensor in meshes(pod):
        known: dict[str, Program] = {}
        for micro_batches in (2**i for i in range(config.data.batch_size.bit_length())):
            setting = with_values(config, **{"train.micro_batches": micro_batches, "model.remat": "full"})
            try:
                mesh = sharding.make_mesh(data, fsdp, tensor, devices=devices)
                train_step.check_batch(setting, mesh)
                model = build(setting, sizes, mesh)
                model.shardings(mesh, sharding.TRAIN)
            except ValueError:  # an axis that does not divide
                break
            if bytes_a_chip(rollout_params(model, mesh)) + bytes_a_chip(model.target(mesh)) > pod.chip.hbm:
                break
            candidate = attempt(setting, mesh, known)
            known = {name: program for name, program in candidate.programs.items() if name != "train"}
            if candidate.fits or not all(program.fits for program in known.values()):
                break
    if best is not None:
        for remat in ("none", "dots"):
            known = {name: program for name, program in best.programs.items() if name != "train"}
            if attempt(with_values(best.config, **{"model.remat": remat}), best.pod.mesh, known).fits:
                break
    return best


def meshes(pod: Pod) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor) worth a try, fsdp alone first."""
    for tensor in (1, 2, 4, 8):
        for data in (pod.slices, 4 * pod.slices):
            if pod.devices % (data * tensor) == 0 and pod.devices >= data * tensor:
                yield data, pod.devices // (data * tensor), tensor
