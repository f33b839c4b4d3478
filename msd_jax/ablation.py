"""A grid of runs that differ in a few settings, and one table of them: what config.ablation asks for.

    python -m msd_jax.main --config configs/ablation.py --workdir DIR

DIR/VARIANT/SEED is the workdir of a run, DIR/report what they come to. The same command goes on where it was stopped.
"""

import pathlib
import shutil

import ml_collections

from msd_jax import report, settings
from msd_jax.configs import default
from msd_jax.errors import UserError
from msd_jax.io.console import log
from msd_jax.parallel import distributed
from msd_jax.training import loop


class Grid:
    """Every variant with every seed: made with every check done, then `train()`, then `report()`."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path):
        """Raises UserError where a variant is not fit, or a run in `workdir` had other settings."""
        self.workdir, self.configs = workdir, configs(config)
        self.directories = {(name, seed): workdir / name / str(seed) for name, seed in self.configs}
        self._left = [run for run in self.configs if not self._finished(run)]
        # What is wrong with the model, the queries or the machine is wrong with the first run already.
        self._next = loop.Trainer(self.configs[self._left[0]], self.directories[self._left[0]]) if self._left else None
        for run, one in self.configs.items():
            loop.claim(self.directories[run], one)

    def _finished(self, run: tuple[str, int]) -> bool:
        last = self.directories[run] / "eval" / str(self.configs[run].train.steps) / "summary.json"
        return distributed.from_first(last.exists)

    def train(self) -> None:
        """Trains, or goes on with, the runs that are not finished."""
        first = next(iter(self.configs))[0]
        for name, seed in self._left:
            log(f"run {list(self.configs).index((name, seed)) + 1} of {len(self.configs)}: {name}, seed {seed}")
            directory = self.directories[name, seed]
            _take_responses(self.directories[first, seed] / "eval" / "0", directory / "eval" / "0")
            trainer, self._next = self._next or loop.Trainer(self.configs[name, seed], directory), None
            trainer.train()

    def report(self) -> None:
        """Shows the table, and writes WORKDIR/report/comparison.md and comparison.json."""
        names = dict.fromkeys(name for name, _ in self.configs)
        gathered = {name: [self.directories[run] for run in self.configs if run[0] == name] for name in names}
        report.compare_named(gathered, self.workdir / "report")


def configs(config: ml_collections.ConfigDict) -> dict[tuple[str, int], ml_collections.FrozenConfigDict]:
    """{(variant, seed): the whole config of a run}, a seed after the other.

    Raises UserError where a variant changes a key that is not there, or to what it cannot be.
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
                raise UserError(f"config.ablation.variants.{name}: {error}") from error
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
