"""Writes the report of a run, of an evaluation, or a comparison of runs (`python -m msd_jax.report`).

python -m msd_jax.report --workdir DIR                 a run's tables, page, figures and model card
python -m msd_jax.report --workdir DIR1,DIR2,...       several runs compared
python -m msd_jax.report --evaluation DIR1,DIR2,...    evaluations of msd_jax.evaluate
"""

import pathlib

from absl import flags

from msd_jax import cli, report
from msd_jax.configs import default
from msd_jax.errors import UserError
from msd_jax.io import stores


def main(argv: list[str]) -> None:
    del argv
    with cli.clear_errors():
        workdirs, evaluations = (_paths(name) for name in ("workdir", "evaluation"))
        out = stores.guest("--out", cli.FLAGS.out) if cli.FLAGS.out else None
        if bool(workdirs) == bool(evaluations):
            raise UserError("name what to report: --workdir DIR (of a run), or --evaluation DIR (of msd_jax.evaluate)")
        if evaluations:
            report.write_evaluations(evaluations, out or evaluations[-1] / "report", cli.FLAGS.wide)
        elif len(workdirs) > 1:
            report.compare(workdirs, out)
        else:
            report.write(workdirs[0], out, cli.FLAGS.wide)
        for directory in (*workdirs, *evaluations, *filter(None, [out])):
            stores.close(directory)


def _paths(name: str) -> list[pathlib.Path]:
    given = (cli.FLAGS[name].value or "").split(",")
    return [stores.guest(f"--{name}", part.strip()).expanduser() for part in given if part]


if __name__ == "__main__":
    flags.FLAGS.set_default("config", default.__file__)  # a run brings its own
    flags.DEFINE_string("workdir", "", "Runs, separated by commas.")
    flags.DEFINE_string("evaluation", "", "Evaluations, separated by commas.")
    flags.DEFINE_string("out", "", "Directory for the report; by default in the last of them.")
    flags.DEFINE_bool("wide", False, "Print every column, not one line of 80 characters per language.")
    cli.run(main, alone=True)
