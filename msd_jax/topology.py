"""What config.launch asks for, in the words of gcloud, GKE and Slurm (`python -m msd_jax.topology --config FILE`).

It prints NAME=VALUE for each fact that a script of launch/ needs, or ends in one line where config.mesh does not fit
config.launch. --want=tpu (or gpu) ends in one line for a config that is planned for the other. No device is touched.
"""

import shlex

import jax

from msd_jax import cli
from msd_jax.errors import UserError
from msd_jax.planning import topology


def main(argv: list[str]) -> None:
    del argv
    with cli.clear_errors():
        config, want = cli.config(), cli.FLAGS.want
        if want and want != config.launch.accelerator:
            raise UserError(
                f"config.launch.accelerator={config.launch.accelerator!r}: this script is for {want}; "
                f"give --config.launch.accelerator={want} and what goes with it"
            )
        lines = [f"{name}={shlex.quote(str(value))}" for name, value in topology.facts(config).items()]
    print("\n".join(lines))


if __name__ == "__main__":
    jax.config.parse_flags_with_absl()
    cli.run(main, alone=True, want="", workdir="")
