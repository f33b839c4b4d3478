"""The fastest setting that fits, among meshes of training and generation, micro-batches and remat."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import ml_collections

from msd_jax.errors import UserError
from msd_jax.io.console import log
from msd_jax.planning import table
from msd_jax.planning.architecture import abstract_model
from msd_jax.planning.compiled import CompiledProgram, compile_program, step_seconds
from msd_jax.planning.pod import Pod, with_values
from msd_jax.planning.programs import bytes_per_device, rollout_mesh, rollout_params, run_programs
from msd_jax.training import train_step


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting that was tried, and its programs as far as they were compiled: to the first that does not fit."""

    config: ml_collections.ConfigDict
    pod: Pod
    programs: dict[str, CompiledProgram]

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs.values())

    @property
    def generation(self) -> dict[str, CompiledProgram]:
        """All programs but the train step, which alone depends on micro-batches and remat."""
        return {name: program for name, program in self.programs.items() if name != "train"}

    @property
    def generation_fits(self) -> bool:
        return all(program.fits for program in self.generation.values())

    @property
    def seconds(self) -> float:
        return step_seconds(self.programs)

    @property
    def flags(self) -> str:
        mesh = ",".join(str(size) for size in self.pod.mesh.shape.values())
        train, sizes = self.config.train, self.config.mesh
        return (
            f"--mesh {mesh} --config.train.micro_batches={train.micro_batches} "
            f"--config.model.remat={self.config.model.remat} --config.mesh.rollout_tensor={sizes.rollout_tensor} "
            f"--config.mesh.rollout_ffw={sizes.rollout_ffw}"
        )


def search(config: ml_collections.ConfigDict, sizes: Any, pod: Pod) -> Candidate | None:
    """The fastest setting that fits, or None: each mesh with the fewest micro-batches that fit, then less remat.

    In all of them generation shares weights as config.mesh says. For the fastest, other ways are tried at the end.

    Args:
      config: of the run.
      sizes: the model's DecoderConfig.
      pod: whose mesh is replaced.
    """
    tried = [candidate for mesh in candidate_meshes(pod) for candidate in _more_micro_batches(config, sizes, pod, mesh)]
    fastest = _fastest(tried)
    fastest = _fastest([fastest, *_less_remat(fastest, sizes)]) if fastest else None
    return _fastest([fastest, *_other_rollouts(fastest, sizes)]) if fastest else None


def _fastest(candidates: list[Candidate]) -> Candidate | None:
    fitting = (candidate for candidate in candidates if candidate.fits)
    return min(fitting, key=lambda candidate: candidate.seconds, default=None)


def candidate_meshes(pod: Pod) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor) worth trying, fsdp alone first."""
    for tensor in (1, 2, 4, 8):
        for data in dict.fromkeys((pod.fewest_replicas, pod.slices, 4 * pod.slices)):
            if pod.device_count % (data * tensor) == 0 and pod.device_count >= data * tensor:
                yield data, pod.device_count // (data * tensor), tensor


def _more_micro_batches(
    config: ml_collections.ConfigDict, sizes: Any, pod: Pod, mesh_sizes: tuple[int, int, int]
) -> Iterator[Candidate]:
    """Candidates with 1, 2, 4, ... micro-batches, to the first that fits."""
    known: dict[str, CompiledProgram] = {}
    for micro_batches in (2**i for i in range(config.data.batch_size.bit_length())):
        setting = with_values(config, **{"train.micro_batches": micro_batches, "model.remat": "full"})
        try:
            other = pod.with_mesh(*mesh_sizes)
            train_step.check_batch(setting, other.mesh)
            model = abstract_model(setting, sizes, other.mesh)
            generating = bytes_per_device(rollout_params(setting, model, rollout_mesh(setting, other.mesh)))
            weights = generating + bytes_per_device(model.target(other.mesh))
        except UserError:  # an axis does not divide over the mesh
            return
        if weights > pod.device.hbm_bytes:
            return
        candidate = _compile(setting, sizes, other, known)
        yield candidate
        if candidate.fits or not candidate.generation_fits:
            return
        known = candidate.generation


def _less_remat(best: Candidate, sizes: Any) -> Iterator[Candidate]:
    """`best` with less recomputation, to the first that fits."""
    for remat in ("none", "dots"):
        setting = with_values(best.config, **{"model.remat": remat})
        candidate = _compile(setting, sizes, best.pod, best.generation)
        yield candidate
        if candidate.fits:
            return


def _other_rollouts(best: Candidate, sizes: Any) -> Iterator[Candidate]:
    """`best` with generation's weights shared by more devices."""
    known = {name: program for name, program in best.programs.items() if name in ("train", "update")}
    tried = {rollout_mesh(best.config, best.pod.mesh)}
    for tensor in (best.pod.mesh.shape["tensor"] * 2**i for i in range(4)):
        for ffw in (tensor, 2 * tensor, 4 * tensor):
            setting = with_values(best.config, **{"mesh.rollout_tensor": tensor, "mesh.rollout_ffw": ffw})
            try:
                mesh = rollout_mesh(setting, best.pod.mesh)
                rollout_params(setting, abstract_model(setting, sizes, best.pod.mesh), mesh)
            except UserError:  # an axis does not divide over the mesh
                continue
            if mesh not in tried:
                tried.add(mesh)
                yield _compile(setting, sizes, best.pod, known)


def _compile(config: ml_collections.ConfigDict, sizes: Any, pod: Pod, known: dict[str, CompiledProgram]) -> Candidate:
    """Compiles the programs that are not `known`, to the first that does not fit; prints the outcome."""
    programs = dict(known)
    model = abstract_model(config, sizes, pod.mesh)
    # The train step last: the others compile faster and rule out most settings.
    for program in sorted(run_programs(config, model, pod.mesh), key=lambda program: program.name == "train"):
        if program.name not in programs and all(compiled.fits for compiled in programs.values()):
            programs[program.name] = compile_program(program, pod)
    candidate = Candidate(config, pod, programs)
    fullest = max(program.total_hbm_bytes for program in programs.values())
    verdict = f"at least {table.si(candidate.seconds, 's')} a step" if candidate.fits else "does not fit"
    log(f"{candidate.flags}: {table.gib(fullest)}, {verdict}")
    return candidate
