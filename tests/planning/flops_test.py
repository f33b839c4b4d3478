"""FLOPs of jaxprs against counts by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest

from msd_jax.parallel import sharding
from msd_jax.planning.flops import count_flops
from tests.planning.conftest import needs_cuda


def flops(f, *shapes, **options):
    arguments = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return count_flops(jax.jit(f).trace(*arguments).jaxpr, **options)


def test_flops_of_a_matrix_product_and_a_batched_one():
    assert flops(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7


def test_flops_of_a_convolution():
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert flops(conv, (2, 8, 8, 3), (3, 3, 3, 5)) == 2 * (2 * 6 * 6 * 5) * (3 * 3 * 3)


@needs_cuda
def test_flops_of_cudnns_attention_are_those_of_its_products():
    B, T, N, K, H = 2, 16, 4, 2, 64
    shapes = [jax.ShapeDtypeStruct((B, T, heads, H), jnp.bfloat16) for heads in (N, K, K)]

    def attend(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn").sum()

    product = 2 * B * N * T * T * H
    assert count_flops(jax.jit(attend).trace(*shapes).jaxpr) == 2 * product
    backward = jax.jit(jax.grad(attend, argnums=(0, 1, 2))).trace(*shapes)
    assert count_flops(backward.jaxpr) == (2 + 5) * product


def test_flops_of_nested_scans_count_both_lengths():
    def f(x, w):
        def inner(x, _):
            return x @ w, None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=3)[0], None

        return jax.lax.scan(outer, x, length=4)[0]

    assert flops(f, (2, 5), (5, 5)) == 4 * 3 * 2 * 2 * 5 * 5


def test_flops_of_a_while_loop_take_the_given_number_of_trips():
    def f(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

    assert flops(f, (2, 5), (5, 5), while_trips=11) == 11 * 2 * 2 * 5 * 5
    with pytest.raises(ValueError, match="no trip count is declared for the while loop"):
        flops(f, (2, 5), (5, 5))


def test_flops_count_what_checkpoint_recomputes():
    def loss(checkpoint, x, w):
        def layer(x, _):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(jax.checkpoint(layer) if checkpoint else layer, x, length=6)[0].sum()

    def gradient(checkpoint):
        return jax.grad(functools.partial(loss, checkpoint), argnums=(0, 1))

    product = 6 * 2 * 2 * 5 * 5
    assert flops(gradient(False), (2, 5), (5, 5)) == 3 * product  # forward, and two of the backward pass
    assert flops(gradient(True), (2, 5), (5, 5)) == 4 * product


def test_flops_of_a_conditional_are_those_of_its_costliest_branch():
    def f(x):
        return jax.lax.switch(x.astype(int)[0, 0], [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x], x)

    assert flops(f, (5, 5)) == 2 * 2 * 5**3


def test_flops_of_a_shard_map_are_those_of_all_shards():
    mesh = sharding.make_mesh(2, 2, 2)
    spec = jax.sharding.PartitionSpec(("data", "fsdp"))
    f = jax.shard_map(
        lambda a, b: a @ b,
        mesh=mesh,
        in_specs=(spec, jax.sharding.PartitionSpec()),
        out_specs=spec,
        check_vma=False,
    )
    # Over `tensor` every device does the same work.
    assert flops(f, (8, 5), (5, 7)) == 2 * (2 * 8 * 5 * 7)


def test_flops_of_splash_attention_are_those_of_its_grid():
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((256, 256))] * 2)
    blocks = splash_attention_kernel.BlockSizes(block_q=128, block_kv=128, block_kv_compute=128)
    kernel = splash_attention_kernel.make_splash_mqa_single_device(mask, block_sizes=blocks)
    count = flops(jax.vmap(kernel), (3, 2, 256, 64), (3, 256, 64), (3, 256, 64))
    assert count == 3 * 2 * 2 * (2 * 256 * 256 * 64)
