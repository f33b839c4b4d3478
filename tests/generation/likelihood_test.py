"""Log-likelihoods: against the plain forward pass, for ragged rows, shared contexts, meshes and limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msd_jax.generation import likelihood, rollout
from msd_jax.models import forward, pretrained
from msd_jax.parallel import padding, sharding
from tests.conftest import LLAMA, write_model

V = LLAMA["vocab_size"]


@functools.cache
def mesh(*sizes):
    return sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


@pytest.fixture(scope="module", params=[{}, {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}])
def directory(request, tmp_path_factory):
    """Llama, and Gemma 2 with its soft-caps on the logits."""
    capped = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}
    extra = request.param and request.param | capped | {"head_dim": 8, "sliding_window": 64}
    return write_model(tmp_path_factory.mktemp("models") / "tiny", **extra)


def load(directory, mesh):
    model = pretrained.load(str(directory), dtype="float32", param_dtype="float32", remat="none", mesh=mesh)
    return model, rollout.reshard(model.params(mesh), model.dtype, model.shardings(mesh, sharding.ROLLOUT))


def expected(model, params, context, continuation):
    """One unpadded row through the model, log-softmax in float64."""
    ids = jnp.array([[*context, *continuation]])
    decoder = nnx.merge(model.graphdef, params)
    hidden = decoder(ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids, bool))
    logits = np.asarray(decoder.logits(hidden)[0, len(context) - 1 : -1], np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = log_probs[np.arange(len(continuation)), continuation].sum()
    return total, bool((logits.argmax(-1) == continuation).all())


def pairs_of(rng, count, longest=40):
    return [
        (rng.integers(0, V, rng.integers(1, longest)).tolist(), rng.integers(0, V, rng.integers(1, 20)).tolist())
        for _ in range(count)
    ]


def check(scores, model, params, pairs):
    assert len(scores) == len(pairs)
    for score, pair in zip(scores, pairs):
        total, greedy = expected(model, params, *pair)
        assert abs(score.log_likelihood - total) < 2e-5 * max(1, len(pair[1])), pair
        assert score.greedy == greedy


def test_scores_are_those_of_the_plain_forward_pass(directory, rng):
    model, params = load(directory, mesh(1, 1, 1))
    pairs = pairs_of(rng, 12)
    scorer = likelihood.Scorer(model, mesh(1, 1, 1), batch_size=4, limit=64)
    check(scorer(params, pairs), model, params, pairs)
    lengths = {padding.bucket(n, 64) for n in range(1, 64)}
    assert scorer.compilations <= len(lengths)


def test_what_greedy_decoding_writes_is_greedy(model_dir, rng):
    model, params = load(model_dir, mesh(1, 1, 1))
    prompt, length = padding.left_pad([rng.integers(0, V, n) for n in (3, 9, 5)], 16, model.pad_id)
    generator = rollout.Generator(model.graphdef, mesh(1, 1, 1), rollout.Sampling(12, 0.0), (-1,), model.pad_id)
    active = np.ones(3, bool)
    written = jax.device_get(generator(params, prompt, length, np.zeros(3, np.uint32), active, jax.random.key(0)))
    pairs = [(row[-n:].tolist(), r.tolist()) for row, n, r in zip(prompt, length, written.response_BxR)]
    changed = [(context, [*response[:5], (response[5] + 1) % V, *response[6:]]) for context, response in pairs]
    scores = likelihood.Scorer(model, mesh(1, 1, 1), batch_size=8, limit=64)(params, pairs + changed)
    assert [score.greedy for score in scores] == [True] * 3 + [False] * 3
    sequence = prompt, length, written.response_BxR, written.length_B
    log_probs = jax.nn.log_softmax(forward.response_logits(model.graphdef, params, *sequence))
    of_tokens = np.take_along_axis(np.asarray(log_probs, np.float64), written.response_BxR[..., None], axis=-1)
    np.testing.assert_allclose([score.log_likelihood for score in scores[:3]], of_tokens.sum((1, 2)), atol=1e-4)


def test_last_tokens_share_a_row(model_dir, rng, monkeypatch):
    """Eleven letters of one context are two rows, wherever the context ends and the continuation begins."""
    model, params = load(model_dir, mesh(1, 1, 1))
    text = rng.integers(0, V, 20).tolist()
    pairs = [(text, [token]) for token in range(11)] + [(text[:7], [*text[7:], 11])] + [(text[:19], [text[19], 12])]
    scorer = likelihood.Scorer(model, mesh(1, 1, 1), batch_size=4, limit=64)
    batches, score = [], scorer._score
    monkeypatch.setattr(scorer, "_score", lambda *args: batches.append(args[1]) or score(*args))
    check(scorer(params, pairs), model, params, pairs)
    assert [len(batch) for batch in batches] == [2]


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_a_mesh_changes_nothing(model_dir, rng, sizes):
    one, params = load(model_dir, mesh(1, 1, 1))
    pairs = pairs_of(rng, 11)
    base = likelihood.Scorer(one, mesh(1, 1, 1), batch_size=3, limit=64)(params, pairs)
    model, params = load(model_dir, mesh(*sizes))
    split = likelihood.Scorer(model, mesh(*sizes), batch_size=3, limit=64)(params, pairs)
    assert [score.greedy for score in split] == [score.greedy for score in base]
    np.testing.assert_allclose([s.log_likelihood for s in split], [s.log_likelihood for s in base], atol=1e-4)


def test_only_continuations_are_projected(model_dir):
    """No array of the program has B T V elements: 512 tokens a row, of which eight have logits at a time."""
    model, params = load(model_dir, mesh(1, 1, 1))
    shapes = ((4, 512), jnp.int32), ((4,), jnp.int32), ((4,), jnp.int32), ((4, 8), jnp.int32)
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    jaxpr = jax.make_jaxpr(functools.partial(likelihood.token_scores, model.graphdef))(params, *arrays)
    text = str(jaxpr)
    assert f"f32[4,8,{V}]" in text and f"[4,512,{V}]" not in text


def test_refuses_what_is_empty_or_too_long(model_dir):
    model, params = load(model_dir, mesh(1, 1, 1))
    scorer = likelihood.Scorer(model, mesh(1, 1, 1), batch_size=2, limit=16)
    assert scorer(params, []) == []
    assert len(scorer(params, [([1] * 8, [2] * 8)])) == 1
    with pytest.raises(ValueError, match=r"2 of 3 .* longer than 16 tokens \(the longest: 30\)"):
        scorer(params, [([1] * 8, [2] * 9), ([1], [2]), ([1] * 20, [2] * 10)])
    for pair in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="at least one token"):
            scorer(params, [pair])
