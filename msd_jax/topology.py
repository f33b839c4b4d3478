"""What config.launch asks for, in the terms of gcloud, GKE and Slurm (`python -m msd_jax.topology`).

Prints NAME=VALUE for each fact that the scripts in launch/ need, or a one-line error if config.mesh does not fit
config.launch. With --want=tpu (or gpu) a config that is planned for the other is an error. It touches no device.
"""

import pathlib
import shlex

import jax

from msd_jax import cli
from msd_jax.errors import UserError
from msd_jax.io import places, stores
from msd_jax.planning import launch


def main(argv: list[str]) -> None:
    del argv
    with cli.clear_errors():
        config, want = cli.config(), cli.FLAGS.want
        if want and want != config.launch.accelerator:
            raise UserError(
                f"config.launch.accelerator={config.launch.accelerator!r}: this script is for {want}; "
                f"set --config.launch.accelerator={want} and the keys of config.launch that describe it"
            )
        facts = launch.facts(config)
        if launch.machines(config.launch) > 1:
            places.require_directory("--workdir", cli.FLAGS.workdir, stores.OF_SEVERAL_MACHINES)
        if below := cli.FLAGS.below:
            _require_below(pathlib.PurePosixPath(below), cli.FLAGS.workdir)
        lines = [f"{name}={shlex.quote(str(value))}" for name, value in facts.items()]
    print("\n".join(lines))


def _require_below(directory: pathlib.PurePosixPath, workdir: str) -> None:
    """Raises a UserError where `workdir` is neither below `directory` nor in an object store."""
    if "://" not in workdir and directory not in pathlib.PurePosixPath(workdir).parents:
        raise UserError(
            f"--workdir={workdir}: it must be below {directory}, or its machines neither share nor keep it; give "
            f"--workdir={directory / pathlib.PurePosixPath(workdir).name}"
        )


if __name__ == "__main__":
    jax.config.parse_flags_with_absl()
    cli.flags.DEFINE_string("want", "", "tpu or gpu: what the config must be planned for.")
    cli.flags.DEFINE_string("below", "", "A directory that --workdir must be below.")
    cli.flags.DEFINE_string("workdir", "", "The run's; refused where its machines could not share it.")
    cli.run(main, alone=True)
