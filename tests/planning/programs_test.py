"""The plan: what it compiles, its verdict and its errors; with libtpu, real plans for small slices."""

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from msd_jax.models import config as model_config
from msd_jax.models import decoder
from msd_jax.parallel import sharding
from msd_jax.planning import chips, hlo, programs, search, table, topology
from tests.conftest import REPOSITORY

GIB = 2**30
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'msd-jax[plan]'"
)


def recipe(name, *variant, **values):
    config = importlib.import_module(f"msd_jax.configs.{name}").get_config(*variant)
    config.update_from_flattened_dict(values)
    return ml_collections.FrozenConfigDict(config)


@pytest.fixture
def smoke(model_dir, tmp_path, monkeypatch):
    """A recipe's smoke variant, on a model whose axes divide by two."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda **values: recipe("qwen2_5_7b", "smoke", **{"model.path": str(model_dir)} | values)


# --- Sizes of models that are not here ---

# As the checkpoints' own index files have it.
PARAMETERS = {
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "google/gemma-3-1b-it": 999_885_952,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


@pytest.mark.parametrize("path", PARAMETERS)
def test_published_sizes_give_the_published_number_of_parameters(path):
    sizes, source = programs.read_architecture(path)
    _, abstract, _ = decoder.abstract(sizes)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == PARAMETERS[path]
    assert "published" in source


@pytest.mark.parametrize("name", ["qwen2_5_7b", "qwen3_8b", "llama2_7b", "llama3_8b", "gemma3_1b", "smollm2"])
def test_the_sizes_of_every_recipe_are_here(name):
    assert recipe(name).model.path in PARAMETERS


def test_a_directory_comes_before_published_sizes(model_dir):
    sizes, source = programs.read_architecture(str(model_dir))
    assert sizes == model_config.read(model_dir)
    assert source == str(model_dir / "config.json")


def test_a_model_that_nobody_knows():
    with pytest.raises(FileNotFoundError, match=r"config.model.path='no/such-model' is no directory here.*config.json"):
        programs.read_architecture("no/such-model")


# --- What is compiled ---


def test_bytes_a_chip_follow_the_sharding():
    mesh = sharding.make_mesh(2, 2, 2)
    one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    split = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=one)
    whole = jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=sharding.replicated(mesh))
    assert programs.bytes_a_chip({"a": split, "b": [whole]}) == 4 * 3 * 4 + 3 * 2


@pytest.mark.parametrize(
    "values, names",
    [
        ({"eval.path": ""}, ["train", "relayout", "rollout"]),
        ({"eval.path": "", "rollout.policy": "off_policy"}, ["train", "relayout", "teacher rollout"]),
        ({"rollout.policy": "mixed"}, ["train", "relayout", "rollout", "teacher rollout", "evaluation"]),
    ],
)
def test_the_programs_of_a_run(smoke, values, names):
    config, mesh = smoke(**values), sharding.make_mesh(1, 4, 2)
    model = programs.build(config, programs.read_architecture(config.model.path)[0], mesh)
    assert [task.name for task in programs.tasks(config, model, mesh)] == names


def test_what_lies_beside_a_rollout_is_the_whole_train_state(smoke):
    config, mesh = smoke(), sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = programs.build(config, programs.read_architecture(config.model.path)[0], mesh)
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.abstract)) * 4
    # Matrices of a frozen teacher are in the compute dtype, bfloat16; the embedding and norms are not.
    wide = [leaf for name, leaf in model.abstract.items() if name in ("embedding", "final_norm")]
    wide += [leaf for name, leaf in model.abstract["layers"].items() if "norm" in name]
    teacher = weights / 2 + sum(leaf.size for leaf in wide) * 2
    counts = 3 * 4  # steps, skipped steps and the optimizer's own count
    beside = {task.name: task.beside for task in programs.tasks(config, model, mesh)}
    assert beside["train"] == 0  # its state is its argument
    held = 3 * weights + teacher  # the student, two moments and the teacher
    assert held + counts <= beside["rollout"] <= held + 2 * counts
    assert beside["relayout"] == beside["rollout"] - weights


@pytest.mark.parametrize("values", [{}, {"model.lora.rank": 4}, {"teacher.kind": "live"}])
def test_the_programs_lower_for_a_mesh_and_are_those_of_training(smoke, values):
    config, mesh = smoke(**values), sharding.make_mesh(1, 4, 2)
    model = programs.build(config, programs.read_architecture(config.model.path)[0], mesh)
    texts = {task.name: task.trace().lower().as_text() for task in programs.tasks(config, model, mesh)}
    assert "jit_train_step" in texts["train"]
    prompts, R = config.prompts, config.rollout.max_new_tokens
    for columns in (prompts.student_limit, prompts.teacher_limit, R):
        assert f"tensor<{config.data.batch_size}x{columns}xi32>" in texts["train"]
    assert f"tensor<{config.data.batch_size}x{R}xi32>" in texts["rollout"]


def test_a_batch_that_does_not_divide_is_refused(smoke):
    config, mesh = smoke(**{"train.micro_batches": 2}), sharding.make_mesh(1, 8, 1)
    model = programs.build(config, programs.read_architecture(config.model.path)[0], mesh)
    with pytest.raises(ValueError, match="gives 4 rows, which do not divide over 8 devices"):
        list(programs.tasks(config, model, mesh))


# --- Verdict ---

PROGRAM = programs.Program(
    peak_hbm_bytes=10 * GIB,
    resident_hbm_bytes=2 * GIB,
    fits=True,
    flops=1e12,
    hbm_traffic_bytes=10**12,
    collective_bytes={"all-gather": 10**9},
    dcn_bytes=0,
    seconds={"compute": 0.5, "hbm": 1.2, "ici": 0.1, "dcn": 0.0},
    compile_seconds=1.0,
    largest_buffers=((GIB, "f32[3]"),),
)


def test_the_estimate_is_what_takes_longest():
    assert (PROGRAM.seconds_estimate, PROGRAM.bound, PROGRAM.total_hbm_bytes) == (1.2, "hbm", 12 * GIB)
    programs = {"train": PROGRAM, "rollout": PROGRAM, "evaluation": PROGRAM}
    assert programs.step_seconds(programs) == pytest.approx(2.4)  # an evaluation is not part of a step


def test_needed_bytes_of_xlas_messages():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (23.59G) exceeds available HBM (15.75G). HLO module: jit__relayout."
    )
    assert programs.needed_bytes(message) == int(23.59 * GIB)
    older = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 980.5M of 15.75G hbm."
    assert programs.needed_bytes(older) == int(980.5 * 2**20)
    with pytest.raises(ValueError, match="XLA's TPU compiler failed: INTERNAL: what"):
        programs.needed_bytes("INTERNAL: what\nmore")


def test_the_largest_buffers_are_those_of_hbm():
    report = """
