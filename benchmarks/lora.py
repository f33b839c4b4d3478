"""Peak memory of a few on-policy steps, training all weights or adapters, each in a process of its own.

    python benchmarks/lora.py --model HF_DIR --queries QUERIES.csv [--rank 16] [--steps 3]

Memory is the process's largest resident set on CPU; the last column divides it by the first row's.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile


def run(arguments: argparse.Namespace, rank: int) -> dict[str, float]:
    """The steps of configs/smollm2.py, in this process."""
    import pathlib

    import ml_collections
    from msd_jax.configs import smollm2

    from msd_jax.io import jsonl
    from msd_jax.parallel import host_memory
    from msd_jax.training import loop
    from msd_jax.training import run as training_run

    config = smollm2.get_config()
    config.model.path, config.data.path = arguments.model, arguments.queries
    config.model.lora.rank = rank
    config.train.steps, config.train.export = arguments.steps, False
    host_memory.give_back_after_compilations()
    with tempfile.TemporaryDirectory() as workdir:
        loop.train(training_run.setup(ml_collections.FrozenConfigDict(config), pathlib.Path(workdir)))
        rows = jsonl.read(pathlib.Path(workdir) / "metrics.jsonl")
    return {
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "seconds": min(row["rollout_seconds"] + row["train_seconds"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--queries", required=True, help="query file with columns en, sw and it")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)  # the rank of this process
    arguments = parser.parse_args()
    if arguments.only is not None:
        print(json.dumps(run(arguments, arguments.only)))
        return
    print(f"{'trained':<14}{'peak memory':>14}{'fastest step':>14}{'of full':>10}")
    full = None
    for rank in (0, arguments.rank):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", str(rank)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result = json.loads(output.splitlines()[-1])
        full = full or result
        share = result["gigabytes"] / full["gigabytes"]
        name = f"LoRA rank {rank}" if rank else "all weights"
        print(f"{name:<14}{result['gigabytes']:>11.2f} GB{result['seconds']:>12.1f} s{share:>10.0%}", flush=True)


if __name__ == "__main__":
    main()
