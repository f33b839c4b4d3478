"""How much of training's packs is padding, for the prompts of a file and replies of mixed length. Nothing is trained.

    python benchmarks/packing.py --model HF_DIR --queries QUERIES.csv [--languages sw bn] [--json FILE]

The shape of the packs is chosen as a run chooses it, for a known mean length of replies; the padding is that of other
random batches. Replies are as long as draws from a beta distribution with that mean, many short and a few of the limit.
A batch that needs a second pack, or one more, counts with all of them.
"""

import argparse
import itertools
import json
import pathlib
import time

import numpy as np
import transformers
from msd_jax.configs import default

from msd_jax.data import batches, files
from msd_jax.training import pack_shape, packing

REPLIES = ((256, 80), (512, 150))  # the limit, and the mean
# Platform whose costs decide, devices that rows are split over, batch.
MACHINES = (("cpu", 1, 8), ("cpu", 1, 64), ("cpu", 1, 256), ("tpu", 1, 256), ("tpu", 32, 256))
FRESH = 60  # batches
WIDTH = 3584  # of Qwen2.5-7B, in the costs


def prompt_lengths(model: str, queries: pathlib.Path, languages: list[str]) -> np.ndarray:
    """Tokens of the prompts of student and teacher, [N, 2]."""
    config = default.get_config()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    encoded = batches.encode_all(files.read(queries, harmful="true"), languages, tokenizer, config)
    return np.array([(len(e.student_ids), len(e.teacher_ids)) for e in encoded.examples()])


def measure(prompt_NxK: np.ndarray, limit: int, mean: int, platform: str, parts: int, batch: int) -> dict:
    """One row of the table."""
    start = time.perf_counter()
    options = {"parts": parts, "most_rows": batch // parts, "costs": pack_shape.COSTS[platform], "width": WIDTH}
    shape = pack_shape.choose(prompt_NxK, limit, mean, batch_size=batch, **options)
    seconds, rng, share = time.perf_counter() - start, np.random.default_rng(1), mean / limit
    packs, real = [], 0
    for _ in range(FRESH):
        reply_B = np.ceil(limit * rng.beta(2 * share, 2 * (1 - share), batch)).astype(int)
        length_BxK = prompt_NxK[rng.integers(len(prompt_NxK), size=batch)] + reply_B[:, None] - 1
        packs.append(len({at.pack for at in packing.place(length_BxK, shape)}))
        real += int(length_BxK.sum())
    tokens = sum(packs) * parts * shape.rows * sum(shape.lengths)
    row = {"platform": platform, "devices": parts, "batch": batch, "limit": limit, "mean": mean}
    row |= {"rows": shape.rows, "lengths": shape.lengths, "packs": float(np.mean(packs)), "padding": 1 - real / tokens}
    return row | {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory with the tokenizer")
    parser.add_argument("--queries", type=pathlib.Path, required=True)
    parser.add_argument("--languages", nargs="+", default=["sw", "bn"])
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args()
    prompt_NxK = prompt_lengths(given.model, given.queries, given.languages)
    print("prompts: {} of {:.0f} and {:.0f} tokens on average".format(len(prompt_NxK), *prompt_NxK.mean(axis=0)))
    print("| costs of | devices | batch | replies | rows of a device's pack | packs | padding | chosen in |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for machine, replies in itertools.product(MACHINES, REPLIES):
        row = measure(prompt_NxK, *replies, *machine)
        rows.append(row)
        pack = f"{row['rows']} x {row['lengths'][0]} and {row['lengths'][1]}"
        cells = (row["platform"], row["devices"], row["batch"], f"{row['mean']} of {row['limit']}", pack)
        print(
            "|",
            *(f"{cell} |" for cell in cells),
            f"{row['packs']:.1f} | {row['padding']:.0%} | {row['seconds']:.1f} s |",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
