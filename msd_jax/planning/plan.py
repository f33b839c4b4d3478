"""The plan of a run: compiled for a pod, printed, and written as JSON."""

import json
import pathlib

import ml_collections

from msd_jax.errors import UserFileError
from msd_jax.io.console import log
from msd_jax.models.config import DecoderConfig
from msd_jax.planning import table
from msd_jax.planning.architecture import abstract_model, read_sizes
from msd_jax.planning.compiled import CompiledProgram, compile_program, step_seconds
from msd_jax.planning.pod import Pod, make_pod
from msd_jax.planning.programs import run_programs
from msd_jax.planning.search import search


def plan(config: ml_collections.ConfigDict, *, topology: str, mesh: str, try_all: bool, file: str) -> bool:
    """Plans a run, or searches for its fastest setting; True if what it found fits.

    Args:
      config: of the run.
      topology: of one slice, such as "v5e:8x8"; "" for config.launch.topology.
      mesh: "DATA,FSDP,TENSOR"; "" for config.mesh.
      try_all: search meshes, micro-batches and remat.
      file: for the plan as JSON; "" for none.

    Raises:
      UserError: the pod, the mesh, the model or the file is not usable; the message says which.
    """
    output = pathlib.Path(file)
    if not output.parent.is_dir():
        raise UserFileError(f"--json={file}: the directory {output.parent} does not exist")
    config, pod = make_pod(config, topology, mesh)
    sizes, source = read_sizes(config.model.path)
    if try_all:
        best = search(config, sizes, pod)
        if best is None:
            log(f"nothing that was tried fits {pod.topology}; try adapters (--config.model.lora.rank=16) or more chips")
            return False
        log(f"\nthe fastest that fits: {best.flags}")
        config, pod, programs = best.config, best.pod, best.programs
        table.show(programs, pod)
    else:
        programs = compile_and_show(config, sizes, pod, source)
    if file:
        text = json.dumps(table.as_json(config, pod, programs, source), indent=1) + "\n"
        output.write_text(text, encoding="utf-8")
    return all(program.fits for program in programs.values())


def compile_and_show(
    config: ml_collections.ConfigDict, sizes: DecoderConfig, pod: Pod, source: str
) -> dict[str, CompiledProgram]:
    """Compiles and prints the programs of one setting, and the verdict; the programs by name."""
    model = abstract_model(config, sizes, pod.mesh)
    log(table.describe(config, model, pod, source))
    programs = {}
    for program in run_programs(config, model, pod.mesh):
        compiled = programs[program.name] = compile_program(program, pod)
        log(f"compiled {program.name} in {compiled.compile_seconds:.0f} s")
    table.show(programs, pod)
    too_big = {name: program for name, program in programs.items() if not program.fits}
    if not too_big:
        log(f"FITS. A step takes at least {table.si(step_seconds(programs), 's')}.")
        return programs
    needs = ", ".join(f"{name} needs {table.gib(program.total_hbm_bytes)}" for name, program in too_big.items())
    log(f"DOES NOT FIT: {needs} of {table.gib(pod.device.hbm_bytes)}. Remedies:")
    for line in table.remedies(config, pod, programs, model):
        log(f"  {line}")
    return programs
