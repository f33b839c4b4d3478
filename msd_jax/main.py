"""Aligns a model across languages: `python -m msd_jax.main --config configs/NAME.py --workdir DIR`."""

import pathlib

import jax

from msd_jax import ablation, cli
from msd_jax.training import loop


def main(argv: list[str]) -> None:
    del argv
    workdir = pathlib.Path(cli.FLAGS.workdir)
    with cli.clear_errors():
        config = cli.config()
        job = (ablation.Grid if config.ablation.variants else loop.Trainer)(config, workdir)
    job.train()
    job.report()


if __name__ == "__main__":
    jax.config.parse_flags_with_absl()
    cli.run(main, workdir=None)
