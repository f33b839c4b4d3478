"""What checksums and locks cost: their share of a run's processor time, and of the saves of a model's full state.

    python benchmarks/reliability.py [--model HF_DIR] [--saves 4] [--steps 30]

The first table saves the weights of a model and Adam's two moments, by default random ones of the size of SmolLM2 135M,
in turn with and without checksums. The second is a run of configs/quickstart.py in this process. What hashes or locks
is counted on the processor clock of its own thread, which other programs on the machine do not disturb.
"""

import argparse
import contextlib
import functools
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import ml_collections
import numpy as np
from msd_jax.configs import quickstart
from safetensors import safe_open

from msd_jax.io import checksums, lock
from msd_jax.training import checkpoint, fingerprint, loop, run

COUNTED = ((checksums, "seal"), (checksums, "damage"), (fingerprint, "of"), (lock, "take"), (lock.Lock, "beat"),
           (lock.Lock, "check"))  # fmt: skip


@contextlib.contextmanager
def counting() -> Iterator[dict[str, float]]:
    """Processor seconds by function; what one counted function calls of another, or in a pool, is not told apart."""
    seconds: dict[str, float] = {}
    mutex = threading.Lock()

    def timed(function: Any, name: str) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **keywords: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **keywords)
            finally:
                with mutex:
                    seconds[name] = seconds.get(name, 0.0) + time.thread_time() - start

        return wrapper

    def counted_hash(*args: Any, **keywords: Any) -> Any:  # seal and damage hash in threads of their own
        return timed(original, "hashing files")(*args, **keywords)

    original = checksums.of_file
    with contextlib.ExitStack() as stack:
        for owner, name in COUNTED:
            label = f"{getattr(owner, '__name__', owner)}.{name}".removeprefix("msd_jax.")
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), label)))
        stack.enter_context(mock.patch.object(checksums, "of_file", counted_hash))
        yield seconds


def of_a_run(steps: int) -> None:
    """Prints what a run of the quickstart spends on them."""
    config = quickstart.get_config()
    config.train.steps = steps
    with tempfile.TemporaryDirectory() as workdir, counting() as seconds:
        start, began = time.process_time(), time.monotonic()
        loop.train(run.setup(ml_collections.FrozenConfigDict(config), pathlib.Path(workdir)))
        total, wall = time.process_time() - start, time.monotonic() - began
    print(f"quickstart, {steps} steps: {total:.1f} processor seconds in {wall:.1f} s")
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"  {name:<28}{spent:>8.3f} s{spent / total:>9.2%}")
    print(f"  {'all of them':<28}{sum(seconds.values()):>8.3f} s{sum(seconds.values()) / total:>9.2%}")


def shapes(model: str) -> list[tuple[int, ...]]:
    """Those of a Hugging Face directory's one file of weights, or of SmolLM2 135M's."""
    if model:
        with safe_open(pathlib.Path(model) / "model.safetensors", "np") as file:
            return [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    layer = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536), (576,), (576,)]
    return [(49152, 576), (576,), *(30 * layer)]


def of_saves(model: str, saves: int) -> None:
    """Prints what a save takes with and without its checksums, on the training thread and in all."""
    rng = np.random.default_rng(0)
    state = {
        name: [jax.numpy.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes(model)]
        for name in ("params", "mu", "nu")
    }
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    taken: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    hashing: list[tuple[float, float]] = []
    for i in range(2 * saves + 2):  # the first pair warms up
        sealed = i % 4 in (0, 3)  # each first in every other pair
        with tempfile.TemporaryDirectory() as workdir, counting() as seconds, contextlib.ExitStack() as stack:
            walls: list[float] = []
            stack.enter_context(mock.patch.object(checksums, "seal", clocked(checksums.seal, walls, sealed)))
            checkpoints = checkpoint.Checkpoints(pathlib.Path(workdir))
            start, processor = time.monotonic(), time.process_time()
            checkpoints.save(1, state, {})
            blocked = time.monotonic() - start
            checkpoints.close()
            row = blocked, time.monotonic() - start, time.process_time() - processor
        if i > 1:
            hashing += [(seconds["hashing files"], walls[0])] if sealed else []
            taken[sealed].append(row)
    median = {key: [statistics.median(column) for column in zip(*rows)] for key, rows in taken.items()}
    print(f"saving {size / 1e9:.2f} GB, median of {saves}")
    for i, name in enumerate(("on the training thread, s", "until it is complete, s", "processor, s")):
        plain, sealed_ = median[False][i], median[True][i]
        print(f"  {name:<28}{plain:>8.2f} without{sealed_:>8.2f} with{sealed_ / plain - 1:>9.1%}")
    processor, wall = (statistics.median(column) for column in zip(*hashing))
    print("of which, in the background")
    print(f"  {'sealing, s':<28}{wall:>8.3f}{wall / median[False][1]:>32.1%}")
    print(f"  {'hashing, processor s':<28}{processor:>8.3f}{processor / median[False][2]:>32.1%}")


def clocked(seal: Any, walls: list[float], sealed: bool) -> Any:
    """`seal`, noting the seconds that it takes; or nothing in its place."""

    def timed(*arguments: Any) -> None:
        start = time.monotonic()
        if sealed:
            seal(*arguments)
        walls.append(time.monotonic() - start)

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="Hugging Face directory whose weights' shapes are saved")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    of_saves(arguments.model, arguments.saves)
    if arguments.steps:
        of_a_run(arguments.steps)


if __name__ == "__main__":
    main()
