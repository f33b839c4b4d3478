"""Builds a TFDS dataset with a training and a test split from a query file (`msd-jax queries`).

    msd-jax queries --build QUERIES.csv
    msd-jax queries --build hf://OWNER/NAME --harmful true --name parallel_queries/mine:1.0.0
    msd-jax queries --build QUERIES.jsonl --splits train=0.8,test=0.2 --data_dir data

It ends with the paths by which training and evaluation read the splits. A file can also be trained on as it is.
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


def _parser() -> argparse.ArgumentParser:
    shares = ",".join(f"{split}={share}" for split, share in parallel_queries.SPLITS.items())
    parser = argparse.ArgumentParser(
        prog="msd-jax queries",
        usage="msd-jax queries --build SOURCE [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--build", required=True, metavar="SOURCE", help="a .jsonl, .csv or .parquet file, a directory, hf://OWNER/NAME"
    )
    add(
        "--name",
        default=parallel_queries.NAME,
        metavar="NAME[/CONFIG][:VERSION]",
        help=f"(default: {parallel_queries.NAME})",
    )
    add("--splits", default=shares, metavar="NAME=SHARE,...", help=f"(default: {shares})")
    add("--harmful", default="file", choices=LABELS, help="label of queries without one (default: file, unknown)")
    add(
        "--data_dir",
        default="",
        metavar="DIR",
        help="where datasets are (default: TFDS_DATA_DIR, or ~/tensorflow_datasets)",
    )
    return parser


def main() -> None:
    flags = _parser().parse_args()
    logging.set_verbosity(logging.ERROR)  # TFDS warns about every CONFIG that it does not know
    with cli.clear_errors():
        places.require_directory("--build", flags.build, ("hf",))
        places.require_directory("--data_dir", flags.data_dir)
        built = parallel_queries.build(flags.build, flags.name, flags.data_dir, splits(flags.splits), flags.harmful)
    for line in (
        built.directory,
        f"source {built.metadata['source']}, sha256 {built.metadata['sha256']}",
        *(f"{built.path(split)}: {count} records" for split, count in built.metadata["records"].items()),
        "languages: " + ", ".join(f"{code} {count}" for code, count in built.metadata["languages"].items()),
    ):
        console.print(str(line), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
