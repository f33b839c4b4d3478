"""A grid of runs that differ in a few settings, and one table of them: what config.ablation asks for.

    python -m msd_jax.main --config configs/ablation.py --workdir DIR

DIR/VARIANT/SEED is the workdir of a run, DIR/report compares them. The same command resumes an interrupted grid.
"""

import pathlib
import shutil

import jax
import ml_collections

from msd_jax import report, settings
from msd_jax.configs import default
from msd_jax.errors import UserError
from msd_jax.evaluation.rates import Summary
from msd_jax.io import jsonl
from msd_jax.io.console import log
from msd_jax.parallel import distributed
from msd_jax.planning import hardware
from msd_jax.training import loop, run

Grid = dict[tuple[str, int], ml_collections.FrozenConfigDict]  # (variant, seed) -> the whole config of a run


def configs(config: ml_collections.ConfigDict) -> Grid:
    """Every variant with every seed, one seed after the other.

    Raises:
      UserError: a variant changes a key that does not exist, or to a value that it cannot take.
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


def setup(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Grid:
    """The grid, with every check of every run done before the first one trains.

    Raises:
      UserError: names the variant, or the workdir, that is at fault.
    """
    grid = configs(config)
    checked = set()
    for name, seed in _unfinished(grid, workdir):
        if name not in checked:  # seeds differ in what is drawn alone
            log(f"checking {name}")
            _check(name, grid[name, seed])
            checked.add(name)
    for (name, seed), one in grid.items():
        run.claim(_directory(workdir, name, seed), one)
    return grid


def train(grid: Grid, workdir: pathlib.Path) -> None:
    """Trains, or resumes, the runs that are not finished."""
    first = next(name for name, _ in grid)
    for name, seed in _unfinished(grid, workdir):
        log(f"run {list(grid).index((name, seed)) + 1} of {len(grid)}: {name}, seed {seed}")
        directory = _directory(workdir, name, seed)
        _take_responses(_directory(workdir, first, seed) / "eval" / "0", directory / "eval" / "0")
        loop.train(run.setup(grid[name, seed], directory, hardware.peak(jax.devices()[0].device_kind)))


def compare(grid: Grid, workdir: pathlib.Path) -> None:
    """Shows the table, and writes WORKDIR/report/comparison.md and comparison.json."""
    directories: dict[str, list[pathlib.Path]] = {}
    for name, seed in grid:
        directories.setdefault(name, []).append(_directory(workdir, name, seed))
    report.compare_named(directories, workdir / "report")


def summaries(grid: Grid, workdir: pathlib.Path) -> list[Summary]:
    """The last evaluation of each run."""

    def look_up() -> list[Summary]:
        found = []
        for name, seed in grid:
            evaluations = (_directory(workdir, name, seed) / "eval").glob("*/summary.json")
            if last := max(evaluations, key=lambda path: int(path.parent.name), default=None):
                found.append(jsonl.read_object(last))
        return found

    return distributed.from_first(look_up)


def _directory(workdir: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    return workdir / name / str(seed)


def _unfinished(grid: Grid, workdir: pathlib.Path) -> list[tuple[str, int]]:
    """The runs whose last evaluation is missing."""

    def look_up() -> list[tuple[str, int]]:
        last = {key: _directory(workdir, *key) / "eval" / str(one.train.steps) for key, one in grid.items()}
        return [key for key, directory in last.items() if not (directory / "summary.json").exists()]

    return [(name, seed) for name, seed in distributed.from_first(look_up)]


def _check(name: str, config: ml_collections.ConfigDict) -> None:
    try:
        run.read(config)
    except UserError as error:
        raise UserError(f"config.ablation.variants.{name}: {error}") from error


def _take_responses(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies what the first variant answered before training; an evaluation uses of it what it would answer itself."""
    if distributed.is_first() and (source / "summary.json").exists() and not target.exists():
        target.mkdir(parents=True)
        for name in ("responses.jsonl", "judgements.jsonl"):
            if (source / name).exists():
                shutil.copy(source / name, target / name)
    distributed.from_first(lambda: None)  # nobody looks before it is there