Memory Space: default (color=0)
Total bytes: 26172633600 (24.38GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    8.00GiB( 33%);    8.00GiB;            0;                1; f32[32768,65536]
   16.00GiB( 67%);   512.0MiB;   8589934592;                4; 2×s8[32768,65536], 2×f32[32768,65536]
   24.00GiB(100%);       512B;  25769836544;                1; (f32[8], s32[8])

Memory Space: vmem (color=1)
  999.00GiB( 99%);  999.00GiB;            0;                1; f32[9]
"""
    assert programs.parse_buffers(report) == (
        (8 * GIB, "f32[32768,65536]"),
        (GIB // 2, "f32[32768,65536], and 1 other shapes in its place"),
        (512, "f32[8], and 1 other shapes in its place"),
    )
    assert programs.parse_buffers("") == ()


def test_numbers_for_people():
    assert [table.si(x, "B") for x in (0, 1.834e12, 999, 42e3)] == ["0 B", "1.83 TB", "999 B", "42 kB"]
    assert table.si(0.0241, "s") == "24.1 ms" and table.si(5, "") == "5"
    assert table.gib(GIB * 3 // 2) == "1.50 GiB" and table.gib(2**20) == "1.00 MiB"


@pytest.fixture
def pod():
    return programs.Pod("v5e:2x4", 1, sharding.make_mesh(1, 4, 2))


def test_what_helps_depends_on_what_does_not_fit(smoke, pod):
    config = recipe("qwen2_5_7b", **{"data.batch_size": 64, "model.remat": "dots"})
    model = programs.build(config, programs.read_architecture(config.model.path)[0], pod.mesh)
    too_big = dataclasses.replace(PROGRAM, fits=False, peak_hbm_bytes=68 * GIB)

    lines = list(table.remedies(config, pod, {"train": too_big, "rollout": PROGRAM}, model))
    # 7.6 B parameters x 3 copies x 4 bytes and the teacher, but for 0.5 B in bfloat16, leave 3.21 of 15.75 GiB.
    assert any("the train state alone is 12.54 GiB" in line and "lora.rank=16" in line for line in lines)
    # 16 rows a chip take 55.46 GiB beside the state, one takes 3.47.
    assert not any("micro_batches" in line for line in lines)
    assert any("remat=full" in line for line in lines)
    assert not any("--mesh 1,-1,4" in line for line in lines)

    smaller = dataclasses.replace(too_big, peak_hbm_bytes=60 * GIB)  # 47.46 and 2.97 GiB
    lines = list(table.remedies(config, pod, {"train": smaller, "rollout": PROGRAM}, model))
    assert any("micro_batches=16: a chip's rows at once fall from 16 to 1" in line for line in lines)

    lines = list(table.remedies(config, pod, {"train": PROGRAM, "rollout": too_big}, model))
    assert any("--mesh 1,-1,4: while it generates each chip holds 7.09 GiB" in line for line in lines)
    assert not any("micro_batches" in line for line in lines)


def test_meshes_to_try_fill_the_pod(pod):
    tried = list(search.meshes(dataclasses.replace(pod, slices=2)))
    assert (2, 4, 1) in tried and (2, 1, 4) in tried
    assert all(data * fsdp * tensor == 8 and data % 2 == 0 for data, fsdp, tensor in tried)


def test_the_search_takes_the_fewest_micro_batches_that_fit_and_then_the_fastest(smoke, monkeypatch, capsys):
    """With a compiler that says: each row at once takes 5 GiB, a whole batch at once saves time, tensor costs it."""

    def compile_task(task, pod):
        if task.name != "train":
            return dataclasses.replace(PROGRAM, peak_hbm_bytes=GIB, resident_hbm_bytes=0, seconds={"hbm": 1.0})
        rows = 64 // setting["micro_batches"] // sharding.batch_shards(pod.mesh)
        peak = (5 * rows + (20 if setting["remat"] == "none" else 0)) * GIB
        seconds = setting["micro_batches"] + pod.mesh.shape["tensor"] + (setting["remat"] == "full")
        fits = peak <= pod.chip.hbm
        return dataclasses.replace(PROGRAM, peak_hbm_bytes=peak, fits=fits, seconds={"compute": seconds})

    setting = {}
    original = programs.tasks

    def tasks(config, model, mesh):
        setting.update(micro_batches=config.train.micro_batches, remat=config.model.remat)
        return original(config, model, mesh)

    monkeypatch.setattr(search, "compile_task", compile_task)
    monkeypatch.setattr(search, "tasks", tasks)
    config = smoke(**{"data.batch_size": 64, "eval.path": ""})
    sizes, _ = programs.read_architecture(config.model.path)
    best = search.search(config, sizes, programs.Pod("v5e:2x4", 1, sharding.make_mesh(1, 8, 1)))
    # 64 rows over 8 chips: 8, then 4, then 2 rows at once, 10 GiB; remat none does not fit, dots is faster than full.
    assert best.flags == "--mesh 1,8,1 --config.train.micro_batches=4 --config.model.remat=dots"
    assert best.fits and programs.step_seconds(best.programs) == 4 + 1 + 2
    assert "does not fit" in capsys.readouterr().out


# --- Where the pod comes from, and errors ---


def test_every_generation_has_its_figures():
    assert set(chips.CHIPS) == set(topology.GENERATIONS)
    for chip in chips.CHIPS.values():
        assert chip.flops / chip.bandwidth > 100 and chip.hbm > 15 * GIB  # FLOPs a byte; units are not mixed up


@pytest.fixture
def fake_slices(monkeypatch):
    monkeypatch.setattr(chips, "devices", lambda name, slices=1: jax.devices()[: topology.parse(name).chips * slices])


def test_flags_come_before_config_launch(fake_slices):
    config = recipe("gemma3_1b")
    config, pod = programs.make_pod(config, "", "")
    assert (pod.name, pod.slices, pod.devices) == ("v5e:2x4", 1, 8)
    config, pod = programs.make_pod(config, "v6e:2x2", "1,2,2")
    assert pod.name == "v6e:2x2" and dict(pod.mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 2}
    assert dict(config.mesh) == dict(pod.mesh.shape)


@pytest.mark.parametrize("mesh", ["4,2", "a,b,c", "1x2x4"])
def test_a_mesh_that_is_none(mesh, fake_slices):
    with pytest.raises(ValueError, match=r"--mesh=\S+: give data,fsdp,tensor"):
        programs.make_pod(recipe("gemma3_1b"), "", mesh)


def test_gpus_are_refused_in_plain_words(fake_slices):
    config = recipe("gemma3_1b", **{"launch.accelerator": "gpu"})
    with pytest.raises(ValueError, match=r"config.launch.accelerator='gpu': a plan compiles for TPUs only"):
        programs.make_pod(config, "", "")
    assert programs.make_pod(config, "v5e:2x4", "")[1].devices == 8


def test_without_libtpu_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'msd-jax\[plan\]'"):
        chips.devices("v5e:2x2")


# --- With XLA's TPU compiler ---


@pytest.fixture
def tpu_slice(monkeypatch):
    """chips.devices, which takes XLA_FLAGS away for good, with the flags put back afterwards."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    return chips.devices


def run_plan(*flags):
    command = [sys.executable, "-m", "msd_jax.plan", *flags]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


@needs_libtpu
def test_the_command_plans_for_a_slice(tmp_path):
    file = tmp_path / "plan.json"
    done = run_plan("--config=configs/qwen2_5_7b.py:smoke", "--topology=v5e:2x2", "--mesh=1,4,1", f"--json={file}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "FITS" in done.stdout
    result = json.loads(file.read_text())
    assert result["fits"] and result["devices"] == 4
    for name in ("train", "relayout", "rollout"):
        program = result["programs"][name]
        assert 0 < program["peak_hbm_bytes"] < GIB and program["fits"] and program["seconds_estimate"] > 0
        assert sum(program["collective_bytes"].values()) > 0
        assert program["largest_buffers"]


@needs_libtpu
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--topology=v5e:3x3"], "error: config.launch.topology='v5e:3x3'"),
        (["--topology=v9:2x2"], "error: config.launch.topology='v9:2x2'"),
        (["--json=no/such/file"], "error: --json=no/such/file: there is no directory no/such"),
        (["--topology=v5e:2x2", "--mesh=1,3,1"], "error: config.mesh=1x3x1 (data x fsdp x tensor) does not fit 4"),
    ],
)
def test_the_command_ends_with_one_line(flags, message):
    done = run_plan("--config=configs/qwen2_5_7b.py", *flags)
    assert done.returncode == 1
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1


