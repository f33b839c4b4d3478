"""A plan before the bill: compiles a run for a TPU pod that is not there (`python -m msd_jax.plan`).

    python -m msd_jax.plan --config configs/NAME.py [--topology v5e:8x8] [--mesh data,fsdp,tensor] [--json FILE]
        [--search]

The very programs of training are compiled by XLA's own TPU compiler, from shapes alone: no weights, no queries, no
TPU and no network. It tells for each what it needs of a chip's memory, beside what lies there already, and how long it
takes at best. Without --topology and --mesh the pod is that of config.launch and config.mesh. --search tries meshes,
micro-batches and what the backward pass keeps, and ends with the fastest that fits.

Exit code 0: it fits; 2: it does not; 1: the plan could not be made.
"""

import json
import pathlib
import sys
from typing import Any

import jax
import ml_collections
from absl import flags

from msd_jax import cli
from msd_jax.errors import UserError
from msd_jax.io.console import log
from msd_jax.planning import table
from msd_jax.planning.programs import (
    Pod,
    Program,
    build,
    compile_task,
    make_pod,
    read_architecture,
    step_seconds,
    tasks,
)
from msd_jax.planning.search import search


def plan(config: ml_collections.ConfigDict, sizes: Any, pod: Pod, source: str) -> dict[str, Program]:
    """Compiles and prints; returns the programs by name."""
    model = build(config, sizes, pod.mesh)
    log(table.describe(config, model, pod, source))
    programs = {}
    for task in tasks(config, model, pod.mesh):
        programs[task.name] = compile_task(task, pod)
        log(f"compiled {task.name} in {programs[task.name].compile_seconds:.0f} s")
    table.show(programs, pod)
    if all(program.fits for program in programs.values()):
        log(f"FITS. A step takes at least {table.si(step_seconds(programs), 's')}.")
    else:
        names = ", ".join(
            f"{name} needs {table.gib(program.total_hbm_bytes)}"
            for name, program in programs.items()
            if not program.fits
        )
        log(f"DOES NOT FIT: {names} of {table.gib(pod.chip.hbm)}. What would help:")
        for line in table.remedies(config, pod, programs, model):
            log(f"  {line}")
    return programs


def main(argv: list[str]) -> None:
    del argv
    with cli.clear_errors():
        given, file = cli.config(), pathlib.Path(cli.FLAGS.json)
        if not file.parent.is_dir():
            raise UserError(f"--json={file}: there is no directory {file.parent}")
        config, pod = make_pod(given, cli.FLAGS.topology, cli.FLAGS.mesh)
        sizes, source = read_architecture(config.model.path)
        if cli.FLAGS.search:
            best = search(config, sizes, pod)
            if best is None:
                log(f"nothing that was tried fits {pod.name}; try adapters (--config.model.lora.rank=16) or more chips")
                sys.exit(2)
            log(f"\nthe fastest that fits: {best.flags}")
            config, pod, programs = best.config, best.pod, best.programs
            table.show(programs, pod)
        else:
            programs = plan(config, sizes, pod, source)
        if cli.FLAGS.json:
            text = json.dumps(table.as_json(config, pod, programs, source), indent=1) + "\n"
            file.write_text(text, encoding="utf-8")
    sys.exit(0 if all(program.fits for program in programs.values()) else 2)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # a TPU that is here stays free
    flags.DEFINE_bool("search", False, "Try meshes, micro-batches and remat; print the fastest that fits.")
    cli.run(main, alone=True, topology="", mesh="", json="")
