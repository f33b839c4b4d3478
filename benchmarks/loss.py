"""The loss from logits against the loss from hidden states: seconds and peak memory of value and gradients.

    python benchmarks/loss.py [--sizes 1024x49152,4096x152064] [--width 1024] [--chunk 128] [--json FILE]

Sizes are tokens x vocabulary. Both compute the same function of hidden states and heads in float32, and its gradients
with respect to the student's. Each runs `--rounds` times, in turn, in a process of its own; the fastest call counts.
Peak memory is the largest growth of the process's resident set, the gradients included. Linux only.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

CALLS = 2  # after the first, which compiles


def run(variant: str, tokens: int, vocabulary: int, width: int, chunk: int) -> dict[str, float]:
    """Seconds, bytes and loss of one variant ("dense" or "fused"), in this process."""
    import jax
    import jax.numpy as jnp

    from msd_jax import losses

    def dense(hidden, head, other_hidden, other_head, mask):
        return losses.dpsw_loss(hidden @ head, other_hidden @ other_head, None, mask)[0]

    def fused(*arrays):
        return losses.fused_dpsw_loss(*arrays[:4], None, arrays[4], chunk=chunk)[0]

    keys = jax.random.split(jax.random.key(0), 4)
    hidden, other_hidden = (jax.random.normal(key, (tokens, width)) for key in keys[:2])
    head, change = (jax.random.normal(key, (width, vocabulary)) / width**0.5 for key in keys[2:])
    inputs = jax.block_until_ready((hidden, head, other_hidden, head + 0.1 * change, jnp.ones(tokens, bool)))
    del head, change
    step = (
        jax.jit(jax.value_and_grad({"dense": dense, "fused": fused}[variant], argnums=(0, 1))).lower(*inputs).compile()
    )
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    seconds = []
    for _ in range(1 + CALLS):
        start = time.perf_counter()
        loss, _ = jax.block_until_ready(step(*inputs))
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds[1:]), "peak_bytes": resident("VmHWM") - before, "loss": float(loss)}


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS, the resident set, or VmHWM, its maximum."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(variant: str, size: tuple[int, int], arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--only", json.dumps([variant, *size, arguments.width, arguments.chunk])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1024x49152,1024x152064,4096x49152,4096x152064")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--only", type=json.loads, help=argparse.SUPPRESS)  # what this process measures
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(run(*arguments.only)))
        return

    print(f"{'tokens':>7}{'vocabulary':>12}{'dense':>20}{'fused':>20}{'time':>8}{'memory':>8}")
    rows = []
    for size in ([int(n) for n in size.split("x")] for size in arguments.sizes.split(",")):
        best: dict[str, dict[str, float]] = {}
        for _ in range(arguments.rounds):
            for variant in ("dense", "fused"):
                result = measure(variant, size, arguments)
                known = best.setdefault(variant, result)
                best[variant] = known | {key: min(known[key], result[key]) for key in ("seconds", "peak_bytes")}
        dense, fused = best["dense"], best["fused"]
        if abs(fused["loss"] / dense["loss"] - 1) > 1e-4:
            sys.exit(f"the two disagree at {size}: {dense['loss']} and {fused['loss']}")
        ratios = {key: fused[key] / dense[key] for key in ("seconds", "peak_bytes")}
        rows.append({"tokens": size[0], "vocabulary": size[1], "width": arguments.width, **best, "ratio": ratios})
        cells = "".join(f"{r['seconds']:>9.1f} s{r['peak_bytes'] / 1e9:>6.2f} GB" for r in (dense, fused))
        print(f"{size[0]:>7}{size[1]:>12}{cells}{ratios['seconds']:>8.2f}{ratios['peak_bytes']:>8.1%}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
