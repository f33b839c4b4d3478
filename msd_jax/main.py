"""Aligns a model across languages (`python -m msd_jax.main`).

    python -m msd_jax.main --config configs/NAME.py --workdir DIR [--config.KEY=VALUE ...]

Evaluates the model, trains it, exports it, evaluates it again and writes WORKDIR/report. The same command resumes an
interrupted run.
"""

import jax

from msd_jax import ablation, cli, report
from msd_jax.io import program_cache, stores
from msd_jax.parallel import host_memory
from msd_jax.planning import hardware
from msd_jax.training import loop, run, trackers


def main(argv: list[str]) -> None:
    del argv
    host_memory.give_back_after_compilations()
    with cli.clear_errors():
        config = cli.config()
        program_cache.keep(config.compilation_cache)
        workdir = stores.own("--workdir", cli.FLAGS.workdir)
        grid = ablation.setup(config, workdir) if config.ablation.variants else None
        single = None if grid else run.setup(config, workdir, hardware.peak(jax.devices()[0].device_kind))
    if grid:
        ablation.train(grid, workdir)
        ablation.compare(grid, workdir)
        summaries = ablation.summaries(grid, workdir)
        stores.close(workdir)
        cli.require_verdicts(*summaries)
    elif single:
        summary = loop.train(single)
        report.write(workdir)
        trackers.publish(config, workdir)
        stores.close(workdir)
        cli.require_verdicts(summary)


if __name__ == "__main__":
    jax.config.parse_flags_with_absl()
    cli.flags.DEFINE_string(
        "workdir", None, "Directory of the run, gs:// or s3:// too; the same one resumes it.", required=True
    )
    cli.run(main)
