"""Where people look at runs: TensorBoard, Weights & Biases, Trackio and MLflow, beside the files of the workdir.

Each is a few lines over its own library, which is configured as ever by its own environment variables (WANDB_MODE,
WANDB_PROJECT, TRACKIO_DIR, MLFLOW_TRACKING_URI ...). clu.metric_writers would bring TensorFlow, and has none of the
last three. A thread of its own speaks to them, so that neither a slow network nor an error holds a run up.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import ml_collections
from flax import traverse_util

from msd_jax.errors import UserError
from msd_jax.io import jsonl
from msd_jax.io.console import log
from msd_jax.parallel import distributed

PROJECT = "msd_jax"  # unless the tracker's environment names another
PAGE = "report.html"
PATIENCE = 120.0  # seconds that trackers may take to send what is left
_PARAMS = 100  # that MLflow takes at a time


@dataclasses.dataclass(frozen=True)
class Origin:
    """The run that is tracked.

    Attributes:
      workdir: of the run.
      config: by dotted key.
      step: that it begins, or is resumed, from.
    """

    workdir: pathlib.Path
    config: Mapping[str, Any]
    step: int

    @functools.cached_property
    def id(self) -> str:
        """The same each time that the run is started; kept in WORKDIR/tracked.json."""
        path = self.workdir / "tracked.json"
        if kept := jsonl.read_object(path):
            return kept["id"]
        made = uuid.uuid4().hex[:8]
        jsonl.replace_text(path, json.dumps({"id": made}) + "\n")
        return made

    @property
    def name(self) -> str:
        return f"{self.workdir.resolve().name}-{self.id}"


class Tracker(Protocol):
    """One of them, opened with an Origin."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def files(self, paths: Sequence[pathlib.Path]) -> None:
        """Keeps files with the run; one called PAGE is what to look at."""

    def close(self) -> None: ...


class TensorBoard:
    """Events in WORKDIR/tensorboard, without what an interrupted run wrote after the step it is resumed from."""

    def __init__(self, origin: Origin):
        import tensorboardX  # which imports PyTorch, seconds of every command's start, where that is installed

        self._writer = tensorboardX.SummaryWriter(
            str(origin.workdir / "tensorboard"),
            purge_step=origin.step + 1,
            filename_suffix=f".{time.time_ns()}",  # names of one second would be the same
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def files(self, paths: Sequence[pathlib.Path]) -> None:
        """It shows none, and is not asked to."""

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb; steps that are computed again are drawn over those before."""

    def __init__(self, origin: Origin):
        import wandb

        self._wandb, self._name = wandb, origin.name
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=origin.name,
            id=origin.id,
            resume="allow",
            dir=str(origin.workdir),
            config=dict(origin.config),
            settings=wandb.Settings(console="off", silent=True, login_timeout=30),
        )
        self._run.define_metric("*", step_metric="step")  # its own counter refuses to go back

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def files(self, paths: Sequence[pathlib.Path]) -> None:
        artifact = self._wandb.Artifact(f"{self._name}-report", type="report")
        for path in paths:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)
        for page in (path for path in paths if path.name == PAGE):
            self._run.log({"report": self._wandb.Html(page.read_text(encoding="utf-8"), inject=False)})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of Trackio, on this machine unless its environment names a Space."""

    def __init__(self, origin: Origin):
        import trackio

        self._trackio, self._name = trackio, origin.name
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = trackio.init(project, name=origin.name, resume="allow", config=dict(origin.config), embed=False)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def files(self, paths: Sequence[pathlib.Path]) -> None:
        artifact = self._trackio.Artifact(f"{self._name}-report", type="report")
        for path in paths:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, found again by a tag."""

    def __init__(self, origin: Origin):
        import mlflow

        self._entities, self._client = mlflow.entities, mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([experiment_id], f"tags.msd_jax_id = '{origin.id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        created = self._client.create_run(experiment_id, tags={"msd_jax_id": origin.id}, run_name=origin.name)
        self._id = created.info.run_id
        params = [mlflow.entities.Param(key, str(value)) for key, value in origin.config.items()]
        for first in range(0, len(params), _PARAMS):
            self._client.log_batch(self._id, params=params[first : first + _PARAMS])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def files(self, paths: Sequence[pathlib.Path]) -> None:
        for path in paths:
            self._client.log_artifact(self._id, str(path))

    def close(self) -> None:
        self._client.set_terminated(self._id, "FINISHED")


KINDS: dict[str, tuple[str, Callable[[Origin], Tracker]]] = {  # of config.train.trackers: (package, tracker)
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", WeightsAndBiases),
    "trackio": ("trackio", Trackio),
    "mlflow": ("mlflow", MLflow),
}


def require_installed(names: Iterable[str]) -> None:
    """Raises UserError where the package of a tracker is missing."""
    for name in names:
        if importlib.util.find_spec(KINDS[name][0]) is None:
            raise UserError(f"config.train.trackers: {name} is not installed: pip install 'msd-jax[{name}]'")


def of(config: ml_collections.ConfigDict, workdir: pathlib.Path, step: int) -> "Trackers":
    """The trackers of config.train.trackers, for a run that begins, or is resumed, from `step`."""
    return Trackers(config.train.trackers, workdir, dotted(config), step)


def dotted(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config's values by dotted key, as JSON holds them."""
    return traverse_util.flatten_dict(json.loads(config.to_json_best_effort()), sep=".")


def publish(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Adds config, final tables and page to the trackers of a run that has ended."""
    paths = [workdir / "config.json", *(workdir / "report" / name for name in ("summary.json", "summary.md", PAGE))]
    names = [name for name in config.train.trackers if name != "tensorboard"]  # which shows no files
    done = Trackers(names, workdir, dotted(config), config.train.steps)
    done.files([path for path in paths if path.is_file()])
    done.close()


class Trackers:
    """Those of a run, on process 0. One that fails is told of once, and not asked again.

    Each is opened by the first call that has something for it. Calls return at once.
    """

    def __init__(self, names: Iterable[str], workdir: pathlib.Path, config: Mapping[str, Any], step: int = 0):
        """`config`: by dotted key; `step`: that the run begins, or is resumed, from."""
        self._names = list(names) if distributed.is_first() else []
        self._origin = Origin(workdir, config, step)
        self._open: dict[str, Tracker] = {}
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._add(lambda tracker: tracker.scalars(step, values))

    def files(self, paths: Sequence[pathlib.Path]) -> None:
        self._add(lambda tracker: tracker.files(paths))

    def close(self) -> None:
        """Waits for what is left to be sent, within limits."""
        if self._thread:
            self._calls.put(None)
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                log(f"note: {', '.join(self._names)}: not all was sent within {PATIENCE:g} s; the files here are whole")
            self._thread = None

    def _add(self, call: Callable[[Tracker], None]) -> None:
        if self._names and not self._thread:
            self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
            self._thread.start()
        if self._names:
            self._calls.put(call)

    def _work(self) -> None:
        while call := self._calls.get():
            for name in tuple(self._names):
                self._try(name, functools.partial(self._send, name, call))
        for name, tracker in self._open.items():
            self._try(name, tracker.close)
        self._open.clear()

    def _send(self, name: str, call: Callable[[Tracker], None]) -> None:
        if name not in self._open:
            self._open[name] = KINDS[name][1](self._origin)
        call(self._open[name])

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever a library or a server may come up with
            if name in self._names:
                self._names.remove(name)
                reason = " ".join(str(error).split())[:200]
                log(f"note: the tracker {name} failed ({type(error).__name__}: {reason}); the run goes on without it")
