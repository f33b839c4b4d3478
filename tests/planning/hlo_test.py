"""FLOPs, trip counts, collectives and memory traffic against what is counted by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from msd_jax.parallel import sharding
from msd_jax.planning import hlo

S = jax.ShapeDtypeStruct


def flops(f, *shapes, **options):
    return hlo.flops(jax.jit(f).trace(*(S(shape, jnp.float32) for shape in shapes)).jaxpr, **options)


def test_flops_of_a_matrix_product_and_a_batched_one():
    assert flops(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7


def test_flops_of_a_convolution():
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert flops(conv, (2, 8, 8, 3), (3, 3, 3, 5)) == 2 * (2 * 6 * 6 * 5) * (3 * 3 * 3)


def test_flops_count_the_length_of_a_scan_and_nested_ones():
    def f(x, w):
        inner = lambda x, _: (x @ w, None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, x, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, length=4)[0]

    assert flops(f, (2, 5), (5, 5)) == 4 * 3 * 2 * 2 * 5 * 5


def test_flops_of_a_while_loop_take_the_number_given():
    def f(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

    assert flops(f, (2, 5), (5, 5), unknown_trips=11) == 11 * 2 * 2 * 5 * 5


def test_flops_count_what_checkpoint_computes_again():
    def loss(checkpoint, x, w):
        def layer(x, _):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(jax.checkpoint(layer) if checkpoint else layer, x, length=6)[0].sum()

    product = 6 * 2 * 2 * 5 * 5
    gradient = lambda checkpoint: jax.grad(functools.partial(loss, checkpoint), argnums=(0, 1))  # noqa: E731
    assert flops(gradient(False), (2, 5), (5, 5)) == 3 * product  # forward, and two of the backward pass
    assert flops(gradient(True), (2, 5), (5, 5)) == 4 * product


def test_flops_of_a_conditional_are_those_of_its_costliest_branch():
    def f(x):
        return jax.lax.switch(x.astype(int)[0, 0], [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x], x)

    assert flops(f, (5, 5)) == 2 * 2 * 5**3


def test_flops_of_a_shard_map_are_those_of_all_shards():
    mesh = sharding.make_mesh(2, 2, 2)
    spec = PartitionSpec(("data", "fsdp"))
    f = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False)
    # Over `tensor` every device does the same work.
    assert flops(f, (8, 5), (5, 7)) == 2 * (2 * 8 * 5 * 7)


def test_flops_of_splash_attention_are_those_of_its_grid():
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((256, 256))] * 2)
    blocks = splash_attention_kernel.BlockSizes(block_q=128, block_kv=128, block_kv_compute=128)
    kernel = splash_attention_kernel.make_splash_mqa_single_device(mask, block_sizes=blocks)
    count = flops(jax.vmap(kernel), (3, 2, 256, 64), (3, 256, 64), (3, 256, 64))
    assert count == 3 * 2 * 2 * (2 * 256 * 256 * 64)


# --- Compiled programs ---


def compiled(f, mesh, *arguments, **options):
    shapes = [S(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))) for shape, dtype, spec in arguments]
    return hlo.Program(jax.jit(f).lower(*shapes).compile().as_text(), **options)


@pytest.fixture
def mesh():
    return sharding.make_mesh(2, 4, 1)


def in_a_loop(body, mesh, in_spec, out_spec, length=5):
    """`body`, on shards, `length` times."""
    local = lambda x: jax.lax.scan(lambda x, _: (body(x), None), x, length=length)[0]  # noqa: E731
    return jax.shard_map(local, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False)


def test_an_all_reduce_in_a_loop(mesh):
    f = in_a_loop(lambda x: jax.lax.psum(x * 1.01, "fsdp"), mesh, PartitionSpec(), PartitionSpec())
    (found,) = compiled(f, mesh, ((3, 8), jnp.float32, ())).collectives()
    assert (found.kind, found.group, found.times, found.operand_bytes) == ("all-reduce", 4, 5, 3 * 8 * 4)
    assert found.bytes == 5 * 2 * (3 * 8 * 4) * 3 // 4


def test_an_all_gather_in_a_loop(mesh):
    def body(x):
        return jax.lax.all_gather(x, ("data", "fsdp"), tiled=True)[: x.shape[0]] * 1.01

    f = in_a_loop(body, mesh, PartitionSpec(("data", "fsdp")), PartitionSpec(("data", "fsdp")))
    (found,) = compiled(f, mesh, ((16, 6), jnp.float32, (("data", "fsdp"),))).collectives()
    assert (found.kind, found.group, found.times) == ("all-gather", 8, 5)
    assert found.bytes == 5 * 7 * (2 * 6 * 4)  # the seven other shards


def test_a_reduce_scatter_an_all_to_all_and_a_permute(mesh):
    spec = PartitionSpec("fsdp")

    def f(x):
        a = jax.lax.psum_scatter(x, "fsdp", tiled=True)
        b = jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)
        c = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        return a.sum() + b + c

    sharded = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    found = compiled(sharded, mesh, ((16, 6), jnp.float32, ("fsdp",))).collectives()
    size = 4 * 6 * 4
    assert {x.kind: x.bytes for x in found} == {
        "reduce-scatter": size * 3 // 4,
        "all-to-all": size * 3 // 4,
        "collective-permute": size,
    }


def test_collectives_between_slices_are_those_of_the_hosts():
    text = """
ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %token = token[] after-all()
  %g = f32[8]{0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %s = (f32[2], u32[], token[]) send(%x, %token), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %p = (f32[2], u32[], token[]) send(%x, %token), frontend_attributes={_xla_megascale_transfer_type="ONE_TO_ONE"}
  %h = (f32[2], u32[], token[]) send(%x, %token), is_host_transfer=true
  ROOT %y = f32[2]{0} copy(%x)
}
"""
    found = hlo.Program(text, slices=3).collectives()
    assert [(x.kind, x.crosses, x.bytes) for x in found] == [
        ("all-gather", False, 3 * 8),
        ("all-reduce", True, 2 * 8 * 2 // 3),
        ("collective-permute", True, 8),
    ]


def test_an_open_loop_takes_the_number_given(mesh):
    def local(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jax.lax.psum(x, "fsdp"), x)

    f = jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    found = compiled(f, mesh, ((4,), jnp.float32, ()), unknown_trips=13).collectives()
    assert [x.times for x in found if x.kind == "all-reduce" and x.operand_bytes == 16] == [13]


TPU_LOOP = """
HloModule jit_f

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[]{{:T(128)}} add(%i, %two)
  %x = f32[8]{{0:T(128)}} get-tuple-element(%p), index=1
  %y = f32[8]{{0:T(128)}} all-reduce(%x), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%sum
  ROOT %t = (s32[], f32[8]) tuple(%next, %y)
}}

