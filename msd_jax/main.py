"""Aligns a model across languages: `python -m msd_jax.main --config configs/NAME.py --workdir DIR`."""

import pathlib

import jax

from msd_jax import ablation, cli, report
from msd_jax.parallel import host_memory
from msd_jax.training import loop, run


def main(argv: list[str]) -> None:
    del argv
    workdir = pathlib.Path(cli.FLAGS.workdir)
    host_memory.give_back_after_compilations()
    with cli.clear_errors():
        config = cli.config()
        grid = ablation.setup(config, workdir) if config.ablation.variants else None
        single = None if grid else run.setup(config, workdir)
    if grid:
        ablation.train(grid, workdir)
        ablation.compare(grid, workdir)
        cli.require_verdicts(*ablation.summaries(grid, workdir))
    elif single:
        summary = loop.train(single)
        report.write(workdir)
        cli.require_verdicts(summary)


if __name__ == "__main__":
    jax.config.parse_flags_with_absl()
    cli.run(main, workdir=None)
