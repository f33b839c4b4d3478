"""The programs of a run, compiled for a pod that is not here, and what each needs of a chip."""

import dataclasses
import functools
import json
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from msd_jax.errors import UserError, UserFileError
from msd_jax.evaluation import evaluator
from msd_jax.generation import rollout
from msd_jax.models import config as model_config
from msd_jax.models import decoder, pretrained
from msd_jax.parallel import sharding
from msd_jax.planning import chips, hlo, topology
from msd_jax.training import optimizer, train_step

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Pod:
    """The slices that a run is planned for.

    Attributes:
      name: of one slice, as topology.parse reads it.
      slices: how many, joined by the data-center network.
      mesh: over all of their devices.
    """

    name: str
    slices: int
    mesh: Mesh

    @property
    def chip(self) -> chips.Chip:
        return chips.CHIPS[topology.parse(self.name).generation.name]

    @property
    def devices(self) -> int:
        return self.mesh.size


@dataclasses.dataclass(frozen=True)
class Task:
    """A program of a run, before it is compiled.

    Attributes:
      name: of the phase that it is.
      trace: traces it with abstract arguments.
      beside: bytes a chip that lie in HBM while it runs and are no argument of it.
      while_trips: most iterations of a loop that ends by a condition.
    """

    name: str
    trace: Callable[[], jax.stages.Traced]
    beside: int
    while_trips: int = 1


@dataclasses.dataclass(frozen=True)
class Program:
    """A program as compiled for a pod. All figures are those of one chip (JAX device), and of one run.

    Attributes:
      peak_hbm_bytes: most memory that it needs, its arguments included; where it does not fit, what it would need.
      resident_hbm_bytes: what lies beside it: the train state during a rollout.
      fits: whether both together are within what the chip has.
      flops: of matrix products.
      hbm_traffic_bytes: moved between HBM and the compute units.
      collective_bytes: received from other chips, by kind of collective.
      dcn_bytes: the part of them that comes from other slices.
      seconds: at least, for compute, hbm, ici and dcn each alone.
      compile_seconds: of tracing and compiling here.
      largest_buffers: (bytes, the largest array that lies in it), the largest first.
    """

    peak_hbm_bytes: int
    resident_hbm_bytes: int
    fits: bool
    flops: float
    hbm_traffic_bytes: int
    collective_bytes: dict[str, int]
    dcn_bytes: int
    seconds: dict[str, float]
    compile_seconds: float
    largest_buffers: tuple[tuple[int, str], ...]

    @property
    def seconds_estimate(self) -> float:
        """The roofline: what takes longest, as if all else were hidden behind it."""
        return max(self.seconds.values())

    @property
    def bound(self) -> str:
        return max(self.seconds, key=self.seconds.get)

    @property
    def total_hbm_bytes(self) -> int:
        return self.peak_hbm_bytes + self.resident_hbm_bytes


# --- What is compiled ---------------------------------------------------------------------------------------------


def read_architecture(path: str) -> tuple[model_config.DecoderConfig, str]:
    """The sizes of config.model.path and where they come from: its directory, this package, or the hub's config.json.

    Raises:
      UserError: none of them has it, or the decoder does not implement it.
    """
    directory = pathlib.Path(path).expanduser()
    if path and directory.is_dir():
        return model_config.read(directory), str(directory / "config.json")
    table = resources.files("msd_jax.planning").joinpath("architectures.json")
    published = json.loads(table.read_text(encoding="utf-8"))
    if path in published:
        return model_config.from_dict(published[path]), "its published config.json, kept in msd_jax/planning"
    import huggingface_hub

    try:
        file = huggingface_hub.hf_hub_download(path, "config.json")
    except Exception as error:  # the hub's own errors are many; what the user can do is always the same
        raise UserFileError(
            f"config.model.path={path!r} is no directory here, its sizes are not among those that this package has "
            f"({', '.join(published)}), and the hub did not give them ({type(error).__name__}); "
            "copy its config.json into a directory and give that"
        ) from error
    return model_config.read(pathlib.Path(file).parent), f"config.json of {path} on the hub"


