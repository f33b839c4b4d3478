"""The generation of an evaluation in msd_jax, and a loop over transformers' generate, on this machine's CPU threads.

    pip install -e '.[parity]' && python benchmarks/evaluation.py --model HF_DIR --queries QUERIES.csv [--json FILE]

Both answer the same prompts of one language greedily, in float32, with at most 64 tokens and the same stop tokens.
msd_jax takes batches of --batch prompts sorted by length, as its evaluations do; the peer takes the file's order, 8 at
a time, left-padded. Each round runs one process of each; seconds are the median over rounds; tokens are those of the
responses, including the stop token. Programs are compiled before the clock starts; that time is a column of its own.
"""

import argparse
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


def ours(arguments: argparse.Namespace) -> dict:
    import jax
    import numpy as np

    from msd_jax.generation import rollout
    from msd_jax.models import pretrained
    from msd_jax.parallel import sharding

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = pretrained.load(arguments.model, dtype="float32", param_dtype="float32", remat="none", mesh=mesh)
    params = rollout.reshard(model.params(mesh), model.dtype, model.shardings(mesh, sharding.ROLLOUT))
    sampling = rollout.Sampling(arguments.tokens, temperature=0.0)
    generator = rollout.Generator(model.graphdef, mesh, sampling, model.stop_ids, model.pad_id)
    rows = sorted((np.array(ids, np.int32) for ids in prompts_of(arguments, model.tokenizer)), key=len)
    batches = [rows[first : first + arguments.batch] for first in range(0, len(rows), arguments.batch)]

    def run() -> int:
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

    from msd_jax.models.tokenizer import load_tokenizer, stop_token_ids

    tokenizer = load_tokenizer(arguments.model)
    stops = list(stop_token_ids(tokenizer, arguments.model))
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
    parser.add_argument("--batch", type=int, default=32, help="prompts per batch of msd_jax")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--only", choices=("ours", "peer"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps({"ours": ours, "peer": peer}[arguments.only](arguments)))
        return

    runs: dict[str, list[dict]] = {"ours": [], "peer": []}
    for _ in range(arguments.rounds):
        for which, results in runs.items():
            results.append(measure(which))
    table = {
        which: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for which, results in runs.items()
    }
    for row in table.values():
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
    ratio = table["ours"]["tokens_per_second"] / table["peer"]["tokens_per_second"]
    print(f"{'':<8}{'prompts':>8}{'tokens':>8}{'seconds':>9}{'tokens/s':>10}{'compiling':>11}")
    for which, row in table.items():
        figures = f"{row['prompts']:>8.0f}{row['tokens']:>8.0f}{row['seconds']:>9.1f}{row['tokens_per_second']:>10.0f}"
        print(f"{which:<8}{figures}{row['compile_seconds']:>9.1f} s")
    print(f"ratio of tokens/s: {ratio:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(table | {"ratio": ratio, "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
