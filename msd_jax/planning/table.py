"""A plan as a table and as JSON, and remedies where it does not fit."""

import dataclasses
import math
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
import ml_collections
import rich.table

from msd_jax.io.console import log, show_table
from msd_jax.models import pretrained
from msd_jax.parallel import sharding
from msd_jax.planning import gpus
from msd_jax.planning.compiled import GIB, CompiledProgram, step_seconds
from msd_jax.planning.pod import Pod
from msd_jax.planning.programs import bytes_per_device, rollout_mesh, rollout_params
from msd_jax.training import optimizer, train_step


def show(programs: dict[str, CompiledProgram], pod: Pod) -> None:
    """Prints the table of the programs, the largest buffers of the fullest, and what the estimates assume."""
    table = rich.table.Table(box=None, pad_edge=False)
    hbm = f"of {pod.device.hbm_bytes / GIB:.2f}"
    columns = ("program", "HBM", "beside it", hbm, "FLOPs", "HBM traffic", "collectives", "at least", "bound by")
    for column in columns:
        table.add_column(column, justify="left" if column in ("program", "bound by") else "right")
    for name, program in programs.items():
        table.add_row(
            name,
            gib(program.peak_hbm_bytes),
            gib(program.resident_hbm_bytes),
            f"{program.total_hbm_bytes / pod.device.hbm_bytes:.0%}" + ("" if program.fits else " TOO BIG"),
            si(program.flops, ""),
            si(program.hbm_traffic_bytes, "B"),
            si(sum(program.collective_bytes.values()), "B"),
            si(program.seconds_estimate, "s"),
            program.bound,
        )
    show_table(table)
    cores = " core (two JAX devices per chip)" if "tpu7x" in pod.topology else ""
    log("figures are per GPU" if pod.is_gpu else f"figures are per chip{cores}")
    for name, program in programs.items():
        kinds = sorted(program.collective_bytes.items(), key=lambda item: -item[1])
        text = ", ".join(f"{kind} {si(size, 'B')}" for kind, size in kinds) or "none"
        islands = "nodes" if pod.is_gpu else "slices"
        across = f"; {si(program.dcn_bytes, 'B')} of it between {islands}" if program.dcn_bytes else ""
        alone = ", ".join(f"{what} {si(seconds, 's')}" for what, seconds in program.seconds.items() if seconds)
        log(f"{name}: each alone {alone}; collectives: {text}{across}")
    fullest = max(programs, key=lambda name: programs[name].total_hbm_bytes)
    log(f"largest buffers of {fullest}:")
    for size, shapes in programs[fullest].largest_buffers:
        log(f"  {gib(size):>9}  {shapes}")
    log(_assumptions(pod))


