"""A grid of runs that differ in a few settings, and one table of them: what config.ablation asks for.

    python -m msd_jax.main --config configs/ablation.py --workdir DIR

DIR/VARIANT/SEED is the workdir of a run, DIR/report what they come to. The same command goes on where it was stopped.
"""

import pathlib
import shutil

import ml_collections

from msd_jax import distributed, report, settings, train
from msd_jax.configs import default
from msd_jax.console import say


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Trains, or goes on with, every variant with every seed, then writes WORKDIR/report/comparison.md and .json.

    Raises ValueError or OSError where a variant is not fit, each of them checked before the first is trained.
    """
    grid = configs(config)
    directories = {key: workdir / key[0] / str(key[1]) for key in grid}
    for key, one in grid.items():
        train.claim(directories[key], one)
    for number, ((name, seed), one) in enumerate(grid.items(), start=1):
        if distributed.from_first((directories[name, seed] / "eval" / str(one.train.steps) / "summary.json").exists):
            continue
        say(f"run {number} of {len(grid)}: {name}, seed {seed}")
        _take_responses(directories[next(iter(grid))[0], seed] / "eval" / "0", directories[name, seed] / "eval" / "0")
        train.Trainer(one, directories[name, seed]).train()
    by_name = {name: [directories[name, seed] for other, seed in grid if other == name] for name, _ in grid}
    report.compare_named(by_name, workdir / "report")


def configs(config: ml_collections.ConfigDict) -> dict[tuple[str, int], ml_collections.FrozenConfigDict]:
    """{(variant, seed): the whole config of a run}, a seed after the other.

    Raises ValueError where a variant changes a key that is not there, or to what it cannot be.
    """
    grid = {}
    for seed in range(config.seed, config.seed + config.ablation.seeds):
        for name, changes in config.ablation.variants.items():
            one = ml_collections.ConfigDict(config.to_dict())
            one.ablation = default.get_config().ablation  # so that a grid can be made larger
            try:
                one.update(changes)
                one.seed = seed
                settings.check(one)
            except (TypeError, ValueError) as error:
                raise ValueError(f"config.ablation.variants.{name}: {error}") from error
            grid[name, seed] = ml_collections.FrozenConfigDict(one)
    return grid


def _take_responses(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies what the first variant answered before training; an evaluation uses of it what it would answer itself."""
    if distributed.is_first() and (source / "summary.json").exists() and not target.exists():
        target.mkdir(parents=True)
        for name in ("responses.jsonl", "judgements.jsonl"):
            if (source / name).exists():
                shutil.copy(source / name, target / name)
    distributed.from_first(lambda: None)  # nobody looks before it is there