@needs_libtpu
def test_what_does_not_fit_is_told_with_its_figures(tpu_slice):
    mesh = sharding.make_mesh(1, 4, 1, devices=tpu_slice("v5e:2x2"))
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.replicated(mesh))
        for shape in ((32 * 1024, 1024), (1024, 64 * 1024))
    ]

    def sort_twice(x, y):
        rows = jnp.sort(jnp.sin(x @ y), axis=0)
        return (rows + jnp.sort(rows, axis=1)).sum(axis=-1)

    task = programs.Task("big", lambda: jax.jit(sort_twice).trace(*shapes), beside=GIB)
    program = programs.compile_task(task, programs.Pod("v5e:2x2", 1, mesh))
    assert not program.fits
    assert 16 * GIB < program.peak_hbm_bytes < 40 * GIB  # at least two of 8 GiB at once
    assert program.largest_buffers[0][0] == 8 * GIB and "32768,65536" in program.largest_buffers[0][1]
    assert program.flops == 2 * 32 * 1024 * 1024 * 64 * 1024 / 4


@needs_libtpu
def test_what_lies_beside_a_program_counts(tpu_slice):
    mesh = sharding.make_mesh(1, 4, 1, devices=tpu_slice("v5e:2x2"))
    shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=sharding.replicated(mesh))
    pod = programs.Pod("v5e:2x2", 1, mesh)
    for beside, fits in ((15 * GIB, True), (16 * GIB - 2**28, False)):
        program = programs.compile_task(programs.Task("small", lambda: jax.jit(jnp.sin).trace(shape), beside), pod)
        assert program.fits == fits and program.peak_hbm_bytes < 2**24


