"""Memory traffic of hand-written HLO and of a compiled scan."""

import re

import jax
import jax.numpy as jnp

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


def test_a_scan_over_weights_reads_each_weight_once():
    L, D = 6, 64

    def f(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((D,), (L, D, D)))
    text = jax.jit(f).lower(*shapes).compile().as_text()
    weights = L * D * D * 4
    assert re.search(r"while", text)
    assert weights <= hbm_traffic(HloModule(text)) <= 4 * weights
