"""A plan before the bill: compiles a run for a TPU pod that is not there (`python -m msd_jax.plan`).

    python -m msd_jax.plan --config configs/NAME.py [--topology v5e:8x8] [--mesh data,fsdp,tensor] [--json FILE]
        [--search]

The very programs of training are compiled by XLA's own TPU compiler, from shapes alone: no weights, no queries, no
TPU and no network. It tells for each what it needs of a chip's memory, beside what lies there already, and how long it
takes at best. Without --topology and --mesh the pod is that of config.launch and config.mesh. --search tries meshes,
micro-batches and what the backward pass keeps, and ends with the fastest that fits.

Exit code 0: it fits; 2: it does not; 1: the plan could not be made.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata, resources
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import rich.table
from absl import flags
from jax.sharding import Mesh

from msd_jax import chips, cli, cost, evaluate, optimizer, rollout, settings, sharding, topology, update
from msd_jax.console import console, say
from msd_jax.models import config as model_config
from msd_jax.models import decoder, pretrained

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
      FileNotFoundError, ValueError: none of them has it, or the decoder does not implement it.
    """
    directory = pathlib.Path(path).expanduser()
    if path and directory.is_dir():
        return model_config.read(directory), str(directory / "config.json")
    table = resources.files("msd_jax").joinpath("data/architectures.json")
    published = json.loads(table.read_text(encoding="utf-8"))
    if path in published:
        return model_config.from_dict(published[path]), "its published config.json, kept in msd_jax/data"
    import huggingface_hub

    try:
        file = huggingface_hub.hf_hub_download(path, "config.json")
    except Exception as error:  # the hub's own errors are many; what the user can do is always the same
        raise FileNotFoundError(
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
      ValueError: the batch does not divide over the mesh, or a parameter does not.
    """
    update.check_batch(config, mesh)
    prompts, length, batch_size = config.prompts, config.rollout.max_new_tokens, config.data.batch_size
    optimize, _ = optimizer.make_optimizer(config.optimizer, config.train.steps)
    state, frozen = update.abstract_state(model, mesh, optimize, config.teacher.kind)
    held = bytes_a_chip((state, frozen))
    weights = decoder.join(frozen, state.params)
    relaid = rollout_params(model, mesh)

    def rows(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))

    def step() -> jax.stages.Traced:
        B, P, Q = batch_size, prompts.student_limit, prompts.teacher_limit
        batch = update.TrainBatch(rows(B, P), rows(B), rows(B, Q), rows(B), rows(B, length), rows(B))
        return update.jit_train_step(config, model, mesh, optimize).trace(state, frozen, batch)

    def generate(B: int, P: int, R: int) -> jax.stages.Traced:
        sampling = {key: config.rollout[key] for key in ("temperature", "top_k", "top_p")}
        generator = rollout.Generator(model.graphdef, mesh, rollout.Sampling(R, **sampling), stop_ids=(0,), pad_id=0)
        return generator.trace(relaid, B, P)

    yield Task("train", step, beside=0)
    yield Task("relayout", lambda: rollout.trace_relayout(weights, relaid), beside=held - bytes_a_chip(weights))
    if config.rollout.policy != "off_policy":
        run = functools.partial(generate, batch_size, prompts.student_limit, length)
        yield Task("rollout", run, held, length - 1)
    if config.rollout.policy != "on_policy":
        run = functools.partial(generate, batch_size, prompts.teacher_limit, length)
        yield Task("teacher rollout", run, held, length - 1)
    if evaluate.wanted(config):
        B, R = sharding.batch_rows(mesh, config.eval.batch_size), config.eval.max_new_tokens
        yield Task("evaluation", functools.partial(generate, B, evaluate.prompt_limit(config)[0], R), held, R - 1)


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

    hlo = cost.Program(text, task.while_trips, pod.slices)
    kinds: dict[str, int] = {}
    dcn = 0
    for collective in hlo.collectives():
        kinds[collective.kind] = kinds.get(collective.kind, 0) + collective.bytes
        dcn += collective.bytes if collective.crosses else 0
    flops = cost.flops(traced.jaxpr, task.while_trips) / pod.devices
    traffic = hlo.hbm_bytes()
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
      ValueError: the message is about something else.
    """
    match = re.search(r"memory required for HLO temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", message)
    if "RESOURCE_EXHAUSTED" not in message or not match:
        raise ValueError(f"XLA's TPU compiler failed: {message.splitlines()[0]}")
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
        return max(arrays, key=cost.shape_bytes, default=shapes) + others

    return tuple((size, name(shapes)) for size, shapes in buffers)


# --- The report ---------------------------------------------------------------------------------------------------


def show(programs: dict[str, Program], pod: Pod) -> None:
    """Prints the table of the programs, the largest buffers of the fullest, and what the estimates assume."""
    table = rich.table.Table()
    columns = ("program", "HBM", "beside it", f"of {pod.chip.hbm / GIB:.2f}", "FLOPs", "HBM traffic", "collectives")
    for name in (*columns, "at least", "bound by"):
        table.add_column(name, justify="left" if name in ("program", "bound by") else "right")
    for name, program in programs.items():
        table.add_row(
            name,
            gib(program.peak_hbm_bytes),
            gib(program.resident_hbm_bytes),
            f"{program.total_hbm_bytes / pod.chip.hbm:.0%}" + ("" if program.fits else " TOO BIG"),
            si(program.flops, ""),
            si(program.hbm_traffic_bytes, "B"),
            si(sum(program.collective_bytes.values()), "B"),
            si(program.seconds_estimate, "s"),
            program.bound,
        )
    console.print(table)
    say("figures are those of one chip" + (" core (two JAX devices a chip)" if "tpu7x" in pod.name else ""))
    for name, program in programs.items():
        kinds = sorted(program.collective_bytes.items(), key=lambda item: -item[1])
        text = ", ".join(f"{kind} {si(size, 'B')}" for kind, size in kinds) or "none"
        across = f"; {si(program.dcn_bytes, 'B')} of it between slices" if program.dcn_bytes else ""
        alone = ", ".join(f"{what} {si(seconds, 's')}" for what, seconds in program.seconds.items() if seconds)
        say(f"{name}: alone {alone}; collectives: {text}{across}")
    fullest = max(programs, key=lambda name: programs[name].total_hbm_bytes)
    say(f"largest buffers of {fullest}:")
    for size, shapes in programs[fullest].largest_buffers:
        say(f"  {gib(size):>9}  {shapes}")
    say(
        f"assumed a chip: {pod.chip.flops / 1e12:.0f} TFLOP/s, HBM {pod.chip.bandwidth / 1e9:.0f} GB/s, a collective "
        f"receives {pod.chip.ici / pod.chip.axes / 1e9:.0f} GB/s (one of the torus's {pod.chip.axes} axes), "
        f"between slices {pod.chip.dcn / 1e9:.1f} GB/s; every response at its longest. "
        "Peaks, fully overlapped: a real step is slower."
    )


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"


def si(value: float, unit: str) -> str:
    """Three digits with a prefix: "1.83 TB", "24.1 ms"."""
    if not value:
        return f"0 {unit}".strip()
    power = min(max(math.floor(math.log10(value) / 3), -2), 5)
    prefix = {-2: "u", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P"}[power]
    return f"{value / 1000**power:.3g} {prefix}{unit}".rstrip()


def describe(config: ml_collections.ConfigDict, model: pretrained.Architecture, pod: Pod, source: str) -> str:
    count, trained = (
        sum(leaf.size for leaf in jax.tree.leaves(x)) for x in (model.abstract, model.split(model.abstract)[0])
    )
    sizes = " x ".join(f"{name} {size}" for name, size in pod.mesh.shape.items())
    slices = f"{pod.slices} slices of " if pod.slices > 1 else ""
    what = "all trained" if trained == count else f"{trained:,} trained"
    return (
        f"{config.model.path}: {count:,} parameters, {what}; sizes from {source}\n"
        f"{slices}{pod.name}: {pod.devices} devices, mesh {sizes}; libtpu {metadata.version('libtpu')}\n"
        f"{config.rollout.policy}, batch {config.data.batch_size}, micro_batches={config.train.micro_batches}, "
        f"remat={config.model.remat}, prompts of {config.prompts.student_limit} (student) and "
        f"{config.prompts.teacher_limit} (teacher) tokens, responses of {config.rollout.max_new_tokens}"
    )


def remedies(config: ml_collections.ConfigDict, pod: Pod, programs: dict[str, Program], model: Any) -> Iterator[str]:
    """For what does not fit, the settings that take most off it."""
    optimize, _ = optimizer.make_optimizer(config.optimizer, config.train.steps)
    state, frozen = update.abstract_state(model, pod.mesh, optimize, config.teacher.kind)
    held, mesh = bytes_a_chip((state, frozen)), pod.mesh.shape
    too_big = [name for name, program in programs.items() if not program.fits]
    if held > pod.chip.hbm / 2 and not model.lora:
        whole = sum(leaf.size for leaf in jax.tree.leaves(model.abstract))
        yield (
            f"the train state alone is {gib(held)} a chip: adapters (--config.model.lora.rank=16) leave about "
            f"{gib(2 * whole // (mesh['fsdp'] * mesh['tensor']))}; so do more chips under fsdp"
        )
    if "train" in too_big:
        rows = config.data.batch_size // config.train.micro_batches // sharding.batch_shards(pod.mesh)
        over, free = programs["train"].total_hbm_bytes - held, pod.chip.hbm - held
        parts = next((2**i for i in range(rows.bit_length()) if rows % 2**i == 0 and over / 2**i <= free), 0)
        if parts:
            yield (
                f"--config.train.micro_batches={parts * config.train.micro_batches}: a chip's rows at once fall from "
                f"{rows} to {rows // parts}; most of {gib(over)} is theirs"
            )
        if config.model.remat != "full":
            yield "--config.model.remat=full: the backward pass keeps the residual stream alone"
        if mesh["data"] > pod.slices:
            yield f"--mesh {pod.slices},-1,{mesh['tensor']}: fsdp instead of data splits weights and optimizer"
    if set(too_big) - {"train"}:
        weights = bytes_a_chip(rollout_params(model, pod.mesh))
        tensor = 2 * mesh["tensor"]
        if not model.config.kv_heads % tensor:
            yield (
                f"--mesh {mesh['data']},-1,{tensor}: while it generates each chip holds {gib(weights)} of "
                f"weights, 1/{mesh['tensor']} of them"
            )
    yield "--search tries these and names the fastest that fits"


def as_json(config: ml_collections.ConfigDict, pod: Pod, programs: dict[str, Program], source: str) -> dict[str, Any]:
    """The plan as JSON: `programs` is {name: fields of Program and what follows from them}."""
    return {
        "model": config.model.path,
        "architecture": source,
        "topology": pod.name,
        "slices": pod.slices,
        "devices": pod.devices,
        "mesh": dict(pod.mesh.shape),
        "batch_size": config.data.batch_size,
        "micro_batches": config.train.micro_batches,
        "remat": config.model.remat,
        "lora_rank": config.model.lora.rank,
        "chip": dataclasses.asdict(pod.chip),
        "libtpu": metadata.version("libtpu"),
        "fits": all(program.fits for program in programs.values()),
        "seconds_estimate": step_seconds(programs),
        "programs": {
            name: dataclasses.asdict(program)
            | {
                "seconds_estimate": program.seconds_estimate,
                "bound": program.bound,
                "total_hbm_bytes": program.total_hbm_bytes,
            }
            for name, program in programs.items()
        },
    }


def step_seconds(programs: dict[str, Program]) -> float:
    """Of one training step: all of its programs, one after the other."""
    return sum(program.seconds_estimate for name, program in programs.items() if name != "evaluation")


# --- The search ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One setting of the knobs, and what came of it."""

    config: ml_collections.ConfigDict
    pod: Pod
    programs: dict[str, Program]

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs.values())

    @property
    def flags(self) -> str:
        mesh = ",".join(str(size) for size in self.pod.mesh.shape.values())
        c = self.config
        return (
            f"--mesh {mesh} --config.train.micro_batches={c.train.micro_batches} --config.model.remat={c.model.remat}"
        )


def search(config: ml_collections.ConfigDict, sizes: Any, pod: Pod) -> Candidate | None:
    """The fastest setting that fits, or None: every mesh with the fewest micro-batches that fit, then less remat."""
    best: Candidate | None = None

    def attempt(setting: ml_collections.ConfigDict, mesh: Mesh, known: dict[str, Program]) -> Candidate:
        nonlocal best
        model = build(setting, sizes, mesh)
        place = dataclasses.replace(pod, mesh=mesh)
        programs = dict(known)
        # What generates first: it compiles fastest, and rules out most.
        for task in sorted(tasks(setting, model, mesh), key=lambda task: task.name == "train"):
            if task.name not in programs and all(program.fits for program in programs.values()):
                programs[task.name] = compile_task(task, place)
        candidate = Candidate(setting, place, programs)
        fullest = max(programs.values(), key=lambda program: program.total_hbm_bytes)
        verdict = f"at least {si(step_seconds(programs), 's')} a step" if candidate.fits else "does not fit"
        say(f"{candidate.flags}: {gib(fullest.total_hbm_bytes)}, {verdict}")
        if candidate.fits and (best is None or step_seconds(programs) < step_seconds(best.programs)):
            best = candidate
        return candidate

    devices = list(pod.mesh.devices.flat)
    for data, fsdp, tensor in meshes(pod):
        known: dict[str, Program] = {}
        for micro_batches in (2**i for i in range(config.data.batch_size.bit_length())):
            setting = with_values(config, **{"train.micro_batches": micro_batches, "model.remat": "full"})
            try:
                mesh = sharding.make_mesh(data, fsdp, tensor, devices=devices)
                update.check_batch(setting, mesh)
                model = build(setting, sizes, mesh)
                model.shardings(mesh, sharding.TRAIN)
            except ValueError:  # an axis that does not divide
                break
            if bytes_a_chip(rollout_params(model, mesh)) + bytes_a_chip(model.target(mesh)) > pod.chip.hbm:
                break
            candidate = attempt(setting, mesh, known)
            known = {name: program for name, program in candidate.programs.items() if name != "train"}
            if candidate.fits or not all(program.fits for program in known.values()):
                break
    if best is not None:
        for remat in ("none", "dots"):
            known = {name: program for name, program in best.programs.items() if name != "train"}
            if attempt(with_values(best.config, **{"model.remat": remat}), best.pod.mesh, known).fits:
                break
    return best


def meshes(pod: Pod) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor) worth a try, fsdp alone first."""
    for tensor in (1, 2, 4, 8):
        for data in (pod.slices, 4 * pod.slices):
            if pod.devices % (data * tensor) == 0 and pod.devices >= data * tensor:
                yield data, pod.devices // (data * tensor), tensor


def with_values(config: ml_collections.ConfigDict, **values: Any) -> ml_collections.ConfigDict:
    """A frozen copy with other values, named by dotted keys."""
    copy = ml_collections.ConfigDict(config.to_dict() if hasattr(config, "to_dict") else config)
    copy.update_from_flattened_dict(values)
    return ml_collections.FrozenConfigDict(copy)


# --- The command --------------------------------------------------------------------------------------------------


def plan(config: ml_collections.ConfigDict, sizes: Any, pod: Pod, source: str) -> dict[str, Program]:
    """Compiles and prints; returns the programs by name."""
    model = build(config, sizes, pod.mesh)
    say(describe(config, model, pod, source))
    programs = {}
    for task in tasks(config, model, pod.mesh):
        programs[task.name] = compile_task(task, pod)
        say(f"compiled {task.name} in {programs[task.name].compile_seconds:.0f} s")
    show(programs, pod)
    if all(program.fits for program in programs.values()):
        say(f"FITS. A step takes at least {si(step_seconds(programs), 's')}.")
    else:
        names = ", ".join(
            f"{name} needs {gib(program.total_hbm_bytes)}" for name, program in programs.items() if not program.fits
        )
        say(f"DOES NOT FIT: {names} of {gib(pod.chip.hbm)}. What would help:")
        for line in remedies(config, pod, programs, model):
            say(f"  {line}")
    return programs


def make_pod(config: ml_collections.ConfigDict, name: str, mesh: str) -> tuple[ml_collections.ConfigDict, Pod]:
    """The pod of the flags or, where they are empty, of config.launch, and the config with its mesh.

    Raises:
      ValueError: the flags or the config name no pod that the mesh fits.
    """
    slices = config.launch.slices
    if not name and config.launch.accelerator != "tpu":
        raise ValueError(
            f"config.launch.accelerator={config.launch.accelerator!r}: a plan compiles for TPUs only, for which XLA's "
            "compiler needs no chip at hand; --topology v5e:8x8, for one, says how the recipe would sit on TPUs"
        )
    if mesh:
        if not re.fullmatch(r"-?\d+,-?\d+,-?\d+", mesh):
            raise ValueError(f"--mesh={mesh}: give data,fsdp,tensor as in --mesh 1,16,4 (-1: what is left)")
        sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), map(int, mesh.split(","))))
        config = with_values(config, **sizes)
    name = name or config.launch.topology
    return config, Pod(name, slices, sharding.make_mesh(**config.mesh, devices=chips.devices(name, slices)))


def main(argv: list[str]) -> None:
    del argv
    with cli.clear_errors():
        given, file = cli.config(), pathlib.Path(cli.FLAGS.json)
        settings.check(given)
        if not file.parent.is_dir():
            raise ValueError(f"--json={file}: there is no directory {file.parent}")
        config, pod = make_pod(given, cli.FLAGS.topology, cli.FLAGS.mesh)
        sizes, source = read_architecture(config.model.path)
        if cli.FLAGS.search:
            best = search(config, sizes, pod)
            if best is None:
                say(f"nothing that was tried fits {pod.name}; try adapters (--config.model.lora.rank=16) or more chips")
                sys.exit(2)
            say(f"\nthe fastest that fits: {best.flags}")
            config, pod, programs = best.config, best.pod, best.programs
            show(programs, pod)
        else:
            programs = plan(config, sizes, pod, source)
        if cli.FLAGS.json:
            text = json.dumps(as_json(config, pod, programs, source), indent=1) + "\n"
            file.write_text(text, encoding="utf-8")
    sys.exit(0 if all(program.fits for program in programs.values()) else 2)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # a TPU that is here stays free
    flags.DEFINE_bool("search", False, "Try meshes, micro-batches and remat; print the fastest that fits.")
    cli.run(main, alone=True, topology="", mesh="", json="")
