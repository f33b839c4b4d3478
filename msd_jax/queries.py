"""Builds the TFDS dataset parallel_queries from a query file.

    python -m msd_jax.queries --build SOURCE [--name parallel_queries[/CONFIG][:1.0.0]] [--splits train=0.9,test=0.1] \
        [--harmful file|true|false] [--data_dir DIR]

SOURCE is a .jsonl, .csv or .parquet file, a directory, or hf://OWNER/NAME. Training reads the dataset by
--config.data.path=tfds://parallel_queries:1.0.0/train (with ?data_dir=DIR at the end, if it has one).
"""

import argparse

from absl import logging

from msd_jax import cli
from msd_jax.data import parallel_queries
from msd_jax.data.records import LABELS
from msd_jax.errors import UserError
from msd_jax.io import places
from msd_jax.io.console import console


def splits(text: str) -> dict[str, float]:
    """Shares by split, from train=0.9,test=0.1. Raises UserError if `text` is malformed."""
    try:
        return {name: float(share) for name, share in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise UserError(f"--splits={text!r}: write train=0.9,test=0.1") from None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m msd_jax.queries", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", required=True, metavar="SOURCE")
    parser.add_argument("--name", default=parallel_queries.NAME)
    parser.add_argument("--splits", default=",".join(f"{k}={v}" for k, v in parallel_queries.SPLITS.items()))
    parser.add_argument("--harmful", default="file", choices=LABELS)
    parser.add_argument("--data_dir", default="")
    flags = parser.parse_args()
    logging.set_verbosity(logging.ERROR)  # TFDS warns about every CONFIG that it does not know
    with cli.clear_errors():
        places.require_directory("--build", flags.build, ("hf",))
        places.require_directory("--data_dir", flags.data_dir)
        built = parallel_queries.build(flags.build, flags.name, flags.data_dir, splits(flags.splits), flags.harmful)
    for line in (
        built.directory,
        f"source {built.metadata['source']}, sha256 {built.metadata['sha256']}",
        *(f"{split}: {count} records" for split, count in built.metadata["records"].items()),
        "languages: " + ", ".join(f"{code} {count}" for code, count in built.metadata["languages"].items()),
    ):
        console.print(str(line), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
