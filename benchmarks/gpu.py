"""Training and decoding on one GPU: seconds, tokens per second, and the shares of the card's peak that they reach.

    python benchmarks/gpu.py --seconds 300 --out DIR [--models 1b 7b] [--parts train dots decode int8 stacked]

Runs the programs that training runs, with random weights made on the device: no checkpoint, tokenizer or network.

- `1b train`: Llama-3.2-1B's shape, all weights trained in float32, products in bfloat16, AdamW, frozen teacher; once
  with each attention kernel.
- `1b dots`: the same with config.model.remat="dots", which repeats no matrix product in the backward pass.
- `1b decode`: prompts to responses, weights and cache in bfloat16.
- `1b int8`: the same with config.rollout.weights="int8".
- `1b stacked`: decoding with a scan over stacked layers, as on TPUs: XLA's GPU compiler then copies the weights that it
  slices, for every token.
- `7b train` and so on: the same with Qwen2.5-7B's shape, a bfloat16 base and adapters of rank 16.

Needs this package with its requirements, JAX for CUDA (pip install -e '.[cuda]') and a GPU with 80 GB; smaller ones
take fewer rows. On a CPU, `--models tiny` tries all of it in seconds; shares are printed for the cards in
msd_jax/planning/hardware.py alone. Every result is one JSON line of DIR/gpu.jsonl, written as soon as it is measured.
A part that fails leaves a line with its error, and one that runs out of memory is tried with half the rows. No part
begins when less than 40 of `--seconds` are left. Each model has a process of its own.

Seconds are the median of 5 runs after one. MFU counts the products of a step without recomputation, `hfu` those with
it, over the peak of dense bfloat16 products. `hbm_share` is the time to read the weights and the cached tokens from
memory at its peak bandwidth, over the time that a token took. `estimate` is what a plan (docs/plan.md) says.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from msd_jax.configs import default

from msd_jax.generation import rollout
from msd_jax.models import config as model_config
from msd_jax.models import decoder, pretrained
from msd_jax.parallel import sharding
from msd_jax.planning import architecture, hardware, programs
from msd_jax.planning.flops import count_flops
from msd_jax.planning.hbm_traffic import hbm_traffic
from msd_jax.planning.hlo import HloModule
from msd_jax.training import optimizer, packing, train_step
from msd_jax.training.pack_shape import pack_shape

RUNS, NEEDED_SECONDS = 5, 40.0
TINY = {"model_type": "llama", "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 64, "vocab_size": 256} | {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model, what of it is trained, and the batch.

    Attributes:
      path: of planning/architectures.json; "" for TINY.
      rank: of the adapters; 0 trains all weights.
      rows: B, to begin with.
      student, teacher, response: tokens of the two prompts and of the responses; every row has them all.
    """

    path: str
    rank: int
    rows: int
    student: int
    teacher: int
    response: int

    @property
    def sizes(self) -> model_config.DecoderConfig:
        return architecture.read_sizes(self.path)[0] if self.path else model_config.from_dict(TINY)

    def config(
        self, rows: int, kernel: str, remat: str = "full", stored: str = "float"
    ) -> ml_collections.FrozenConfigDict:
        config = default.get_config()
        config.model.update(path=self.path, dtype="bfloat16", attention=kernel, remat=remat)
        config.model.lora.rank = self.rank
        config.data.batch_size = rows
        config.prompts.update(student_limit=self.student, teacher_limit=self.teacher)
        config.rollout.update(max_new_tokens=self.response, weights=stored)
        return ml_collections.FrozenConfigDict(config)


SETTINGS = {
    "1b": Setting("meta-llama/Llama-3.2-1B-Instruct", rank=0, rows=64, student=128, teacher=256, response=256),
    "7b": Setting("Qwen/Qwen2.5-7B-Instruct", rank=16, rows=32, student=128, teacher=256, response=256),
    "tiny": Setting("", rank=0, rows=4, student=8, teacher=16, response=8),
}


