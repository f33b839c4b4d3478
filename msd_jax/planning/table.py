"""A plan as a table, as JSON, and what would help where it does not fit."""

import dataclasses
import math
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
import ml_collections
import rich.table

from msd_jax.io.console import console, log
from msd_jax.models import pretrained
from msd_jax.parallel import sharding
from msd_jax.planning.programs import GIB, Pod, Program, bytes_a_chip, rollout_params, step_seconds
from msd_jax.training import optimizer, train_step


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
    log("figures are those of one chip" + (" core (two JAX devices a chip)" if "tpu7x" in pod.name else ""))
    for name, program in programs.items():
        kinds = sorted(program.collective_bytes.items(), key=lambda item: -item[1])
        text = ", ".join(f"{kind} {si(size, 'B')}" for kind, size in kinds) or "none"
        across = f"; {si(program.dcn_bytes, 'B')} of it between slices" if program.dcn_bytes else ""
        alone = ", ".join(f"{what} {si(seconds, 's')}" for what, seconds in program.seconds.items() if seconds)
        log(f"{name}: alone {alone}; collectives: {text}{across}")
    fullest = max(programs, key=lambda name: programs[name].total_hbm_bytes)
    log(f"largest buffers of {fullest}:")
    for size, shapes in programs[fullest].largest_buffers:
        log(f"  {gib(size):>9}  {shapes}")
    log(
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
    state, frozen = train_step.abstract_state(model, pod.mesh, optimize, config.teacher.kind)
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
