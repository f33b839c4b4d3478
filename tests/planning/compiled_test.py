"""Figures of compiled programs; with libtpu, of real ones for small slices."""

import jax
import jax.numpy as jnp
import pytest

from msd_jax.parallel import sharding
from msd_jax.planning import compiled
from msd_jax.planning.compiled import GIB
from msd_jax.planning.pod import Pod
from msd_jax.planning.programs import Program
from tests.planning.conftest import COMPILED, needs_libtpu


def test_the_estimate_is_the_longest_resource():
    assert (COMPILED.seconds_estimate, COMPILED.bound, COMPILED.total_hbm_bytes) == (1.2, "hbm", 12 * GIB)
    programs = {"train": COMPILED, "rollout": COMPILED, "evaluation": COMPILED}
    assert compiled.step_seconds(programs) == pytest.approx(2.4)  # an evaluation is not part of a step


def test_needed_bytes_from_xlas_messages():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (23.59G) exceeds available HBM (15.75G). HLO module: jit__relayout."
    )
    assert compiled.needed_bytes(message) == int(23.59 * GIB)
    older = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 980.5M of 15.75G hbm."
    assert compiled.needed_bytes(older) == int(980.5 * 2**20)
    with pytest.raises(ValueError, match="XLA's compiler failed: INTERNAL: what"):
        compiled.needed_bytes("INTERNAL: what\nmore")


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
    assert compiled.parse_buffers(report) == (
        (8 * GIB, "f32[32768,65536]"),
        (GIB // 2, "f32[32768,65536], and 1 other shapes in its place"),
        (512, "f32[8], and 1 other shapes in its place"),
    )
    assert compiled.parse_buffers("") == ()


# --- With XLA's TPU compiler ---


def replicated(mesh, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.replicated(mesh))


@needs_libtpu
def test_a_program_that_does_not_fit_has_its_figures(tpu_slice):
    mesh = sharding.make_mesh(1, 4, 1, devices=tpu_slice("v5e:2x2"))
    shapes = replicated(mesh, 32 * 1024, 1024), replicated(mesh, 1024, 64 * 1024)

    def sort_twice(x, y):
        rows = jnp.sort(jnp.sin(x @ y), axis=0)
        return (rows + jnp.sort(rows, axis=1)).sum(axis=-1)

    program = Program("big", lambda: jax.jit(sort_twice).trace(*shapes), resident_bytes=GIB)
    figures = compiled.compile_program(program, Pod("v5e:2x2", 1, mesh))
    assert not figures.fits
    assert 16 * GIB < figures.peak_hbm_bytes < 40 * GIB  # at least two of 8 GiB at once
    assert figures.largest_buffers[0][0] == 8 * GIB and "32768,65536" in figures.largest_buffers[0][1]
    assert figures.flops == 2 * 32 * 1024 * 1024 * 64 * 1024 / 4


@needs_libtpu
def test_memory_beside_a_program_counts(tpu_slice):
    mesh = sharding.make_mesh(1, 4, 1, devices=tpu_slice("v5e:2x2"))
    shape, pod = replicated(mesh, 1024, 1024), Pod("v5e:2x2", 1, mesh)
    for resident, fits in ((15 * GIB, True), (16 * GIB - 2**28, False)):
        program = Program("small", lambda: jax.jit(jnp.sin).trace(shape), resident)
        figures = compiled.compile_program(program, pod)
        assert figures.fits == fits and figures.peak_hbm_bytes < 2**24


@needs_libtpu
def test_traffic_between_slices_is_counted(tpu_slice):
    mesh = sharding.make_mesh(2, 4, 1, devices=tpu_slice("v5e:2x2", 2))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    x, w = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=rows), replicated(mesh, 256, 128)
    gradient = jax.jit(jax.grad(lambda w, x: jnp.sin(x @ w).sum()), out_shardings=sharding.replicated(mesh))
    program = Program("gradient", lambda: gradient.trace(w, x), 0)
    figures = compiled.compile_program(program, Pod("v5e:2x2", 2, mesh))
    # The gradient is reduced within each slice, then between the two; at least a quarter of it on each chip.
    assert 256 * 128 * 4 / 4 <= figures.dcn_bytes <= 256 * 128 * 4
    assert sum(figures.collective_bytes.values()) > figures.dcn_bytes and figures.seconds["dcn"] > 0