@needs_libtpu
def test_what_slices_send_each_other_is_seen(tpu_slice):
    mesh = sharding.make_mesh(2, 4, 1, devices=tpu_slice("v5e:2x2", 2))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((256, 128), jnp.float32, sharding=sharding.replicated(mesh))
    gradient = jax.jit(jax.grad(lambda w, x: jnp.sin(x @ w).sum()), out_shardings=sharding.replicated(mesh))
    program = programs.compile_task(
        programs.Task("gradient", lambda: gradient.trace(w, x), 0), programs.Pod("v5e:2x2", 2, mesh)
    )
    # The gradient is reduced within each slice, then between the two; at least a quarter of it on each chip.
    assert 256 * 128 * 4 / 4 <= program.dcn_bytes <= 256 * 128 * 4
    assert sum(program.collective_bytes.values()) > program.dcn_bytes and program.seconds["dcn"] > 0


@needs_libtpu
@pytest.mark.parametrize("mesh", [(1, 4, 1), (1, 2, 2)])
def test_the_decode_loop_for_tpus_gathers_no_weights(smoke, mesh, tpu_slice):
    config = smoke()
    mesh = sharding.make_mesh(*mesh, devices=tpu_slice("v5e:2x2"))
    model = programs.build(config, programs.read_architecture(config.model.path)[0], mesh)
    (task,) = (task for task in programs.tasks(config, model, mesh) if task.name == "rollout")
    program = hlo.Program(task.trace().lower().compile().as_text(), task.while_trips)
    loops = [times for _, instruction, times, _, _ in program.walk() if instruction.opcode == "while"]
    assert loops  # it decodes in a loop
    smallest = min(leaf.size for leaf in jax.tree.leaves(model.abstract) if leaf.ndim > 2) // model.config.layers
    gathers = [x for x in program.collectives() if x.kind == "all-gather" and x.times > 1]
    assert all(x.operand_bytes * x.group < smallest for x in gathers), gathers