def _assumptions(pod: Pod) -> str:
    device = pod.device
    within, islands = f"(one of the torus's {device.torus_axes} axes)", "slices"
    if pod.is_gpu:
        within, islands = "within a node (NVLink)", "nodes"
    return (
        f"assumed per {'GPU' if pod.is_gpu else 'chip'}: {device.flops / 1e12:.0f} TFLOP/s, HBM "
        f"{device.hbm_bandwidth / 1e9:.0f} GB/s, a collective receives "
        f"{device.ici_bandwidth / device.torus_axes / 1e9:.0f} GB/s {within}, {device.dcn_bandwidth / 1e9:.1f} GB/s "
        f"between {islands}; all responses at their maximum length. These are peak rates, fully overlapped: a real "
        "step is slower."
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
    """The model, the pod and the settings in three lines; `source`: where the model's sizes are from."""
    count, trained = (
        sum(leaf.size for leaf in jax.tree.leaves(params))
        for params in (model.abstract, model.split(model.abstract)[0])
    )
    mesh = " x ".join(f"{name} {size}" for name, size in pod.mesh.shape.items())
    heads, widest = (sharding.parts(rollout_mesh(config, pod.mesh), axis) for axis in ("heads", "ffw"))
    slices = f"{pod.slices} slices of " if pod.slices > 1 and not pod.is_gpu else ""
    what = "all trained" if trained == count else f"{trained:,} trained"
    return (
        f"{config.model.path}: {count:,} parameters, {what}; sizes from {source}\n"
        f"{slices}{pod.topology}: {pod.device_count} devices, mesh {mesh}; "
        f"generation: heads over {heads}, the largest weights over {widest}; "
        f"{' '.join(compiler(pod))}\n"
        f"{config.rollout.policy}, batch {config.data.batch_size}, micro_batches={config.train.micro_batches}, "
        f"remat={config.model.remat}, prompts of {config.prompts.student_limit} (student) and "
        f"{config.prompts.teacher_limit} (teacher) tokens, responses of {config.rollout.max_new_tokens}"
    )


def compiler(pod: Pod) -> tuple[str, str]:
    """(package, version) that brings the compiler."""
    package = gpus.plugin() if pod.is_gpu else "libtpu"
    return package, metadata.version(package)


def remedies(
    config: ml_collections.ConfigDict, pod: Pod, programs: dict[str, CompiledProgram], model: pretrained.Architecture
) -> Iterator[str]:
    """The settings that relieve most what does not fit."""
    optimize, _ = optimizer.make_optimizer(config.optimizer, config.train.steps)
    state = train_step.abstract_state(model, pod.mesh, optimize, train_step.kept_teacher(config))
    state_bytes, mesh, hbm = bytes_per_device(state), pod.mesh.shape, pod.device.hbm_bytes
    too_big = [name for name, program in programs.items() if not program.fits]
    if state_bytes > hbm / 2 and not model.lora:
        parameters = sum(leaf.size for leaf in jax.tree.leaves(model.abstract))
        yield (
            f"the train state alone is {gib(state_bytes)} per chip: adapters (--config.model.lora.rank=16) leave about "
            f"{gib(2 * parameters // (mesh['fsdp'] * mesh['tensor']))}; more chips under fsdp also help"
        )
    if "train" in too_big:
        rows = config.data.batch_size // config.train.micro_batches // sharding.batch_shards(pod.mesh)
        over, free = programs["train"].total_hbm_bytes - state_bytes, hbm - state_bytes
        parts = next((2**i for i in range(rows.bit_length()) if rows % 2**i == 0 and over / 2**i <= free), 0)
        if parts:
            yield (
                f"--config.train.micro_batches={parts * config.train.micro_batches}: the rows per chip and micro-batch "
                f"fall from {rows} to {rows // parts}, and they take most of {gib(over)}"
            )
        if config.model.remat != "full":
            yield "--config.model.remat=full: the backward pass keeps only the residual stream"
        if mesh["data"] > pod.fewest_replicas:
            yield f"--mesh {pod.fewest_replicas},-1,{mesh['tensor']}: fsdp instead of data splits weights and optimizer"
    if set(too_big) - {"train"}:
        generating = rollout_mesh(config, pod.mesh)
        weights = bytes_per_device(rollout_params(config, model, generating))
        widest = 2 * sharding.parts(generating, "ffw")
        if not (model.config.ffw % widest or model.config.vocab_size % widest or pod.device_count % widest):
            yield (
                f"--config.mesh.rollout_ffw={widest}: during generation each chip holds {gib(weights)} of weights, its "
                f"part of the largest being 1/{widest // 2}"
            )
    yield "--search tries these and prints the fastest that fits"


def as_json(
    config: ml_collections.ConfigDict, pod: Pod, programs: dict[str, CompiledProgram], source: str
) -> dict[str, Any]:
    """The plan as JSON: `programs` is {name: the fields and properties of CompiledProgram}."""
    return {
        "model": config.model.path,
        "architecture": source,
        "topology": pod.topology,
        "slices": pod.slices,
        "devices": pod.device_count,
        "mesh": dict(pod.mesh.shape),
        "rollout_mesh": dict(rollout_mesh(config, pod.mesh).shape),
        "batch_size": config.data.batch_size,
        "micro_batches": config.train.micro_batches,
        "remat": config.model.remat,
        "lora_rank": config.model.lora.rank,
        "chip": dataclasses.asdict(pod.device),
        **dict([compiler(pod)]),
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
