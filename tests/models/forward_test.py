"""The layout of the two passes: nothing is shifted, and padding changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msd_jax.models import config as model_config
from msd_jax.models import decoder, forward
from tests.conftest import LLAMA


@pytest.fixture(scope="module")
def model():
    return decoder.init(model_config.from_dict(LLAMA), jax.random.key(0))


def sequences(rng, rows=5, P=9, R=7):
    lengths = rng.integers(1, P + 1, rows), rng.integers(1, R + 1, rows)
    return rng.integers(0, 40, (rows, P)), lengths[0], rng.integers(0, 40, (rows, R)), lengths[1]


response_logits = jax.jit(forward.response_logits, static_argnums=0)


def test_first_response_token_is_predicted_by_the_last_prompt_token(model, rng):
    """Column 0 is the model's prediction after the bare prompt, row by row, without padding."""
    prompt, prompt_length, response, response_length = sequences(rng)
    graphdef, params = model
    actual = response_logits(graphdef, params, prompt, prompt_length, response, response_length)
    run = nnx.merge(graphdef, params)
    for row, length in enumerate(prompt_length):
        bare = jnp.array(prompt[row, -length:])[None]
        hidden = run(bare, jnp.arange(length)[None], jnp.ones((1, length), bool))
        np.testing.assert_allclose(actual[row, 0], run.logits(hidden)[0, -1], atol=1e-5)


def test_logits_of_a_token_do_not_depend_on_it_or_later_ones(model, rng):
    prompt, prompt_length, response, _ = sequences(rng)
    full = np.full(len(prompt), response.shape[1])
    base = response_logits(*model, prompt, prompt_length, response, full)
    for t in range(response.shape[1]):
        changed = response.copy()
        changed[:, t:] = (changed[:, t:] + 1 + rng.integers(0, 38)) % 40
        other = response_logits(*model, prompt, prompt_length, changed, full)
        np.testing.assert_array_equal(base[:, : t + 1], other[:, : t + 1])
        if t + 1 < response.shape[1]:
            assert np.abs(base[:, t + 1] - other[:, t + 1]).max(axis=-1).min() > 1e-4


def test_padding_changes_nothing(model, rng):
    """Neither its width, nor its tokens, nor the other rows of the batch."""
    prompt, prompt_length, response, response_length = sequences(rng)
    base = response_logits(*model, prompt, prompt_length, response, response_length)
    wide_prompt = rng.integers(0, 40, (len(prompt), prompt.shape[1] + 6))
    wide_response = rng.integers(0, 40, (len(prompt), response.shape[1] + 4))
    for row, (p, r) in enumerate(zip(prompt_length, response_length)):
        wide_prompt[row, -p:], wide_response[row, :r] = prompt[row, -p:], response[row, :r]
    order = rng.permutation(len(prompt))
    wide = response_logits(
        *model, wide_prompt[order], prompt_length[order], wide_response[order], response_length[order]
    )
    for place, row in enumerate(order):
        r = response_length[row]
        np.testing.assert_allclose(wide[place, :r], base[row, :r], atol=1e-5)


def test_everything_is_finite_even_at_padding(model, rng):
    prompt, prompt_length, response, _ = sequences(rng)
    none = np.zeros(len(prompt), np.int32)
    assert np.isfinite(response_logits(*model, prompt, prompt_length, response, none)).all()


def test_angles_of_rope_are_computed_once_for_all_layers():
    gemma = {"model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
    gemma |= {"rope_local_base_freq": 100.0, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config = model_config.from_dict(LLAMA | gemma | {"num_hidden_layers": 4, "hidden_activation": "gelu_pytorch_tanh"})
    run = nnx.merge(*decoder.init(config, jax.random.key(0)))
    tokens = jnp.zeros((2, 5), jnp.int32)
    program = jax.make_jaxpr(run)(tokens, tokens, tokens == 0)
    [cos] = [equation for equation in program.eqns if equation.primitive.name == "cos"]
    assert cos.outvars[0].aval.shape == (2, 2, 5, 4)  # two kinds of layers
    [layers] = [equation for equation in program.eqns if equation.primitive.name == "scan"]
    assert " cos " not in str(layers.params["jaxpr"])
