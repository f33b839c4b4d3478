"""Measures a judge against human labels.

    python -m msd_jax.judges --agreement FILE [--json OUT] [--config configs/NAME.py] [--config.judge.kind=guard ...]

FILE is JSONL or CSV with response, language and label, or with XSTest's annotation, see agreement.read. The tables'
figures are written to OUT. Without --config the rules are measured. A judge that is slow or costs money keeps its
judgements in FILE.judgements.jsonl: nothing is judged twice.
"""

import json
import pathlib

from absl import flags

from msd_jax import cli
from msd_jax.configs import default
from msd_jax.evaluation import judges
from msd_jax.evaluation.judges import agreement
from msd_jax.io import jsonl
from msd_jax.io.console import log, show_table
from msd_jax.parallel import distributed, sharding


def main(argv: list[str]) -> None:
    del argv
    with cli.clear_errors():
        config = cli.config()
        path = pathlib.Path(cli.FLAGS.agreement)
        labelled = agreement.read(path)
        judge = judges.make(config.judge, sharding.rollout_mesh(sharding.train_mesh(config.mesh)))
        judge = judges.cached(judge, path.with_name(path.name + ".judgements.jsonl"))
    measured = agreement.measure(labelled.responses, labelled.labels, judge.judge(labelled.responses))
    for question, by_language in measured.items():
        if any(entry["precision"] is not None or entry["recall"] is not None for entry in by_language.values()):
            show_table(agreement.table(question, by_language, judge))
    if labelled.partial:
        log(f"{labelled.partial} responses left out: partial refusals")
    if cli.FLAGS.json and distributed.is_first():
        with cli.clear_errors():
            jsonl.replace_text(pathlib.Path(cli.FLAGS.json), json.dumps(measured, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    flags.FLAGS.set_default("config", default.__file__)
    flags.DEFINE_string("agreement", None, "JSONL or CSV with labelled responses.", required=True)
    flags.DEFINE_string("json", "", "File to write the figures to.")
    cli.run(main)