%condition (p.1: (s32[], f32[8])) -> pred[] {{
  %p.1 = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}) parameter(0)
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%p.1), index=0
  %bound = s32[] constant(12)
  %less = pred[] compare(%i.1, %bound), direction=LT
  %more = pred[] custom-call(%p.1), custom_call_target="anything"
  ROOT %both = pred[] {root}
}}

ENTRY %main (x.1: f32[8]) -> f32[8] {{
  %x.1 = f32[8]{{0:T(128)}} parameter(0)
  %one = s32[] constant(1)
  %start = (s32[], f32[8]) tuple(%one, %x.1)
  %while.1 = (s32[], /*index=1*/f32[8]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8]{{0:T(128)}} get-tuple-element(%while.1), index=1
}}
"""


@pytest.mark.parametrize("root", ["and(%less, %more)", "and(%more, %less)"])
def test_trips_of_a_loop_without_xlas_note_come_from_its_bound(root):
    # TPU programs carry no known_trip_count: 1, 3, 5, ... below 12.
    (found,) = hlo.Program(TPU_LOOP.format(root=root), unknown_trips=99).collectives()
    assert (found.times, found.group, found.bytes) == (6, 4, 6 * 2 * 32 * 3 // 4)


def test_trips_that_cannot_be_read_are_the_number_given():
    (found,) = hlo.Program(TPU_LOOP.format(root="custom-call(%more)"), unknown_trips=99).collectives()
    assert found.times == 99


def test_an_asynchronous_collective_counts_once_where_it_starts():
    text = """
%start (a: f32[2]) -> (f32[2], f32[8]) {
  %a = f32[2]{0} parameter(0)
  %g = f32[8]{0} all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="3"}
  ROOT %s = (f32[2], f32[8]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%part (b: f32[2]) -> f32[8] {
  %b = f32[2]{0} parameter(0)
  ROOT %g.1 = f32[8]{0} all-gather(%b), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="3"}
}

ENTRY %main (x: f32[2]) -> f32[8] {
  %x = f32[2]{0} parameter(0)
  %f = (f32[2], f32[8]) fusion(%x), kind=kCustom, calls=%start
  ROOT %h = f32[8]{0} fusion(%x), kind=kCustom, calls=%part
}
"""
    (found,) = hlo.Program(text).collectives()
    assert found.bytes == 3 * 8


@pytest.mark.parametrize(
    "attributes, groups",
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,3]<=[6], x", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=[3,2]<=[2,3]T(1,0), x", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups=mesh['a'=2,'b'=3] {'b'}, x", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=mesh['a'=2,'b'=3] {'a'}, x", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'c','a'}, x", [[0, 4, 1, 5], [2, 6, 3, 7]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
        ("dimensions={0}", [[0]]),
    ],
)
def test_groups_in_each_of_the_ways_that_hlo_writes_them(attributes, groups):
    np.testing.assert_array_equal(hlo._groups(attributes), groups)


def test_memory_traffic_counts_slices_as_slices_and_skips_what_is_on_chip():
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
    assert hlo.Program(text).hbm_bytes() == 400 + 400  # one row in, one out; v.1 never leaves the chip


def test_memory_traffic_of_a_scan_over_weights_reads_each_weight_once():
    L, D = 6, 64

    def f(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    text = jax.jit(f).lower(S((D,), jnp.float32), S((L, D, D), jnp.float32)).compile().as_text()
    weights = L * D * D * 4
    assert re.search(r"while", text)
    assert weights <= hlo.Program(text).hbm_bytes() <= 4 * weights
