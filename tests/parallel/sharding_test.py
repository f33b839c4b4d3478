"""The mesh and the rule table."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from msd_jax.models import config as model_config
from msd_jax.models import decoder
from msd_jax.parallel import sharding
from msd_jax.planning import pod
from tests.conftest import LLAMA


def test_mesh_sizes():
    assert dict(sharding.make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    for sizes in [(3, -1, 1), (2, 2, 1), (-1, -1, 1), (0, 8, 1), (16, -1, 1)]:
        with pytest.raises(ValueError, match=r"config.mesh="):
            sharding.make_mesh(*sizes)


def test_rules_split_every_matrix():
    mesh = sharding.make_mesh(2, 2, 2)
    _, abstract, axes = decoder.abstract(model_config.from_dict(LLAMA))
    train = sharding.param_shardings(mesh, abstract, axes, sharding.TRAIN)
    assert train["layers"]["query"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert train["layers"]["down"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert train["embedding"].spec == PartitionSpec("tensor", "fsdp")
    rollout = sharding.param_shardings(mesh, abstract, axes, sharding.ROLLOUT)
    assert rollout["layers"]["query"].spec == PartitionSpec(None, None, "tensor", None)


def test_generation_shares_heads_and_the_largest_weights_apart():
    mesh = sharding.make_mesh(1, 4, 2)
    assert sharding.rollout_mesh(mesh).devices.shape == (4, 1, 1, 2)
    apart = sharding.rollout_mesh(mesh, 4, 8)
    assert dict(apart.shape) == {"data": 1, "fsdp": 2, "extra": 2, "tensor": 2}
    assert list(apart.devices.flat) == list(mesh.devices.flat) and sharding.batch_shards(apart) == 2
    _, abstract, axes = decoder.abstract(model_config.from_dict(LLAMA))
    layers = sharding.param_shardings(apart, abstract, axes, sharding.ROLLOUT)["layers"]
    assert layers["query"].spec == PartitionSpec(None, None, ("tensor", "extra"), None)
    assert layers["down"].spec == PartitionSpec(None, ("tensor", "extra", "fsdp"), None)


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ((2, 0, 0, 8), (2, 2)),
        ((2, 4, 16, 64), (4, 16)),
        ((2, 4, 16, 8), (4, 8)),
        ((1, 4, 16, 1), (1, 1)),
        ((8, 4, 16, 16), (8, 16)),
    ],
)
def test_generation_takes_no_more_devices_than_there_are(asked, sizes):
    assert sharding.rollout_sizes(*asked) == sizes


@pytest.mark.parametrize("asked", [(2, 3, 0, 6), (3, 4, 0, 12), (2, 4, 6, 12)])
def test_sizes_of_generation_that_do_not_follow_each_other_are_refused(asked):
    with pytest.raises(ValueError, match=r"config.mesh: tensor=.*, rollout_tensor=.* and rollout_ffw=.* a multiple"):
        sharding.rollout_sizes(*asked)


def test_a_size_that_does_not_divide_is_named():
    mesh = sharding.make_mesh(1, 1, 8)
    _, abstract, axes = decoder.abstract(model_config.from_dict(LLAMA))
    with pytest.raises(ValueError, match=r"parameter layers.output: axis 'heads' of size 4 .* 'tensor' of size 8"):
        sharding.param_shardings(mesh, abstract, axes, sharding.TRAIN)


def test_key_value_heads_are_replicated_where_devices_are_a_multiple_of_them():
    _, abstract, axes = decoder.abstract(model_config.from_dict(LLAMA))  # 4 heads, 2 of keys and values
    layers = sharding.param_shardings(sharding.make_mesh(1, 2, 4), abstract, axes, sharding.TRAIN)["layers"]
    assert layers["query"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert layers["key"].spec == PartitionSpec(None, "fsdp", None, None)


@pytest.mark.parametrize("axis, size", [("kv_heads", 3), ("kv_heads", 6), ("heads", 2)])
def test_nothing_else_is_replicated_in_silence(axis, size):
    """Neither key/value heads of which the devices are not a multiple, nor another axis of which they are."""
    mesh = sharding.make_mesh(1, 2, 4)
    assert not sharding.is_replicated(sharding.TRAIN, mesh, axis, size)
    with pytest.raises(
        ValueError, match=rf"parameter x: axis '{axis}' of size {size} does not divide over .* of size 4"
    ):
        sharding.spec(sharding.TRAIN, mesh, (size,), (axis,), "parameter x")


def test_a_collision_is_named():
    mesh = sharding.make_mesh(1, 4, 2)
    _, abstract, axes = decoder.abstract(model_config.from_dict(LLAMA))
    with pytest.raises(ValueError, match=r"parameter \S+: axis '\w+' falls on mesh axis 'tensor', already taken"):
        sharding.param_shardings(mesh, abstract, axes, sharding.TRAIN | {"embed": "tensor"})


def test_batches_go_out_by_rows_and_come_back_whole(rng):
    mesh = sharding.make_mesh(2, 2, 2)
    array = rng.integers(0, 9, (8, 3))
    placed = sharding.put_batch(mesh, array)
    assert placed.sharding.shard_shape(placed.shape) == (2, 3)
    np.testing.assert_array_equal(sharding.fetch(placed), array)
    assert jnp.sum(jax.jit(lambda x: x)(placed)) == array.sum()


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: TPU slices are unknown"
)
def test_only_data_crosses_slices(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # which pod.compile_only_devices takes away; put back afterwards
    devices = pod.compile_only_devices("v5e:2x2", slices=2)
    mesh = sharding.make_mesh(2, 2, 2, devices=devices)
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    mesh = sharding.make_mesh(4, -1, 1, devices=devices)
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(ValueError, match=r"config.mesh=1x8x1 .* over 2 slices: data must be a multiple of 2"):
        sharding.make_mesh(1, -1, 1, devices=devices)


@pytest.fixture(params=["slice_index", "partition_index"])
def machines(monkeypatch, request):
    """Gives the devices the attribute that XLA gives GPUs: the NVLink domain, here of `count` devices each."""

    def force(count: int) -> None:
        domain = property(lambda device: device.id // count)
        monkeypatch.setattr(type(jax.devices()[0]), request.param, domain, raising=False)

    return force


@pytest.mark.parametrize(
    "sizes, crossing",
    [((1, 8, 1), "fsdp"), ((1, 4, 2), "fsdp"), ((2, 4, 1), "data and fsdp"), ((4, 1, 2), "data"), ((8, 1, 1), "data")],
)
def test_fsdp_crosses_machines_where_data_does_not_suffice(machines, sizes, crossing):
    machines(2)
    mesh = sharding.make_mesh(*sizes)
    assert mesh.devices.shape == sizes
    described = " x ".join(f"{axis} {size}" for axis, size in zip(sharding.AXES, sizes))
    assert sharding.describe(mesh) == f"{described}; between 4 machines: {crossing}"
    # A machine's devices are neighbours: a group of `tensor`, and of what is left of fsdp, stays on one.
    assert [device.id // 2 for device in mesh.devices.flat] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_tensor_never_crosses_machines(machines):
    machines(4)
    with pytest.raises(ValueError, match=r"1x1x8 .* over 2 machines: data x fsdp must be a multiple of 2.* tensor"):
        sharding.make_mesh(1, 1, 8)
    machines(3)
    with pytest.raises(ValueError, match=r"3 machines or slices with \[2, 3, 3\] devices: all must have the same"):
        sharding.make_mesh()


def test_one_island_is_not_worth_a_word():
    assert sharding.describe(sharding.make_mesh(2, 2, 2)) == "data 2 x fsdp 2 x tensor 2"


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: TPU slices are unknown"
)
@pytest.mark.parametrize("name, sizes", [("v6e:4x4", (1, 8, 2)), ("v5p:2x2x4", (2, 1, 8)), ("v4:2x2x4", (1, 16, 1))])
def test_any_mesh_that_fills_a_slice_is_one(monkeypatch, name, sizes):
    monkeypatch.setenv("XLA_FLAGS", "")
    devices = pod.compile_only_devices(name)
    mesh = sharding.make_mesh(*sizes, devices=devices)
    assert mesh.devices.shape == sizes and {d.id for d in mesh.devices.flat} == {d.id for d in devices}
