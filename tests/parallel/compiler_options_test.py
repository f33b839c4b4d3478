"""The compilers know the options that they are given."""

import jax
import jax.numpy as jnp
import pytest

from msd_jax.parallel import compiler_options, sharding
from msd_jax.planning import pod
from tests.planning.conftest import needs_cuda, needs_libtpu, recipe


def compile_with(options, mesh):
    shape = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding.replicated(mesh))
    return jax.jit(jnp.sin, compiler_options=options).trace(shape).lower().compile()


def test_the_cpus_compiler_knows_its_options():
    mesh = sharding.make_mesh()
    options = compiler_options.train_step_options(mesh)
    assert set(options) == {"xla_cpu_scheduler_type"}
    compile_with(options, mesh)
    with pytest.raises(jax.errors.JaxRuntimeError):
        compile_with({"xla_no_such_option": "1"}, mesh)


@needs_libtpu
def test_the_tpus_compiler_knows_its_options(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # which pod.compile_only_devices removes; restored afterwards
    mesh = sharding.make_mesh(devices=pod.compile_only_devices("v5e:2x2"))
    options = compiler_options.train_step_options(mesh)
    assert set(options) == {"xla_jf_spmd_threshold_for_windowed_einsum_mib"}
    compile_with(options, mesh)
    with pytest.raises(jax.errors.JaxRuntimeError):
        compile_with({"xla_no_such_option": "1"}, mesh)


@needs_cuda
def test_the_gpus_compiler_knows_its_options():
    _, planned = pod.make_pod(recipe("qwen2_5_7b"), "h100:1", "1,1,1")
    options = compiler_options.rollout_options(planned.mesh)
    assert set(options) == {"xla_gpu_dot_merger_threshold_mb"}
    compile_with(options, planned.mesh)
    with pytest.raises(jax.errors.JaxRuntimeError):
        compile_with({"xla_no_such_option": "1"}, planned.mesh)
