"""Memory and cost of a run on TPUs or GPUs that you do not have (`python -m msd_jax.plan`).

    python -m msd_jax.plan --config configs/NAME.py [--topology v5e:8x8] [--mesh data,fsdp,tensor] [--json FILE]
        [--search]

XLA's own compilers compile the programs that training runs, from shapes alone: without weights, queries, a chip or a
network. For each program it reports its memory per chip, what else is in memory while it runs, and the least time that
it takes. --topology h100:8x4 means four nodes of eight H100 GPUs. Without --topology and --mesh the pod is that of
config.launch and config.mesh. --search tries meshes, micro-batches and what the backward pass keeps, and prints the
fastest setting that fits.

Exit code 0: it fits; 2: it does not; 1: the plan could not be made.
"""

import sys

import jax
from absl import flags

from msd_jax import cli
from msd_jax.planning.plan import plan


def main(argv: list[str]) -> None:
    del argv
    given = cli.FLAGS
    with cli.clear_errors():
        fits = plan(cli.config(), topology=given.topology, mesh=given.mesh, try_all=given.search, file=given.json)
    sys.exit(0 if fits else 2)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine stays free
    jax.config.update("jax_enable_compilation_cache", False)  # programs for other devices cannot be read back
    flags.DEFINE_string("topology", "", "TPU slice, as v5e:8x8, or GPU nodes, as h100:8x4.")
    flags.DEFINE_string("mesh", "", "DATA,FSDP,TENSOR in place of config.mesh.")
    flags.DEFINE_string("json", "", "File to write the plan to.")
    flags.DEFINE_bool("search", False, "Try meshes, micro-batches and remat; print the fastest that fits.")
    cli.run(main, alone=True)
