"""Aligns a model across languages: `python -m msd_jax.main --config configs/NAME.py --workdir DIR`."""

import pathlib

import jax

from msd_jax import cli, train


def main(argv: list[str]) -> None:
    del argv
    with cli.clear_errors():
        trainer = train.Trainer(cli.config(), pathlib.Path(cli.FLAGS.workdir))
    trainer.train()


if __name__ == "__main__":
    jax.config.parse_flags_with_absl()
    cli.run(main, workdir=None)