class RandomModel(pretrained.Architecture):
    """A model with random weights where training would read a checkpoint's."""

    def params(self, mesh: jax.sharding.Mesh, seed: int = 0) -> decoder.Params:
        target = self.target(mesh)

        def draw() -> decoder.Params:
            _, params = decoder.init(self.config, jax.random.key(seed), lora=self.lora)
            return jax.tree.map(lambda p, leaf: p.astype(leaf.dtype), params, target)

        return jax.jit(draw, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, target))()


def make(setting: Setting, config: Any) -> tuple[RandomModel, jax.sharding.Mesh, dict[str, programs.Program]]:
    """The model on one device, and the programs of its run."""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = RandomModel(**vars(architecture.abstract_model(config, setting.sizes, mesh)))
    return model, mesh, {program.name: program for program in programs.run_programs(config, model, mesh)}


def measure_train(setting: Setting, rows: int, kernel: str, remat: str = "full") -> dict[str, Any]:
    """One update: both roles' forward passes, DPSW, forward KL, gradients and AdamW."""
    config = setting.config(rows, kernel, remat)
    model, mesh, known = make(setting, config)
    accumulate, row = compile_program(known["train"])
    update, _ = compile_program(known["update"])
    optimize, _ = optimizer.make_optimizer(config.optimizer, config.train.steps)
    state, frozen = train_step.initial_state(model, mesh, optimize, train_step.kept_teacher(config), config.seed)
    columns = (random_ids(model, rows, width) for width in (setting.student, setting.teacher, setting.response))
    shape = pack_shape(config, model, mesh)
    (pack,) = packing.pack(packing.TrainBatch(*itertools.chain(*columns)), shape)
    programs_of_step = train_step.TrainStep(config, model, mesh, optimize, shape)

    def step() -> Any:
        nonlocal state
        placed = sharding.put_batch(mesh, pack)
        inputs = state.params, state.teacher_params, frozen, state.step
        state, scalars = update(state, accumulate(*inputs, programs_of_step.zeros(), placed))
        return state, scalars

    row |= timing(step)
    _, scalars = step()
    tokens = rows * (setting.student + setting.teacher + 2 * setting.response)
    flops, repeated = (train_flops(setting, rows, kept) for kept in ("none", remat))
    row |= {"loss": float(scalars["loss"]), "tokens": tokens, "tokens_per_second": tokens / row["seconds"]}
    row |= {
        "flops": flops,
        "repeated_flops": repeated,
        "response_tokens_per_second": rows * setting.response / row["seconds"],
    }
    if spec := device_spec():
        row["mfu"] = flops / row["seconds"] / spec.flops
        row["hfu"] = repeated / row["seconds"] / spec.flops
        row |= estimate(accumulate, repeated, known["train"].while_trips, spec)
    return row