def bytes_a_chip(tree: Any) -> int:
    """Bytes on one device of a tree of ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def build(config: ml_collections.ConfigDict, sizes: model_config.DecoderConfig, mesh: Mesh) -> pretrained.Architecture:
    """The model of `config`, without weights."""
    options = {key: value for key, value in config.model.items() if key != "path"}
    return pretrained.architecture(sizes, mesh=mesh, **options)


def rollout_params(model: pretrained.Architecture, mesh: Mesh) -> decoder.Params:
    """The weights that generate, abstract: in the compute dtype and the rollout's layout."""
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, model.dtype, sharding=s),
        model.abstract,
        model.shardings(mesh, sharding.ROLLOUT),
    )


def tasks(config: ml_collections.ConfigDict, model: pretrained.Architecture, mesh: Mesh) -> Iterator[Task]:
    """The programs of a run at its largest shapes: prompts at their limits, responses at config.rollout.max_new_tokens.

    The teacher's forward pass is part of the train step.

    Raises:
      UserError: the batch does not divide over the mesh, or a parameter does not.
    """
    train_step.check_batch(config, mesh)
    prompts, length, batch_size = config.prompts, config.rollout.max_new_tokens, config.data.batch_size
    optimize, _ = optimizer.make_optimizer(config.optimizer, config.train.steps)
    state, frozen = train_step.abstract_state(model, mesh, optimize, config.teacher.kind)
    held = bytes_a_chip((state, frozen))
    weights = decoder.join(frozen, state.params)
    relaid = rollout_params(model, mesh)

    def rows(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))

    def step() -> jax.stages.Traced:
        B, P, Q = batch_size, prompts.student_limit, prompts.teacher_limit
        batch = train_step.TrainBatch(rows(B, P), rows(B), rows(B, Q), rows(B), rows(B, length), rows(B))
        return train_step.jit_train_step(config, model, mesh, optimize).trace(state, frozen, batch)

    def generate(B: int, P: int, R: int) -> jax.stages.Traced:
        sampling = {key: config.rollout[key] for key in ("temperature", "top_k", "top_p")}
        generator = rollout.Generator(model.graphdef, mesh, rollout.Sampling(R, **sampling), stop_ids=(0,), pad_id=0)
        return generator.trace(relaid, B, P)

    yield Task("train", step, beside=0)
    yield Task("relayout", lambda: rollout.trace_reshard(weights, relaid), beside=held - bytes_a_chip(weights))
    if config.rollout.policy != "off_policy":
        run = functools.partial(generate, batch_size, prompts.student_limit, length)
        yield Task("rollout", run, held, length - 1)
    if config.rollout.policy != "on_policy":
        run = functools.partial(generate, batch_size, prompts.teacher_limit, length)
        yield Task("teacher rollout", run, held, length - 1)
    if evaluator.wanted(config):
        B, R = sharding.batch_rows(mesh, config.eval.batch_size), config.eval.max_new_tokens
        yield Task("evaluation", functools.partial(generate, B, evaluator.prompt_limit(config)[0], R), held, R - 1)


# --- Compiling and reading what comes out -------------------------------------------------------------------------


def compile_task(task: Task, pod: Pod) -> Program:
    """Compiles a program for the pod and reads its figures, also where it does not fit."""
    start = time.perf_counter()
    traced = task.trace()
    with tempfile.TemporaryDirectory() as dump:
        try:
            compiled = traced.lower().compile(compiler_options={"xla_dump_to": dump})
            peak, compiles = compiled.memory_analysis().peak_memory_in_bytes, True
        except jax.errors.JaxRuntimeError as error:
            peak, compiles = needed_bytes(str(error)), False
        # Not compiled.as_text(): there is none of what does not fit, and for v5p it fails.
        text = read_dump(dump, ".after_optimizations.txt")
        buffers = parse_buffers(read_dump(dump, "-memory-usage-report.txt"))
    seconds = time.perf_counter() - start

    program = hlo.Program(text, task.while_trips, pod.slices)
    kinds: dict[str, int] = {}
    dcn = 0
    for collective in program.collectives():
        kinds[collective.kind] = kinds.get(collective.kind, 0) + collective.bytes
        dcn += collective.bytes if collective.crosses else 0
    flops = hlo.flops(traced.jaxpr, task.while_trips) / pod.devices
    traffic = program.hbm_bytes()
    chip = pod.chip
    return Program(
        peak_hbm_bytes=peak,
        resident_hbm_bytes=task.beside,
        fits=compiles and peak + task.beside <= chip.hbm,
        flops=flops,
        hbm_traffic_bytes=traffic,
        collective_bytes=kinds,
        dcn_bytes=dcn,
        seconds={
            "compute": flops / chip.flops,
            "hbm": traffic / chip.bandwidth,
            "ici": (sum(kinds.values()) - dcn) / (chip.ici / chip.axes),
            "dcn": dcn / chip.dcn,
        },
        compile_seconds=seconds,
        largest_buffers=buffers,
    )


