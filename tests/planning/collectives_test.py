"""Collectives of programs compiled for fake devices, and of hand-written HLO, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from msd_jax.parallel import sharding
from msd_jax.planning.collectives import find_collectives, network_share, replica_groups
from msd_jax.planning.hlo import HloModule


def compiled(f, mesh, *arguments, **options):
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, dtype, spec in arguments
    ]
    return find_collectives(HloModule(jax.jit(f).lower(*shapes).compile().as_text(), **options))


@pytest.fixture
def mesh():
    return sharding.make_mesh(2, 4, 1)


def in_a_loop(body, mesh, in_spec, out_spec, length=5):
    """`body`, on shards, `length` times."""

    def local(x):
        return jax.lax.scan(lambda x, _: (body(x), None), x, length=length)[0]

    return jax.shard_map(local, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False)


def test_an_all_reduce_in_a_loop(mesh):
    f = in_a_loop(lambda x: jax.lax.psum(x * 1.01, "fsdp"), mesh, PartitionSpec(), PartitionSpec())
    (found,) = compiled(f, mesh, ((3, 8), jnp.float32, ()))
    assert (found.kind, found.group_size, found.times, found.operand_bytes) == ("all-reduce", 4, 5, 3 * 8 * 4)
    assert found.bytes == 5 * 2 * (3 * 8 * 4) * 3 // 4


def test_an_all_gather_in_a_loop(mesh):
    def body(x):
        return jax.lax.all_gather(x, ("data", "fsdp"), tiled=True)[: x.shape[0]] * 1.01

    f = in_a_loop(body, mesh, PartitionSpec(("data", "fsdp")), PartitionSpec(("data", "fsdp")))
    (found,) = compiled(f, mesh, ((16, 6), jnp.float32, (("data", "fsdp"),)))
    assert (found.kind, found.group_size, found.times) == ("all-gather", 8, 5)
    assert found.bytes == 5 * 7 * (2 * 6 * 4)  # the seven other shards


def test_a_reduce_scatter_an_all_to_all_and_a_permute(mesh):
    spec = PartitionSpec("fsdp")

    def f(x):
        a = jax.lax.psum_scatter(x, "fsdp", tiled=True)
        b = jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)
        c = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        return a.sum() + b + c

    sharded = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    found = compiled(sharded, mesh, ((16, 6), jnp.float32, ("fsdp",)))
    size = 4 * 6 * 4
    assert {x.kind: x.bytes for x in found} == {
        "reduce-scatter": size * 3 // 4,
        "all-to-all": size * 3 // 4,
        "collective-permute": size,
    }


def test_an_open_loop_takes_the_given_number_of_trips(mesh):
    def local(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jax.lax.psum(x, "fsdp"), x)

    f = jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    found = compiled(f, mesh, ((4,), jnp.float32, ()), while_trips=13)
    assert [x.times for x in found if x.kind == "all-reduce" and x.operand_bytes == 16] == [13]


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
    found = find_collectives(HloModule(text), slices=3)
    assert [(x.kind, x.network_bytes, x.bytes) for x in found] == [
        ("all-gather", 0, 3 * 8),
        ("all-reduce", 2 * 8 * 2 // 3, 2 * 8 * 2 // 3),
        ("collective-permute", 8, 8),
    ]


def test_an_all_reduce_in_a_loop_of_a_tpu_program():
    text = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %x = f32[8]{0:T(128)} get-tuple-element(%p), index=1
  %y = f32[8]{0:T(128)} all-reduce(%x), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%sum
  ROOT %t = (s32[], f32[8]) tuple(%next, %y)
}

%condition (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %bound = s32[] constant(6)
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0:T(128)} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]) tuple(%zero, %x.1)
  %while.1 = (s32[], /*index=1*/f32[8]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8]{0:T(128)} get-tuple-element(%while.1), index=1
}
"""
    (found,) = find_collectives(HloModule(text))
    assert (found.times, found.group_size, found.bytes) == (6, 4, 6 * 2 * 32 * 3 // 4)


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
    (found,) = find_collectives(HloModule(text))
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
        ("replica_groups=mesh['a'=2,'b'=3], device_ids=([6]<=[3,2]T(1,0)) {'b'}, x", [[0, 2, 4], [1, 3, 5]]),
        ("replica_groups=mesh['a'=2,'b'=3], device_ids=([3,2]T(1,0)) {'b'}, x", [[0, 2, 4], [1, 3, 5]]),
        ("replica_groups=mesh['a'=3,'b'=1,'c'=2], device_ids=([2,3]T(1,0)) {'a'}, x", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,2,2]T(2,1,0)) {'a':(2)2}, x",
            [[0, 2], [4, 6], [1, 3], [5, 7]],
        ),
        (
            "replica_groups=mesh['a'=8,'b'=2] {'b','a':(2)2}, x",
            [[0, 4, 1, 5], [2, 6, 3, 7], [8, 12, 9, 13], [10, 14, 11, 15]],
        ),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
        ("dimensions={0}", [[0]]),
    ],
)
def test_groups_in_each_notation_of_hlo(attributes, groups):
    np.testing.assert_array_equal(replica_groups(attributes), groups)


@pytest.mark.parametrize("attributes", ["replica_groups=mesh['a'=4] {'a'%2}, x", "replica_groups={}, x"])
def test_groups_in_an_unknown_notation_are_an_error(attributes):
    with pytest.raises(ValueError, match="groups of a collective are not understood: replica_groups="):
        replica_groups(attributes)


@pytest.mark.parametrize(
    "kind, groups, share",
    [
        ("all-reduce", [[0, 1], [2, 3], [4, 5], [6, 7]], 0),
        ("all-gather", [[0, 4], [1, 5]], 1),
        ("all-gather", [[0, 1, 2, 3, 4, 5, 6, 7]], 1 / 4),
        ("all-to-all", [[0, 1, 2, 3, 4, 5, 6, 7]], 4 / 7),
        ("collective-permute", [[0, 1], [3, 4], [4, 0]], 1),
    ],
)
def test_what_a_gpu_receives_from_other_nodes(kind, groups, share):
    assert network_share(kind, np.array(groups), [0, 0, 0, 0, 1, 1, 1, 1]) == share
    assert network_share(kind, np.array(groups), []) == 0


def test_a_collective_between_gpu_nodes():
    text = """
ENTRY %main (x: f32[2]) -> f32[16] {
  %x = f32[2]{0} parameter(0)
  %s = (f32[2]{0}, f32[16]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %d = f32[16]{0} all-gather-done(%s)
}
"""
    (found,) = find_collectives(HloModule(text), node_of_device=[0, 0, 0, 0, 1, 1, 1, 1])
    assert (found.bytes, found.network_bytes) == (7 * 8, 7 * 8 // 4)
