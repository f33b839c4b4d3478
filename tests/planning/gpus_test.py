"""GPU nodes by name; with JAX for CUDA, programs compiled for them."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from msd_jax.models import attention
from msd_jax.parallel import sharding
from msd_jax.planning import compiled, gpus, hardware, pod
from msd_jax.planning.compiled import GIB
from msd_jax.planning.programs import Program
from tests.conftest import REPOSITORY
from tests.planning.conftest import needs_cuda, recipe


@pytest.mark.parametrize(
    "topology, name, gpus_per_node, count",
    [("h100:8", "h100", 8, 1), ("h200:8x4", "h200", 8, 4), ("a100:1", "a100", 1, 1)],
)
def test_nodes(topology, name, gpus_per_node, count):
    assert gpus.is_gpu(topology)
    assert gpus.parse_nodes(topology) == gpus.Nodes(hardware.GPUS[name], gpus_per_node, count)


@pytest.mark.parametrize("topology", ["h100", "h100:", "h100:0", "h100:8x", "h100:8x4x2", "b200:8", "v5e:8x8"])
def test_not_nodes(topology):
    with pytest.raises(ValueError, match=rf"--topology={topology}: write GPU:COUNT .* GPUs are h100, h200, a100"):
        gpus.parse_nodes(topology)


def test_what_the_compiler_is_told_about_an_h100():
    text = gpus.describe_target(hardware.GPUS["h100"])
    facts = ("core_count: 132", "shared_memory_per_core: 233472", "shared_memory_per_block_optin: 232448")
    facts += ("l2_cache_size: 52428800", "memory_bandwidth: 3350000000000", "fpus_per_core: 128")
    facts += ("cuda_compute_capability { major: 9 minor: 0 }", 'device_description_str: "NVIDIA H100 80GB HBM3"')
    assert all(fact in text for fact in facts)


def test_a_pod_of_gpu_nodes(two_h100_nodes):
    assert two_h100_nodes.device == hardware.GPUS["h100"].device
    assert two_h100_nodes.links == ("nvlink", "network") and two_h100_nodes.fewest_replicas == 1
    assert two_h100_nodes.node_of_device == [0] * 8  # the CPU's devices are all of one process
    assert dict(two_h100_nodes.with_mesh(1, -1, 2).mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}


def test_a_pod_of_a_slice_is_as_before(v5e_8):
    assert (v5e_8.links, v5e_8.fewest_replicas, v5e_8.node_of_device) == (("ici", "dcn"), 1, [])


def test_without_the_plugin_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'msd-jax\[cuda\]'"):
        pod.make_pod(recipe("gemma3_1b"), "h100:8", "")


# --- With XLA's GPU compiler ---


@needs_cuda
def test_axes_cross_nodes_as_in_training():
    _, planned = pod.make_pod(recipe("qwen2_5_7b"), "h100:4x2", "2,2,2")
    assert planned.slices == 2 and planned.device_count == 8
    assert planned.node_of_device == [0] * 4 + [1] * 4  # data crosses, the other axes stay within a node
    _, planned = pod.make_pod(recipe("qwen2_5_7b"), "h100:4x2", "1,8,1")
    assert planned.node_of_device == [0] * 4 + [1] * 4
    assert planned.mesh.devices.flat[0].device_kind == "NVIDIA H100 80GB HBM3"
    config, _ = pod.make_pod(recipe("qwen2_5_7b"), "h100:4x2", "1,8,1")
    assert (config.mesh.rollout_tensor, config.mesh.rollout_ffw) == (
        4,
        4,
    )  # of 4 and 16: generation stays within a node
    config, _ = pod.make_pod(recipe("gemma3_1b"), "h100:4x2", "1,8,1")
    assert (config.mesh.rollout_tensor, config.mesh.rollout_ffw) == (0, 0)
    with pytest.raises(ValueError, match="because tensor stays within a machine's NVLink"):
        pod.make_pod(recipe("qwen2_5_7b"), "h100:4x2", "1,1,8")


@needs_cuda
@pytest.mark.parametrize("head, kernel", [(64, "cudnn"), (256, "xla")])
def test_attention_is_the_kernel_of_training(head, kernel, tmp_path):
    _, planned = pod.make_pod(recipe("qwen2_5_7b"), "h100:1", "1,1,1")
    B, T, N = 2, 64, 4
    rows = sharding.batch_sharding(planned.mesh)
    query = jax.ShapeDtypeStruct((B, T, N, head), jnp.bfloat16, sharding=rows)
    key = jax.ShapeDtypeStruct((B, N, T, head), jnp.bfloat16, sharding=rows)
    valid = jax.ShapeDtypeStruct((B, T), bool, sharding=rows)
    scores = attention.Scores(0.1)
    assert attention.choose(query, scores, planned.mesh) == kernel

    def attend(query, key, value, valid):
        position = jnp.broadcast_to(jnp.arange(T), (B, T))
        options = {"windows": (T,), "scores": scores, "mesh": planned.mesh}
        return attention.self_attention(query, key, value, valid, position, T, **options)

    traced = jax.jit(attend).trace(query, key, key, valid)
    assert ("__cudnn$fmha" in traced.lower().compile().as_text()) == (kernel == "cudnn")
    figures = compiled.compile_program(Program("attention", lambda: traced, 0), planned)
    assert figures.flops == 2 * 2 * B * N * T * T * head and figures.fits


@needs_cuda
def test_what_crosses_nodes_is_counted():
    _, planned = pod.make_pod(recipe("qwen2_5_7b"), "h100:2x2", "2,2,1")
    rows = jax.sharding.NamedSharding(planned.mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((256, 128), jnp.float32, sharding=sharding.replicated(planned.mesh))
    gradient = jax.jit(jax.grad(lambda w, x: jnp.sin(x @ w).sum()), out_shardings=sharding.replicated(planned.mesh))
    figures = compiled.compile_program(Program("gradient", lambda: gradient.trace(w, x), GIB), planned)
    size = 256 * 128 * 4
    assert figures.collective_bytes == {"all-reduce": 2 * size * 3 // 4}
    assert figures.dcn_bytes == 2 * size * 3 // 4 // 2  # by two rings, each of which enters a node once
    assert set(figures.seconds) == {"compute", "hbm", "nvlink", "network"} and figures.bound == "network"


@needs_cuda
def test_the_command_plans_for_gpu_nodes(tmp_path):
    file = tmp_path / "plan.json"
    flags = ("--config=configs/qwen2_5_7b.py:smoke", "--topology=h200:1x2", f"--json={file}", "--config.eval.path=")
    done = subprocess.run(
        [sys.executable, "-m", "msd_jax.plan", *flags], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "FITS" in done.stdout and "h200:1x2: 2 devices" in done.stdout
    result = json.loads(file.read_text())
    assert result["fits"] and result["devices"] == 2 and result["chip"]["hbm_bandwidth"] == 4800e9
    assert any(key.startswith("jax-cuda") for key in result)
    for name in ("train", "relayout", "rollout"):
        program = result["programs"][name]
        assert 0 < program["peak_hbm_bytes"] < GIB and program["dcn_bytes"] > 0 and program["largest_buffers"]
