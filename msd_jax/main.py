"""Aligns a model across languages: `python -m msd_jax.main --config configs/NAME.py --workdir DIR`."""

import pathlib

import jax

from msd_jax import ablation, cli, report, train


def main(argv: list[str]) -> None:
    del argv
    workdir = pathlib.Path(cli.FLAGS.workdir)
    with cli.clear_errors():
        config = cli.config()
        if config.ablation.variants:
            return ablation.run(config, workdir)
        trainer = train.Trainer(config, workdir)
    trainer.train()
    report.write(workdir)


if __name__ == "__main__":
    jax.config.parse_flags_with_absl()
    cli.run(main, workdir=None)
