"""The generation of an evaluation in msd_jax, and a loop over transformers' generate, on this machine's CPU threads.

    pip install -e '.[parity]' && python benchmarks/evaluation.py --model HF_DIR --queries QUERIES.csv [--json FILE]

All answer the same prompts of one language greedily, in float32, with at most --tokens tokens and the same stop
tokens. msd_jax has --batch rows and takes prompts sorted by length, as its evaluations do: `ours` refills rows whose
response has ended, `batches` waits for the longest response of each batch. The peer takes the file's order, 8 at a
time, left-padded. With --sentences a response ends with its first sentence or line, so that lengths are mixed.

Each round runs one process of each; seconds are the median over rounds; tokens are those of the responses, including
the stop token. Programs are compiled before the clock starts; that time is a column of its own.
"""

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time

PEER_BATCH = 8


def prompts_of(arguments: argparse.Namespace, tokenizer) -> list[list[int]]:
    from msd_jax.configs import default

    from msd_jax.data import files, prompts

    config = default.get_config()
    records = files.read(arguments.queries)[: arguments.limit or None]
    rows = [prompts.student_ids(record, arguments.language, tokenizer, config.prompts) for record in records]
    return [ids.tolist() for ids in rows if len(ids) <= config.prompts.student_limit]


def stops_of(arguments: argparse.Namespace, tokenizer) -> tuple[int, ...]:
    from msd_jax.models.tokenizer import stop_token_ids

    stops = set(stop_token_ids(tokenizer, arguments.model))
    if arguments.sentences:
        stops |= {i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip(" ") in (".", "?", "!", "\n", "\n\n")}
    return tuple(sorted(stops))


def ours(arguments: argparse.Namespace, refilled: bool = True) -> dict:
    import jax
    import numpy as np

    from msd_jax.generation import refill, rollout
    from msd_jax.models import pretrained
    from msd_jax.parallel import sharding

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = pretrained.load(arguments.model, dtype="float32", param_dtype="float32", remat="none", mesh=mesh)
    params = rollout.reshard(model.params(mesh), model.dtype, model.shardings(mesh, sharding.ROLLOUT))
    sampling = rollout.Sampling(arguments.tokens, temperature=0.0)
    options = model.graphdef, mesh, sampling, stops_of(arguments, model.tokenizer), model.pad_id
    rows = sorted((np.array(ids, np.int32) for ids in prompts_of(arguments, model.tokenizer)), key=len)
    batches = [rows[first : first + arguments.batch] for first in range(0, len(rows), arguments.batch)]
    pool = refill.PoolGenerator(*options, rows=arguments.batch, limit=len(rows[-1]))
    generator = rollout.Generator(*options)

    def run() -> int:
        if refilled:
            return sum(len(response.tokens) for response in pool(params, rows))
        written = [generator.write(params, batch, arguments.batch, len(rows[-1])) for batch in batches]
        return sum(int(w.length_B.sum()) for w in written)

    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    start = time.perf_counter()
    tokens = run()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": tokens, "compile_seconds": first - seconds, "prompts": len(rows)}


def peer(arguments: argparse.Namespace) -> dict:
    import torch
    import transformers

    from msd_jax.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(arguments.model)
    stops = list(stops_of(arguments, tokenizer))
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    rows = prompts_of(arguments, tokenizer)
    options = {"max_new_tokens": arguments.tokens, "do_sample": False, "eos_token_id": stops, "pad_token_id": stops[0]}

    def generate(batch: list[list[int]]) -> int:
        width = max(map(len, batch))
        ids = torch.tensor([[stops[0]] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        with torch.inference_mode():
            written = model.generate(ids, attention_mask=mask, **options)[:, width:]
        stopped = torch.isin(written, torch.tensor(stops))
        length = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, written.shape[1])
        return int(length.sum())

    generate(rows[:PEER_BATCH])  # to warm up
    start = time.perf_counter()
    tokens = sum(generate(rows[first : first + PEER_BATCH]) for first in range(0, len(rows), PEER_BATCH))
    return {"seconds": time.perf_counter() - start, "tokens": tokens, "compile_seconds": 0.0, "prompts": len(rows)}


MEASURED = {"ours": ours, "batches": functools.partial(ours, refilled=False), "peer": peer}


def measure(which: str) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--only", which]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"{which} failed")
    print(f"{which}: {result.stdout.splitlines()[-1]}", file=sys.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--queries", required=True, help="query file with a column of the language")
    parser.add_argument("--language", default="sw")
    parser.add_argument("--limit", type=int, default=0, help="take only the first queries; 0 for all")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32, help="rows of msd_jax")
    parser.add_argument("--sentences", action="store_true", help="end a response with its first sentence or line")
    parser.add_argument("--without", nargs="*", choices=MEASURED, default=[], help="what is left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--only", choices=MEASURED, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(MEASURED[arguments.only](arguments)))
        return

    runs: dict[str, list[dict]] = {which: [] for which in MEASURED if which not in arguments.without}
    for _ in range(arguments.rounds):
        for which, results in runs.items():
            results.append(measure(which))
    table = {
        which: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for which, results in runs.items()
    }
    for row in table.values():
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
    rate = table["ours"]["tokens_per_second"]
    ratios = {which: rate / row["tokens_per_second"] for which, row in table.items() if which != "ours"}
    print(f"{'':<8}{'prompts':>8}{'tokens':>8}{'seconds':>9}{'tokens/s':>10}{'compiling':>11}")
    for which, row in table.items():
        figures = f"{row['prompts']:>8.0f}{row['tokens']:>8.0f}{row['seconds']:>9.1f}{row['tokens_per_second']:>10.0f}"
        print(f"{which:<8}{figures}{row['compile_seconds']:>9.1f} s")
    print("ours to " + ", ".join(f"{which}: {ratio:.2f}" for which, ratio in ratios.items()) + " times the tokens/s")
    if arguments.json:
        arguments.json.write_text(
            json.dumps(table | {"ratios": ratios, "runs": runs}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
