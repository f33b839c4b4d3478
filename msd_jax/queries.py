"""Builds a TFDS dataset with a training and a test split from a query file (`msd-jax queries`).

    msd-jax queries --build QUERIES.csv
    msd-jax queries --build hf://OWNER/NAME --harmful true --name parallel_queries/mine:1.0.0
    msd-jax queries --build QUERIES.jsonl --splits train=0.8,test=0.2 --data_dir data

It ends with the paths by which training and evaluation read the splits. A file can also be trained on as it is.
"""

import argparse
from typing import Any

from absl import logging

from msd_jax import cli
from msd_jax.data import parallel_queries
from msd_jax.data.records import LABELS
from msd_jax.errors import UserError
from msd_jax.io import places
from msd_jax.io.console import console

NAME, SPLITS = parallel_queries.NAME, ",".join(f"{k}={v}" for k, v in parallel_queries.SPLITS.items())
FLAGS: dict[str, dict[str, Any]] = {
    "--build": {
        "required": True,
        "metavar": "SOURCE",
        "help": ".jsonl, .csv or .parquet; a directory; hf://OWNER/NAME",
    },
    "--name": {"default": NAME, "metavar": "NAME[/CONFIG][:VERSION]", "help": f"(default: {NAME})"},
    "--splits": {"default": SPLITS, "metavar": "NAME=SHARE,...", "help": f"(default: {SPLITS})"},
    "--harmful": {"default": "file", "choices": LABELS, "help": "label of queries without one (file: unknown)"},
    "--data_dir": {"default": "", "metavar": "DIR", "help": "(default: TFDS_DATA_DIR, or ~/tensorflow_datasets)"},
}


def splits(text: str) -> dict[str, float]:
    """Shares by split, from train=0.9,test=0.1. Raises UserError if `text` is malformed."""
    try:
        return {name: float(share) for name, share in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise UserError(f"--splits={text!r}: write train=0.9,test=0.1") from None


def main() -> None:
    raw, usage = argparse.RawDescriptionHelpFormatter, "%(prog)s --build SOURCE [flags]"
    parser = argparse.ArgumentParser("msd-jax queries", usage, __doc__, formatter_class=raw)
    for name, options in FLAGS.items():
        parser.add_argument(name, **options)
    flags = parser.parse_args()
    logging.set_verbosity(logging.ERROR)  # TFDS warns about every CONFIG that it does not know
    with cli.clear_errors():
        places.require_directory("--build", flags.build, ("hf",))
        places.require_directory("--data_dir", flags.data_dir)
        built = parallel_queries.build(flags.build, flags.name, flags.data_dir, splits(flags.splits), flags.harmful)
    for line in built.lines():
        console.print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
