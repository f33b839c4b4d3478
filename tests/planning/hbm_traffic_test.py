"""Memory traffic of hand-written HLO and of a compiled scan."""

import re

import jax
import jax.numpy as jnp
import pytest

from msd_jax.planning.hbm_traffic import hbm_traffic
from msd_jax.planning.hlo import HloModule


def test_slices_count_as_slices_and_on_chip_memory_is_free():
    text = """
%slicing (stack: f32[10,100], i: s32[], v: f32[100]) -> f32[100] {
  %stack = f32[10,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,100]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,100}
  %flat = f32[100]{0} bitcast(%row)
  %v = f32[100]{0} parameter(2)
  ROOT %sum = f32[100]{0} add(%flat, %v)
}

ENTRY %main (stack.1: f32[10,100], i.1: s32[], v.1: f32[100]) -> f32[100] {
  %stack.1 = f32[10,100]{1,0:T(8,128)} parameter(0)
  %i.1 = s32[]{:T(128)S(6)} parameter(1)
  %v.1 = f32[100]{0:T(128)S(1)} parameter(2)
  ROOT %f = f32[100]{0:T(128)} fusion(%stack.1, %i.1, %v.1), kind=kLoop, calls=%slicing
}
"""
    assert hbm_traffic(HloModule(text)) == 400 + 400  # one row in, one out; v.1 never leaves the chip


def test_an_operand_that_a_nested_fusion_passes_on_is_read_by_the_users_of_its_result():
    text = """
%inner (a: bf16[100,10]) -> bf16[100,10] {
  %a = bf16[100,10]{1,0} parameter(0)
  ROOT %b = bf16[100,10]{1,0} bitcast(%a)
}

%outer (head: bf16[100,10], x: bf16[10]) -> f32[100] {
  %head = bf16[100,10]{1,0} parameter(0)
  %x = bf16[10]{0} parameter(1)
  %same = bf16[100,10]{1,0} fusion(%head), kind=kLoop, calls=%inner
  ROOT %logits = f32[100]{0:S(1)} convolution(%same, %x), dim_labels=bf_io->bf
}

ENTRY %main (head.1: bf16[100,10], x.1: bf16[10]) -> f32[100] {
  %head.1 = bf16[100,10]{1,0:T(8,128)(2,1)} parameter(0)
  %x.1 = bf16[10]{0:T(256)S(1)} parameter(1)
  ROOT %f = f32[100]{0:T(128)S(1)} fusion(%head.1, %x.1), kind=kOutput, calls=%outer
}
"""
    assert hbm_traffic(HloModule(text)) == 100 * 10 * 2


def test_a_slice_of_what_a_nested_fusion_copies_to_other_tiles_counts_as_the_slice():
    """As of int8, whose tiles a product wants otherwise than they lie in HBM."""
    text = """
%tiles (a: s8[10,100,100]) -> s8[10,100,100] {
  %a = s8[10,100,100]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %b = s8[10,100,100]{2,1,0:T(8,128)(4,1)} copy(%a)
}

%outer (stack: s8[10,100,100], i: s32[]) -> s8[100,100] {
  %stack = s8[10,100,100]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %other = s8[10,100,100]{2,1,0:T(8,128)(4,1)} fusion(%stack), kind=kLoop, calls=%tiles
  %one = s8[1,100,100]{2,1,0:T(8,128)(4,1)} dynamic-slice(%other, %i, %zero, %zero), dynamic_slice_sizes={1,100,100}
  %flat = s8[100,100]{1,0:T(8,128)(4,1)} bitcast(%one)
  ROOT %back = s8[100,100]{1,0:T(32,128)(4,1)S(1)} copy(%flat)
}

ENTRY %main (stack.1: s8[10,100,100], i.1: s32[]) -> s8[100,100] {
  %stack.1 = s8[10,100,100]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i.1 = s32[]{:T(128)S(6)} parameter(1)
  ROOT %f = s8[100,100]{1,0:T(32,128)(4,1)S(1)} fusion(%stack.1, %i.1), kind=kLoop, calls=%outer
}
"""
    assert hbm_traffic(HloModule(text)) == 100 * 100


def test_a_result_that_a_nested_fusion_passes_on_is_written():
    text = """
%inner (a: f32[100]) -> f32[10,10] {
  %a = f32[100]{0} parameter(0)
  ROOT %b = f32[10,10]{1,0} bitcast(%a)
}

%outer (x: f32[100]) -> f32[10,10] {
  %x = f32[100]{0} parameter(0)
  %y = f32[100]{0} negate(%x)
  ROOT %z = f32[10,10]{1,0} fusion(%y), kind=kLoop, calls=%inner
}

ENTRY %main (x.1: f32[100]) -> f32[10,10] {
  %x.1 = f32[100]{0:T(128)S(1)} parameter(0)
  ROOT %f = f32[10,10]{1,0:T(8,128)} fusion(%x.1), kind=kLoop, calls=%outer
}
"""
    assert hbm_traffic(HloModule(text)) == 100 * 4