def needed_bytes(message: str) -> int:
    """What a program needs, from XLA's message that it has not.

    Raises:
      UserError: the message is about something else.
    """
    match = re.search(r"memory required for HLO temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", message)
    if "RESOURCE_EXHAUSTED" not in message or not match:
        raise UserError(f"XLA's TPU compiler failed: {message.splitlines()[0]}")
    number, unit = (part for part in match.groups() if part)
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))


def read_dump(directory: str, suffix: str) -> str:
    """The text of the largest file of XLA's dump that ends so (small programs beside the one are dumped too)."""
    files = pathlib.Path(directory).glob(f"*{suffix}")
    return max((file.read_text(encoding="utf-8", errors="replace") for file in files), key=len, default="")


def parse_buffers(report: str, count: int = 6) -> tuple[tuple[int, str], ...]:
    """(bytes, what is largest in it) of the largest buffers in XLA's memory usage report, of HBM alone (color 0)."""
    hbm = report.split("Memory Space:")[1] if "Memory Space:" in report else ""
    rows = re.findall(r"^ *\S+ *\( *\d+%\); +([\d.]+)([KMGT]?)i?B; +\d+; +\d+; (.*)$", hbm, re.MULTILINE)
    sizes = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    buffers = sorted(((int(float(number) * sizes[unit]), text) for number, unit, text in rows), reverse=True)[:count]

    def name(shapes: str) -> str:
        arrays = re.findall(r"\w+\[[\d,]*\]", shapes)
        others = f", and {len(arrays) - 1} other shapes in its place" if len(arrays) > 1 else ""
        return max(arrays, key=hlo.shape_bytes, default=shapes) + others

    return tuple((size, name(shapes)) for size, shapes in buffers)


def step_seconds(programs: dict[str, Program]) -> float:
    """Of one training step: all of its programs, one after the other."""
    return sum(program.seconds_estimate for name, program in programs.items() if name != "evaluation")


def with_values(config: ml_collections.ConfigDict, **values: Any) -> ml_collections.ConfigDict:
    """A frozen copy with other values, named by dotted keys."""
    copy = ml_collections.ConfigDict(config.to_dict() if hasattr(config, "to_dict") else config)
    copy.update_from_flattened_dict(values)
    return ml_collections.FrozenConfigDict(copy)


def make_pod(config: ml_collections.ConfigDict, name: str, mesh: str) -> tuple[ml_collections.ConfigDict, Pod]:
    """The pod of the flags or, where they are empty, of config.launch, and the config with its mesh.

    Raises:
      UserError: the flags or the config name no pod that the mesh fits.
    """
    slices = config.launch.slices
    if not name and config.launch.accelerator != "tpu":
        raise UserError(
            f"config.launch.accelerator={config.launch.accelerator!r}: a plan compiles for TPUs only, for which XLA's "
            "compiler needs no chip at hand; --topology v5e:8x8, for one, says how the recipe would sit on TPUs"
        )
    if mesh:
        if not re.fullmatch(r"-?\d+,-?\d+,-?\d+", mesh):
            raise UserError(f"--mesh={mesh}: give data,fsdp,tensor as in --mesh 1,16,4 (-1: what is left)")
        sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), map(int, mesh.split(","))))
        config = with_values(config, **sizes)
    name = name or config.launch.topology
    return config, Pod(name, slices, sharding.make_mesh(**config.mesh, devices=chips.devices(name, slices)))