def measure_decode(setting: Setting, rows: int, kernel: str, stored: str = "float") -> dict[str, Any]:
    """Responses of a whole batch; its prefill alone, by the same program with no row active."""
    config = setting.config(rows, kernel, stored=stored)
    model, mesh, known = make(setting, config)
    program = known["rollout"]
    compiled, row = compile_program(program)
    weights = rollout.reshard(model.params(mesh), model.dtype, rollout.layout(model, mesh, stored))
    rest = *random_ids(model, rows, setting.student), np.arange(rows, dtype=np.uint32)
    prompts = sharding.put_batch(mesh, rest)
    all_rows, no_row = (sharding.put_batch(mesh, np.full(rows, active)) for active in (True, False))
    key = sharding.put_replicated(mesh, jax.device_get(jax.random.key_data(jax.random.key(0))))

    row |= timing(lambda: compiled(weights, *prompts, all_rows, key))
    prefill = timing(lambda: compiled(weights, *prompts, no_row, key))["seconds"]
    per_token = (row["seconds"] - prefill) / (setting.response - 1)
    row |= {"prefill_seconds": prefill, "seconds_per_token": per_token, "tokens_per_second": rows / per_token}
    row |= {"response_tokens_per_second": rows * setting.response / row["seconds"]}
    read = decode_bytes(model, mesh, rows, setting.student + setting.response // 2, stored)
    row["bytes_per_token"] = read
    if spec := device_spec():
        row["hbm_share"] = read / spec.hbm_bandwidth / per_token
        flops = count_flops(make(setting, setting.config(rows, "xla"))[2]["rollout"].trace().jaxpr, program.while_trips)
        row |= estimate(compiled, flops, program.while_trips, spec)
    return row


def measure_stacked(setting: Setting, rows: int, kernel: str) -> dict[str, Any]:
    """`measure_decode`, as rollouts decode on TPUs."""
    before, rollout.UNSTACKED = rollout.UNSTACKED, ()
    try:
        return measure_decode(setting, rows, kernel)
    finally:
        rollout.UNSTACKED = before


def compile_program(program: programs.Program) -> tuple[Any, dict[str, Any]]:
    """The program compiled, and what compiling it took and gave."""
    start = time.perf_counter()
    compiled = program.trace().lower().compile()
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    return compiled, {"compile_seconds": seconds, "program_bytes": memory.peak_memory_in_bytes}


def random_ids(model: RandomModel, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(token ids [rows, width], their lengths); 0 ends a response in a plan's programs, and is not among them."""
    ids = np.random.default_rng(width).integers(1, model.config.vocab_size, (rows, width), np.int32)
    return ids, np.full(rows, width, np.int32)


def timing(run: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of RUNS runs after one, and their median."""
    seconds = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "first_seconds": seconds[0], "runs": seconds[1:]}


@functools.cache
def train_flops(setting: Setting, rows: int, remat: str) -> int:
    """Of an update, as XLA's attention computes it: other kernels' products are not in a jaxpr."""
    program = make(setting, setting.config(rows, "xla", remat))[2]["train"]
    return count_flops(program.trace().jaxpr, program.while_trips)


def decode_bytes(model: RandomModel, mesh: jax.sharding.Mesh, rows: int, context: int, stored: str) -> int:
    """Bytes that one more token of every row must read: the weights, and the cache of `context` tokens of each row."""
    weights, c = dict(rollout.abstract_params(model, mesh, stored)), model.config
    if not c.tied_embeddings:
        del weights["embedding"]  # of which it reads only a row for each token
    cached = 2 * c.layers * c.kv_heads * c.head_dim * jnp.dtype(model.dtype).itemsize
    return programs.bytes_per_device(weights) + rows * context * cached


def device_spec() -> hardware.DeviceSpec | None:
    gpu = hardware.find_gpu(jax.devices()[0].device_kind)
    return gpu.device if gpu else None


def estimate(compiled: Any, flops: float, trips: int | None, spec: hardware.DeviceSpec) -> dict[str, Any]:
    """The plan's lower bound of the seconds; why there is none, where the reader of HLO does not know this program."""
    try:
        traffic = hbm_traffic(HloModule(compiled.as_text(), trips))
    except Exception as error:  # of a reader that must not cost a measurement
        return {"estimate_error": first_line(error)}
    seconds = {"compute": flops / spec.flops, "hbm": traffic / spec.hbm_bandwidth}
    return {"estimate": max(seconds.values()), "estimate_by": seconds}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:500]


def measure_int8(setting: Setting, rows: int, kernel: str) -> dict[str, Any]:
    """`measure_decode` with int8 weights."""
    return measure_decode(setting, rows, kernel, stored="int8")


def measure_dots(setting: Setting, rows: int, kernel: str) -> dict[str, Any]:
    """`measure_train` without repeated matrix products."""
    return measure_train(setting, rows, kernel, remat="dots")


MEASURES = {
    "train": measure_train,
    "dots": measure_dots,
    "decode": measure_decode,
    "int8": measure_int8,
    "stacked": measure_stacked,
}


class Results:
    """DIR/gpu.jsonl, and the same on the terminal."""

    def __init__(self, directory: pathlib.Path, until: float):
        self.file, self.until = directory / "gpu.jsonl", until

    def write(self, row: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(" ".join(described(row)), flush=True)

    def part(self, name: str, what: str, kernels: Sequence[str], rows: int) -> dict[str, Any] | None:
        """Measures a part with the first of `kernels` that runs; None if none does or time is up."""
        for kernel in kernels:
            tried = rows
            while tried:
                about = {"model": name, "part": what, "attention": kernel, "rows": tried}
                if self.until - time.time() < NEEDED_SECONDS:
                    self.write(about | {"skipped": f"less than {NEEDED_SECONDS:.0f} s of --seconds are left"})
                    return None
                try:
                    row = about | MEASURES[what](SETTINGS[name], tried, kernel)
                    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
                    self.write(row | {"process_peak_bytes": peak})
                    return row
                except Exception as error:  # a kernel that is refused, memory: the other parts go on
                    self.write(about | {"error": first_line(error)})
                    tried = tried // 2 if "RESOURCE_EXHAUSTED" in str(error) else 0
        return None


def described(row: dict[str, Any]) -> Iterator[str]:
    """A line for the terminal."""
    yield " ".join(str(row[key]) for key in ("model", "part", "attention") if key in row)
    units = {"rows": "d", "seconds": ".4g", "seconds_per_token": ".3g", "estimate": ".3g", "tokens_per_second": ",.0f"}
    units |= {"mfu": ".1%", "hfu": ".1%", "hbm_share": ".1%", "compile_seconds": ".1f", "loss": ".4f"}
    yield from (f"{key}={row[key]:{unit}}" for key, unit in units.items() if key in row)
    yield from (f"{key}={row[key] / 1e9:.2f}GB" for key in ("program_bytes", "process_peak_bytes") if row.get(key))
    yield from (
        f"{key}: {row[key]}" for key in ("device", "faster", "skipped", "error", "estimate_error") if key in row
    )


def measure_model(name: str, parts: Sequence[str], results: Results) -> None:
    """The parts of a model; of the smaller one, training with each kernel."""
    device, rows = jax.devices()[0], SETTINGS[name].rows
    kernels = ("cudnn", "xla") if device.platform == "gpu" else ("xla",)
    set_here = {key: os.environ[key] for key in ("XLA_FLAGS", "JAX_OPTIMIZATION_LEVEL") if key in os.environ}
    versions = {"jax": jax.__version__, "jaxlib": jax.lib.__version__, "environment": set_here}
    results.write({"model": name, "part": "device", "device": device.device_kind} | versions)
    if "train" in parts and SETTINGS[name].rank:
        results.part(name, "train", kernels, rows)
    elif "train" in parts:
        trained = {kernel: results.part(name, "train", (kernel,), rows) for kernel in reversed(kernels)}
        rates = {kernel: row["tokens_per_second"] for kernel, row in trained.items() if row}
        faster = max(rates, key=rates.__getitem__, default=None)
        results.write({"model": name, "part": "attention", "faster": faster, "tokens_per_second_of": rates})
        kernels = (faster,) if faster else kernels
    for what in [part for part in parts if part != "train"]:
        results.part(name, what, kernels, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="no part begins in the last 40 of them")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory of gpu.jsonl")
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=["1b", "7b"])
    parser.add_argument("--parts", nargs="+", choices=MEASURES, default=[*MEASURES])
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of a model's own process, seconds since 1970
    arguments = parser.parse_args()
    if arguments.until:
        return measure_model(*arguments.models, arguments.parts, Results(arguments.out, arguments.until))

    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gpu.jsonl").unlink(missing_ok=True)
    until = time.time() + arguments.seconds
    for name in arguments.models:
        flags = ("--out", str(arguments.out), "--models", name, "--until", str(until), "--parts", *arguments.parts)
        code = subprocess.run([sys.executable, __file__, *flags]).returncode
        if code:
            error = f"the process ended with {code}"
            Results(arguments.out, until).write({"model": name, "part": "process", "error": error})


if __name__ == "__main__":
    main()
