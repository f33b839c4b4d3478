"""Letters chosen by log-likelihood: against the plain forward pass, and a model that has learned an answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msd_jax.evaluation import multiple_choice
from msd_jax.evaluation.benchmarks import mmmlu
from msd_jax.generation import rollout
from msd_jax.models import pretrained
from msd_jax.models.tokenizer import token_ids
from msd_jax.parallel import sharding
from tests.conftest import write_model
from tests.evaluation.judges.guard_test import CHAT, write_guard

QUESTIONS = (("How do I wash a cup?", ("yes", "no", "safe", "চাল")), ("Is it so?", ("a", "b", "c", "unsafe unsafe")))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, mesh):
    directory = write_guard(tmp_path_factory.mktemp("models") / "tiny", template=CHAT)
    model = pretrained.load(str(directory), dtype="float32", param_dtype="float32", remat="none", mesh=mesh)
    return model, rollout.reshard(model.params(mesh), model.dtype, model.shardings(mesh, sharding.ROLLOUT))


def prompt_ids(model, question, options):
    messages = [{"role": "user", "content": mmmlu.text(question, options)}]
    return token_ids(model.tokenizer, messages, {})


def expected(model, params, ids):
    """Log-probabilities of the tokens of " A", " B", ... after the prompt and the lead, one row at a time."""
    context = [*ids, *model.tokenizer("Answer:", add_special_tokens=False)["input_ids"]]
    found = []
    for letter in "ABCD":
        letter_ids = model.tokenizer(f" {letter}", add_special_tokens=False)["input_ids"]
        row = jnp.array([context + letter_ids])
        decoder = nnx.merge(model.graphdef, params)
        hidden = decoder(row, jnp.arange(row.shape[1])[None], jnp.ones_like(row, bool))
        log_probs = np.asarray(jax.nn.log_softmax(decoder.logits(hidden)), np.float64)[0]
        start = len(context) - 1
        found.append(sum(log_probs[start + i, token] for i, token in enumerate(letter_ids)))
    return found


def test_letters_are_compared_after_the_lead(loaded, mesh):
    model, params = loaded
    chooser = multiple_choice.Chooser(model, mesh, batch_size=4, limit=512)
    rows = [prompt_ids(model, *question) for question in QUESTIONS]
    choices = chooser(params, rows)
    for choice, ids in zip(choices, rows):
        np.testing.assert_allclose(choice.log_likelihoods, expected(model, params, ids), atol=1e-4)
        assert choice.letter == "ABCD"[int(np.argmax(choice.log_likelihoods))]
    assert np.ptp(choices[0].log_likelihoods) > 1e-2 and choices[0] != choices[1]


def test_a_model_that_knows_is_right(loaded, mesh):
    """A few steps on a letter that is not its own, behind "Answer:" after one question: that letter is chosen there."""
    model, params = loaded
    chooser = multiple_choice.Chooser(model, mesh, batch_size=1, limit=512)
    ids = prompt_ids(model, *QUESTIONS[0])
    (before,) = chooser(params, [ids])
    letter = "ABCD"[("ABCD".index(before.letter) + 1) % 4]
    lead, whole = (model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("Answer:", f"Answer: {letter}"))
    row, n = jnp.array([[*ids, *whole]]), len(whole) - len(lead)

    @jax.jit
    def step(params):
        def loss(params):
            decoder = nnx.merge(model.graphdef, params)
            hidden = decoder(row, jnp.arange(row.shape[1])[None], jnp.ones_like(row, bool))
            log_probs = jax.nn.log_softmax(decoder.logits(hidden[0, -n - 1 : -1]))
            return -jnp.sum(log_probs[jnp.arange(n), row[0, -n:]])

        return jax.tree.map(lambda p, g: p - 0.003 * g, params, jax.grad(loss)(params))

    for _ in range(30):
        params = step(params)
    (after,) = chooser(params, [ids])
    assert after.letter == letter and max(after.log_likelihoods) > max(before.log_likelihoods) + 1


def test_letters_that_look_alike(tmp_path, mesh):
    """A word tokenizer that knows none of them writes the same token for each."""
    directory = write_model(tmp_path / "words")
    model = pretrained.load(str(directory), dtype="float32", param_dtype="float32", remat="none", mesh=mesh)
    with pytest.raises(ValueError, match="two of A, B, C, D alike"):
        multiple_choice.Chooser(model, mesh, batch_size=1, limit=64)