SLICE_START = "((bf16[16,100]{1,0}), bf16[4,100]{1,0:S(1)}, s32[]{:S(2)})"
IN_XLAS_DUMP = f"%s = {SLICE_START} async-start(%x), calls=%wrapped"
IN_AS_TEXT = f"%s = {SLICE_START} slice-start(%x), slice={{[0:4], [0:100]}}"


@pytest.mark.parametrize("start", [IN_XLAS_DUMP, IN_AS_TEXT], ids=["dump", "as_text"])
def test_an_asynchronous_slice_counts_once_and_as_the_slice(start):
    text = f"""
%wrapped (p: bf16[16,100]) -> bf16[4,100] {{
  %p = bf16[16,100]{{1,0}} parameter(0)
  ROOT %slice.1 = bf16[4,100]{{1,0:S(1)}} slice(%p), slice={{[0:4], [0:100]}}
}}

ENTRY %main (x: bf16[16,100]) -> bf16[4,100] {{
  %x = bf16[16,100]{{1,0}} parameter(0)
  {start}
  ROOT %d = bf16[4,100]{{1,0:S(1)}} async-done(%s)
}}
"""
    assert hbm_traffic(HloModule(text)) == 4 * 100 * 2  # it goes to on-chip memory


@pytest.mark.parametrize(
    "shape, start",
    [
        ("(f32[2]{0}, f32[16]{0})", "all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}"),
        ("((f32[2]{0}, f32[2]{0}), (f32[16]{0}, f32[16]{0}))", "all-gather-start(%x, %x), replica_groups=[1,8]<=[8]"),
        ("f32[2]{0}", "all-reduce-start(%x), replica_groups=[1,8]<=[8], to_apply=%sum"),
        ("(f32[2]{0}, f32[2]{0})", "all-reduce-start(%x, %x), replica_groups=[1,8]<=[8], to_apply=%sum"),
        ("((f32[2]{0}), f32[1]{0})", "reduce-scatter-start(%x), replica_groups=[1,2]<=[2], to_apply=%sum"),
    ],
)
def test_an_asynchronous_collective_of_a_gpu_reads_its_operands_and_writes_its_results(shape, start):
    text = f"""
ENTRY %main (x: f32[2]) -> f32[2] {{
  %x = f32[2]{{0}} parameter(0)
  %s = {shape} {start}
  ROOT %d = f32[2]{{0}} some-done(%s)
}}
"""
    operands = 4 * 2 * start.count("%x")
    results = {"all-gather": 8 * operands, "all-reduce": operands, "reduce-scatter": operands // 2}
    assert hbm_traffic(HloModule(text)) == operands + results[start.partition("-start")[0]]


@pytest.mark.parametrize("source, target, times", [("", "", 2), ("S(1)", "", 1), ("", "S(1)", 1), ("S(1)", "S(1)", 0)])
def test_a_slice_or_an_update_counts_on_each_side_that_is_in_hbm(source, target, times):
    text = f"""
ENTRY %main (x: f32[8,10], i: s32[]) -> f32[1,10] {{
  %x = f32[8,10]{{1,0:T(8,128){source}}} parameter(0)
  %i = s32[] parameter(1)
  ROOT %y = f32[1,10]{{1,0:T(8,128){target}}} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={{1,10}}
}}
"""
    assert hbm_traffic(HloModule(text)) == times * 40
    text = f"""
ENTRY %main (x: f32[8,10], row: f32[1,10], i: s32[]) -> f32[8,10] {{
  %x = f32[8,10]{{1,0:T(8,128){target}}} parameter(0)
  %row = f32[1,10]{{1,0:T(8,128){source}}} parameter(1)
  %i = s32[] parameter(2)
  ROOT %y = f32[8,10]{{1,0:T(8,128){target}}} dynamic-update-slice(%x, %row, %i, %i)
}}
"""
    assert hbm_traffic(HloModule(text)) == times * 40


def test_a_scan_over_weights_reads_each_weight_once():
    L, D = 6, 64

    def f(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((D,), (L, D, D)))
    text = jax.jit(f).lower(*shapes).compile().as_text()
    weights = L * D * D * 4
    assert re.search(r"while", text)
    assert weights <= hbm_traffic(HloModule(text)) <= 4 * weights
