"""Generation, a distillation step and a TPU program of msd_jax and of its JAX peers, in one run on this machine.

    pip install -e '.[plan]'
    python benchmarks/peers.py --model HF_DIR --queries QUERIES.csv --cache DIR [--json FILE]

Each peer is installed under --cache, in a virtual environment of its own, with the versions below. A peer that cannot
be installed or run here is skipped; the table says why. TRL's trainer is compared in benchmarks/step.py.

- generation: the first --rows prompts, as one batch, continued greedily in float32 by exactly --tokens tokens each (no
  token stops one), so that nothing is gained by refilling rows. `identical` is the share of tokens that are msd_jax's.
- training: one update of the distillation from the teacher's prompts to the student's, on --batch of these responses:
  forward KL over the whole vocabulary to a frozen copy, AdamW, float32. `KL` is the mean per token before the update,
  which must be msd_jax's. Tunix's trainer keeps all activations, which is its default; msd_jax follows
  configs/smollm2.py, but without DPSW's weights.
- tpu: one training step of Qwen2.5-7B on 256 sequences of 1,024 tokens, with cross-entropy on each, by XLA's TPU
  compiler for v5e:8x8: weights and AdamW in float32, products in bfloat16, remat `full`. No TPU takes part: received
  bytes, HBM traffic and peak memory, all per chip, are read from the compiled programs by msd_jax/planning.

Each round runs one process of each; seconds, by the clock and by CPU time, are medians over the calls of all rounds,
after two calls that compile. On a machine that does other work meanwhile, CPU time is the better measure.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

TOPOLOGY, SEQUENCES, LENGTH = "v5e:8x8", 256, 1024
MESHES = ((16, 4), (32, 2))  # fsdp x tensor
ROLES = ("student", "teacher")
WARM_UP = 2  # Tunix's trainer compiles in its second step as well


@dataclasses.dataclass(frozen=True)
class Venv:
    """What a peer is installed with.

    Attributes:
      python: the least version that it takes.
      packages: for pip; `libtpu` in this environment's version, so that all programs have the same compiler.
    """

    python: tuple[int, int]
    packages: tuple[str, ...]


VENVS = {
    "Tunix": Venv((3, 11), ("google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8")),
    "MaxText": Venv((3, 12), ("maxtext[tpu]==0.2.5", "jax==0.11.2", "flax==0.12.12", "libtpu")),
}

# Part -> peer -> why it is not measured: as seen, with no more than this tried.
UNUSABLE = {
    "generation": {
        "EasyDeL": "not run here: 0.3.0 loads the model (with torch and pillow, which it does not require), but 8 "
        "prompts and 16 tokens had no result after 10 minutes on two busy cores"
    }
}


class Skipped(Exception):
    """Why a peer is not measured."""


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def find_python(least: tuple[int, int]) -> str:
    """An interpreter of that version or later. Raises Skipped where there is none."""
    names = [f"python3.{minor}" for minor in range(least[1], 15)]
    for python in [sys.executable, *filter(None, map(shutil.which, names))]:
        check = f"import sys, venv; sys.exit(sys.version_info < {least})"
        if subprocess.run([python, "-c", check], capture_output=True).returncode == 0:
            return python
    raise Skipped(f"needs Python {least[0]}.{least[1]} or later, which is not on PATH")


def install(cache: pathlib.Path, peer: str) -> str:
    """The interpreter of the peer's virtual environment, made where it is missing. Raises Skipped where pip fails."""
    folder, venv = cache / peer.lower(), VENVS[peer]
    python, done = folder / "bin" / "python", folder / "packages.txt"
    packages = list(venv.packages)
    if "libtpu" in packages:
        try:
            packages[packages.index("libtpu")] += "==" + importlib.metadata.version("libtpu")
        except importlib.metadata.PackageNotFoundError:
            raise Skipped("libtpu is not installed: pip install 'msd-jax[plan]'") from None
    if done.exists() and done.read_text(encoding="utf-8").split() == packages:
        return str(python)
    print(f"installing {' '.join(packages)}", file=sys.stderr)
    for command in (
        [find_python(venv.python), "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", *packages],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise Skipped(f"not installed: {last_line(result.stderr)}")
    done.write_text("\n".join(packages) + "\n", encoding="utf-8")
    return str(python)


def calls(call: Callable[[], Any], count: int) -> tuple[Any, dict[str, Any]]:
    """What the first call gives; the seconds of `count` calls after those that compile, and of compiling."""
    results, wall, cpu = [], [], []
    for _ in range(WARM_UP + count):
        start, cpu_start = time.perf_counter(), time.process_time()
        results.append(call())
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = wall[WARM_UP:]
    compiling = max(0.0, sum(wall[:WARM_UP]) - WARM_UP * min(seconds))
    figures = {"seconds": seconds, "cpu_seconds": cpu[WARM_UP:], "compile_seconds": compiling, "peak_bytes": peak}
    return results[0], figures


def left_padded(rows: list[list[int]], pad: int) -> list[list[int]]:
    width = max(map(len, rows))
    return [[pad] * (width - len(row)) + row for row in rows]


def our_config(task: dict[str, Any]):
    import ml_collections
    from msd_jax.configs import smollm2

    config = smollm2.get_config()
    config.model.path, config.data.path = task["model"], task["queries"]
    config.data.languages = ml_collections.ConfigDict({task["language"]: 1.0})
    config.data.batch_size, config.rollout.max_new_tokens = task["batch"], task["tokens"]
    config.train.response_tokens = task["tokens"]
    config.loss.divergence, config.loss.weighting = "forward_kl", "uniform"
    return ml_collections.FrozenConfigDict(config)


def our_prompts(task: dict[str, Any]) -> dict[str, Any]:
    """The prompts of both roles, and a token that is in none of them, for padding and as a stop token."""
    from msd_jax.training import run

    inputs = run.read(our_config(task))
    examples = inputs.examples[: task["rows"]]
    rows = {role: [getattr(example, f"{role}_ids").tolist() for example in examples] for role in ROLES}
    used = {token for prompts in rows.values() for prompt in prompts for token in prompt}
    return rows | {"pad": max(set(range(inputs.model.config.vocab_size)) - used)}


def our_generation(task: dict[str, Any]) -> dict[str, Any]:
    import jax
    import numpy as np

    from msd_jax.generation import rollout
    from msd_jax.models import pretrained
    from msd_jax.parallel import sharding

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = pretrained.load(task["model"], dtype="float32", param_dtype="float32", remat="none", mesh=mesh)
    params = rollout.reshard(model.params(mesh), model.dtype, model.shardings(mesh, sharding.ROLLOUT))
    prompts = [np.array(prompt, np.int32) for prompt in task["student"]]
    sampling = rollout.Sampling(task["tokens"], temperature=0.0)
    generator = rollout.Generator(model.graphdef, mesh, sampling, (task["pad"],), task["pad"])
    limit = max(map(len, prompts))
    written, figures = calls(lambda: generator.write(params, prompts, len(prompts), limit), task["repeats"])
    return figures | {"tokens": written.response_BxR.tolist()}


def our_training(task: dict[str, Any]) -> dict[str, Any]:
    import jax
    import numpy as np

    from msd_jax.models import pretrained
    from msd_jax.parallel import host_memory, sharding
    from msd_jax.training import optimizer, packing, run, train_step

    host_memory.give_back_after_compilations()
    config, mesh = our_config(task), sharding.make_mesh(devices=jax.devices()[:1])
    inputs = run.read(config)
    model: pretrained.Pretrained = inputs.model.on(mesh)
    optimize, _ = optimizer.make_optimizer(config.optimizer, config.train.steps)
    shape = run.pack_shape(config, model, mesh, inputs.examples)
    step = train_step.TrainStep(config, model, mesh, optimize, shape)
    state, frozen = train_step.initial_state(inputs.model, mesh, optimize, "frozen", config.seed)
    responses = np.array(task["responses"], np.int32)
    prompts: dict[str, np.ndarray] = {}
    for role in ROLES:
        rows = task[role][: task["batch"]]
        prompts[f"{role}_prompt_BxP"] = np.array(left_padded(rows, task["pad"]), np.int32)
        prompts[f"{role}_length_B"] = np.array([len(row) for row in rows], np.int32)
    lengths = np.full(len(responses), responses.shape[1], np.int32)
    batch = packing.TrainBatch(**prompts, response_BxR=responses, response_length_B=lengths)

    def update() -> float:
        nonlocal state
        state, scalars = step(state, frozen, packing.pack(batch, shape))
        jax.block_until_ready(state)
        return float(scalars["kl"])

    kl, figures = calls(update, task["repeats"])
    return figures | {"kl": kl}


def tunix_model(task: dict[str, Any]) -> tuple[Any, Any]:
    """Tunix's Llama with the weights of the directory, and its sizes."""
    import jax.numpy as jnp
    from tunix.models.llama3 import model, params

    sizes = json.loads((pathlib.Path(task["model"]) / "config.json").read_text(encoding="utf-8"))
    rope = sizes.get("rope_parameters") or sizes
    # 0.1.7 rotates by its default base, whatever rope_theta is.
    model.apply_rope = functools.partial(model.apply_rope, rope_theta=rope["rope_theta"])
    config = model.ModelConfig(
        num_layers=sizes["num_hidden_layers"],
        vocab_size=sizes["vocab_size"],
        embed_dim=sizes["hidden_size"],
        hidden_dim=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        head_dim=sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        rope_theta=rope["rope_theta"],
        norm_eps=sizes["rms_norm_eps"],
        weight_tying=sizes["tie_word_embeddings"],
    )
    return params.create_model_from_safe_tensors(task["model"], config, dtype=jnp.float32), config


def tunix_generation(task: dict[str, Any]) -> dict[str, Any]:
    from tunix.generate import sampler

    class Numbers:
        """A tokenizer whose texts are the numbers of the prompts, since these are tokens already."""

        def encode(self, text: str) -> list[int]:
            return task["student"][int(text)]

        def decode(self, ids: list[int]) -> str:
            return ""

        def bos_id(self) -> int:
            return 0  # none is added

        def eos_id(self) -> int:
            return task["pad"]

        pad_id = eos_id

    model, config = tunix_model(task)
    limit = max(map(len, task["student"]))
    cache = sampler.CacheConfig(limit + task["tokens"], config.num_layers, config.num_kv_heads, config.head_dim)
    generator, texts = sampler.Sampler(model, Numbers(), cache), [str(i) for i in range(len(task["student"]))]
    written, figures = calls(lambda: generator(texts, task["tokens"], max_prompt_length=limit), task["repeats"])
    return figures | {"tokens": [row.tolist() for row in written.tokens]}


def tunix_training(task: dict[str, Any]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from tunix.distillation import distillation_trainer, strategies

    (student, _), (teacher, _) = tunix_model(task), tunix_model(task)
    responses = np.array(task["responses"], np.int32)
    padded = {role: np.array(left_padded(task[role][: task["batch"]], task["pad"]), np.int32) for role in ROLES}
    tokens = {role: np.concatenate([padded[role], responses[:, :-1]], axis=1) for role in ROLES}
    masks = {
        role: np.concatenate([padded[role] != task["pad"], np.ones_like(responses[:, :-1], bool)], axis=1)
        for role in ROLES
    }

    def logits(role: str) -> Callable[..., Any]:
        def forward(model: nnx.Module, tokens: dict[str, Any], masks: dict[str, Any]) -> Any:
            mask = masks[role]
            positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
            attends = mask[:, None, :] & jnp.tril(jnp.ones((mask.shape[1],) * 2, bool))
            return model(tokens[role], positions, None, attends)[0][:, -responses.shape[1] :]

        return forward

    def labels(tokens: dict[str, Any], masks: dict[str, Any]) -> Any:  # of a task loss, whose share is 0
        return jax.nn.one_hot(responses, student.config.vocab_size)

    strategy = strategies.LogitStrategy(logits("student"), logits("teacher"), labels, temperature=1.0, alpha=1.0)
    config = distillation_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=None)
    trainer = distillation_trainer.DistillationTrainer(student, teacher, strategy, optax.adamw(2e-5), config)
    trainer.with_gen_model_input_fn(lambda batch: {"tokens": batch.input_tokens, "masks": batch.input_mask})
    losses: list[float] = []
    trainer._post_process_train_step = lambda aux: losses.append(float(aux["distill/kl_div"]))
    trainer.is_managed_externally = True  # or each call of `train` closes it
    batch = distillation_trainer.TrainingInput(tokens, masks)

    def update() -> float:
        trainer.train([batch])
        jax.block_until_ready(nnx.state(student))
        return losses[0]

    kl, figures = calls(update, task["repeats"])
    return figures | {"kl": kl}


def our_tpu(task: dict[str, Any]) -> dict[str, Any]:
    """The programs of a step without a teacher, `train` and `update`."""
    import jax
    import ml_collections
    from msd_jax.configs import qwen2_5_7b

    from msd_jax.planning import architecture, compiled, pod, programs

    jax.config.update("jax_enable_compilation_cache", False)
    config = qwen2_5_7b.get_config()
    config.update_from_flattened_dict(
        {
            "rollout.policy": "reference",
            "loss.divergence": "cross_entropy",
            "loss.weighting": "uniform",
            "prompts.student_limit": 1,  # all but one token are the response's
            "rollout.max_new_tokens": LENGTH,
            "data.batch_size": SEQUENCES,
            "train.micro_batches": 1,
            "model.remat": "full",
        }
    )
    fsdp, tensor = task["mesh"]
    config, slice_ = pod.make_pod(ml_collections.FrozenConfigDict(config), TOPOLOGY, f"1,{fsdp},{tensor}")
    sizes, _ = architecture.read_sizes(config.model.path)
    model = architecture.abstract_model(config, sizes, slice_.mesh)
    step = {}
    for program in programs.run_programs(config, model, slice_.mesh):
        if program.name in ("train", "update"):
            step[program.name] = compiled.compile_program(program, slice_)
    return {
        "received_bytes": sum(sum(program.collective_bytes.values()) for program in step.values()),
        "traffic_bytes": sum(program.hbm_traffic_bytes for program in step.values()),
        "peak_bytes": max(program.total_hbm_bytes for program in step.values()),
        "compile_seconds": sum(program.compile_seconds for program in step.values()),
    }


def maxtext_tpu(task: dict[str, Any]) -> dict[str, Any]:
    """MaxText compiles its step in its own environment; this one reads what the compiler has written."""
    from msd_jax.planning import collectives, compiled, hbm_traffic, hlo, pod

    fsdp, tensor = task["mesh"]
    where = "import maxtext; print(maxtext.__path__[0])"
    package = subprocess.run([task["python"], "-c", where], stdout=subprocess.PIPE, text=True, check=True).stdout
    environment = dict(os.environ) | pod._QUIET | {"JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # libtpu ends the process on flags of other backends
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "compile_topology": "v5e-64",
            "compile_topology_num_slices": 1,
            "model_name": "qwen2.5-7b",
            "per_device_batch_size": SEQUENCES // (fsdp * tensor),
            "max_target_length": LENGTH,
            "ici_fsdp_parallelism": fsdp,
            "ici_tensor_parallelism": tensor,
            "allow_split_physical_axes": "true",  # or no mesh of these sizes fits 8 x 8 chips
            "remat_policy": "full",
            "dtype": "bfloat16",
            "weight_dtype": "float32",
            "enable_checkpointing": "false",
            "run_name": "peers",
            "base_output_directory": f"{folder}/out",
            "compile_xla_flags": f"--xla_dump_to={folder}/dump",
        }
        command = [task["python"], "-m", "maxtext.trainers.pre_train.train_compile"]
        command += [f"{package.splitlines()[-1]}/configs/base.yml", *(f"{key}={v}" for key, v in settings.items())]
        start = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode:
            sys.exit(last_line(result.stderr))
        seconds, text = time.perf_counter() - start, compiled.read_dump(f"{folder}/dump", "after_optimizations.txt")
    module = hlo.HloModule(text)
    sizes = {key: int(size) for key, size in re.findall(r"(\w+)_size_in_bytes=(\d+)", result.stdout)}
    return {
        "received_bytes": sum(collective.bytes for collective in collectives.find_collectives(module)),
        "traffic_bytes": hbm_traffic.hbm_traffic(module),
        "peak_bytes": sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"],
        "compile_seconds": seconds,
    }


# Part -> peer -> what measures it; the first of a part is compared with the others.
PARTS: dict[str, dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "generation": {"msd_jax": our_generation, "Tunix": tunix_generation},
    "training": {"msd_jax": our_training, "Tunix": tunix_training},
    "tpu": {"msd_jax": our_tpu, "MaxText": maxtext_tpu},
}


def measure(part: str, peer: str, task: dict[str, Any]) -> dict[str, Any]:
    """Runs `PARTS[part][peer]` in a process of its own, in the peer's environment. Raises Skipped where it fails."""
    python = sys.executable
    if peer in VENVS:
        task = task | {"python": install(pathlib.Path(task["cache"]), peer)}
        python = python if peer == "MaxText" else task["python"]
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "task.json"
        file.write_text(json.dumps(task), encoding="utf-8")
        command = [python, str(pathlib.Path(__file__).resolve()), "--only", part, peer, str(file)]
        environment = dict(os.environ) | {"JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            output, errors = process.communicate(timeout=task["timeout"])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # MaxText's compiler is a process of its own
            process.communicate()
            raise Skipped(f"no result within {task['timeout']} s") from None
    if process.returncode:
        print(errors, file=sys.stderr)
        raise Skipped(last_line(errors))
    return json.loads(output.splitlines()[-1])


def run_part(part: str, peers: list[str], task: dict[str, Any], rounds: int) -> dict[str, Any]:
    """{peer: its figures, or {"skipped": why}}; the peers take turns."""
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
    skipped: dict[str, str] = {}
    for _ in range(rounds):
        for peer, results in runs.items():
            if peer in skipped:
                continue
            try:
                results.append(measure(part, peer, task))
            except Skipped as reason:
                skipped[peer] = str(reason)
                continue
            shown = {key: value for key, value in results[-1].items() if key != "tokens"}
            print(f"{part}, {peer}: {json.dumps(shown)}", file=sys.stderr)
    rows = {peer: summary(results) for peer, results in runs.items() if peer not in skipped}
    ours = rows.get("msd_jax", {})
    for row in rows.values():
        if "seconds" in row and "seconds" in ours:
            row["ratio"] = row["seconds"] / ours["seconds"]
            row["cpu_ratio"] = row["cpu_seconds"] / ours["cpu_seconds"]
        if "tokens" in row and "tokens" in ours:
            row["identical"] = identical(ours["tokens"], row["tokens"])
    return rows | {peer: {"skipped": reason} for peer, reason in (skipped | UNUSABLE.get(part, {})).items()}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    row = dict(results[0])
    row["compile_seconds"] = statistics.median(result["compile_seconds"] for result in results)
    row["peak_bytes"] = max(result["peak_bytes"] for result in results)
    if "seconds" in row:
        runs = [seconds for result in results for seconds in result["seconds"]]
        cpu = [seconds for result in results for seconds in result["cpu_seconds"]]
        row |= {"seconds": statistics.median(runs), "fastest": min(runs), "slowest": max(runs), "calls": len(runs)}
        row["cpu_seconds"] = statistics.median(cpu)
    return row


def identical(ours: list[list[int]], others: list[list[int]]) -> float:
    """The share of our tokens that the other has at the same place."""
    pairs = [(token, other[i : i + 1]) for row, other in zip(ours, others) for i, token in enumerate(row)]
    return sum([token] == other for token, other in pairs) / sum(map(len, ours))


def show(part: str, rows: dict[str, Any], task: dict[str, Any]) -> None:
    print(f"\n{part}" + (f", fsdp {task['mesh'][0]} x tensor {task['mesh'][1]}" if part == "tpu" else ""))
    ours = rows.get("msd_jax", {})
    for peer, row in rows.items():
        if "skipped" in row:
            print(f"  {peer:<9}skipped: {row['skipped']}")
            continue
        cells = []
        if part == "tpu":
            for key, name in (("received_bytes", "received"), ("traffic_bytes", "of HBM traffic")):
                share = f" ({row[key] / ours[key]:.2f} x msd_jax's)" if row is not ours and key in ours else ""
                cells.append(f"{row[key] / 1e9:.1f} GB {name}{share}")
            cells.append(f"peak {row['peak_bytes'] / 2**30:.1f} GiB")
        else:
            cells.append(f"{row['seconds']:.2f} s ({row['fastest']:.2f} to {row['slowest']:.2f}, {row['calls']} calls)")
            cells.append(f"{row['cpu_seconds']:.2f} s of CPU")
            cells += [f"{row['ratio']:.2f} and {row['cpu_ratio']:.2f} x msd_jax's"] if "ratio" in row else []
            cells += [f"{len(row['tokens']) * task['tokens'] / row['seconds']:.0f} tokens/s"] if "tokens" in row else []
            cells += [f"{row['identical']:.1%} identical"] if "identical" in row else []
            cells += [f"KL {row['kl']:.6f}"] if "kl" in row else []
            cells.append(f"peak {row['peak_bytes'] / 1e9:.1f} GB")
        print(f"  {peer:<9}" + ", ".join(cells) + f", compiling {row['compile_seconds']:.0f} s")


def main() -> None:
    if sys.argv[1:2] == ["--only"]:
        part, peer, file = sys.argv[2:]
        task = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
        print(json.dumps(PARTS[part][peer](task)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face directory of a Llama; not needed for the part tpu")
    parser.add_argument("--queries", help="query file with columns of the language and en; likewise")
    parser.add_argument("--cache", required=True, type=pathlib.Path, help="where peers are installed")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--without", nargs="*", choices=VENVS, default=[], help="peers that are left out")
    parser.add_argument("--language", default="sw")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="timed calls of each process")
    parser.add_argument("--timeout", type=int, default=1200, help="seconds that a process may take")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    local = [part for part in ("generation", "training") if part in arguments.parts]
    if local and not (arguments.model and arguments.queries):
        parser.error(f"--model and --queries are needed for {' and '.join(local)}")
    arguments.cache.mkdir(parents=True, exist_ok=True)
    table = compare(arguments, local)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def compare(arguments: argparse.Namespace, local: list[str]) -> dict[str, Any]:
    """Measures and prints part by part."""
    table: dict[str, Any] = {}
    task = {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in vars(arguments).items()}
    peers = {part: [peer for peer in PARTS[part] if peer not in arguments.without] for part in PARTS}
    if local:
        task |= our_prompts(task)
        # Training takes its responses from here.
        named = peers["generation"] if "generation" in local else ["msd_jax"]
        rows = run_part("generation", named, task, arguments.rounds if "generation" in local else 1)
        if "skipped" in rows["msd_jax"]:
            sys.exit(f"msd_jax failed: {rows['msd_jax']['skipped']}")
        task["responses"] = rows["msd_jax"]["tokens"][: arguments.batch]
        if "generation" in local:
            table["generation"] = rows
            show("generation", rows, task)
    if "training" in local:
        table["training"] = run_part("training", peers["training"], task, arguments.rounds)
        show("training", table["training"], task)
    for mesh in MESHES if "tpu" in arguments.parts else ():
        rows = table["tpu {} x {}".format(*mesh)] = run_part("tpu", peers["tpu"], task | {"mesh": mesh}, 1)
        show("tpu", rows, task | {"mesh": mesh})
    return table


if __name__ == "__main__":
    main()
