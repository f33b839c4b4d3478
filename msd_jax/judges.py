"""Measures a judge against human labels.

    python -m msd_jax.judges --agreement FILE [--config configs/NAME.py] [--config.judge.kind=guard ...]

FILE is JSONL or CSV with response, label and language, see agreement.read. Without --config the rules are measured.
A judge that is slow or costs money keeps its judgements in FILE.judgements.jsonl: what was judged is not judged again.
"""

import pathlib

from absl import flags

from msd_jax import cli
from msd_jax.configs import default
from msd_jax.evaluation import judges
from msd_jax.evaluation.judges import agreement
from msd_jax.io.console import console
from msd_jax.parallel import sharding


def main(argv: list[str]) -> None:
    del argv
    with cli.clear_errors():
        config = cli.config()
        path = pathlib.Path(cli.FLAGS.agreement)
        responses, labels = agreement.read(path)
        judge = judges.make(config.judge, sharding.make_mesh(**config.mesh))
        judge = judges.cached(judge, path.with_name(path.name + ".judgements.jsonl"))
    judged = judge.judge(responses)
    for question, by_language in agreement.measure(responses, labels, judged).items():
        console.print(agreement.table(question, by_language, judge))


if __name__ == "__main__":
    flags.FLAGS.set_default("config", default.__file__)
    cli.run(main, agreement=None)
