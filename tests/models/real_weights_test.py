"""Real checkpoints, SmolLM2-135M-Instruct and Gemma 3 270M, against transformers' PyTorch models.

Set MSD_JAX_SMOLLM2 and MSD_JAX_GEMMA3 to their directories in float32; without them these tests are skipped.
"""

import functools
import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msd_jax import losses
from msd_jax.generation import rollout
from msd_jax.models import decoder, export, forward, pretrained
from msd_jax.models.tokenizer import token_ids
from msd_jax.parallel import padding, sharding
from msd_jax.training import packing
from msd_jax.training.completions import both_logits
from tests.models.formats_test import OTHER_PYTHON

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
import transformers  # noqa: E402

TEXTS = (
    *("How do I boil an egg?", "Nitapikaje wali na maharagwe kwa watu wanne?", "Ciao"),
    *("আমি কীভাবে ভাত রান্না করব?", "ฉันจะหุงข้าวอย่างไร", "كيف أطبخ الأرز لأربعة أشخاص؟", "Kepriye carane masak sega?"),
    *("Báwo ni mo ṣe lè se ìrẹsì?", "쌀밥은 어떻게 짓나요?"),
)


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def directory(request):
    variable = f"MSD_JAX_{request.param.upper()}"
    if not os.environ.get(variable):
        pytest.skip(f"{variable} does not name a directory of {request.param}")
    return os.environ[variable]


@pytest.fixture(scope="module")
def model(directory):
    return pretrained.load(directory, dtype="float32", param_dtype="float32", remat="full")


@pytest.fixture(scope="module")
def params(model):
    return model.params(sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def reference(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def torch_log_probs(reference, ids):
    with torch.no_grad():
        return torch.log_softmax(reference(torch.tensor(np.asarray(ids))[None]).logits[0].double(), -1).numpy()


def padded(model, rng):
    """Real prompts of several lengths and a random one, left-padded, and random responses, right-padded."""
    rows = [
        token_ids(model.tokenizer, [{"role": "user", "content": text}], {"enable_thinking": False}) for text in TEXTS
    ]
    rows.append(rng.integers(0, model.config.vocab_size, 23).astype(np.int32))
    P, R = max(map(len, rows)) + 3, 12
    prompt = np.full((len(rows), P), model.pad_id, np.int32)
    for row, ids in zip(prompt, rows):
        row[P - len(ids) :] = ids
    response = rng.integers(0, model.config.vocab_size, (len(rows), R)).astype(np.int32)
    return prompt, np.array([len(ids) for ids in rows]), response, np.array([12, 5, 1, 9, *[12] * (len(rows) - 4)])


def test_log_probs_equal_pytorch(model, params, reference, rng):
    prompt, length, response, response_length = padded(model, rng)
    run = jax.jit(forward.response_logits, static_argnums=0)
    actual = np.asarray(jax.nn.log_softmax(run(model.graphdef, params, prompt, length, response, response_length)))
    for row, (p, r) in enumerate(zip(length, response_length)):
        sequence = np.concatenate([prompt[row, -p:], response[row, :r]])
        expected = torch_log_probs(reference, sequence)[p - 1 : p + r - 1]
        np.testing.assert_allclose(actual[row, :r], expected, atol=2e-4, rtol=0)


def test_cached_decoding_equals_pytorch(model, params, reference, rng):
    prompt, length, response, _ = padded(model, rng)
    (B, P), steps = prompt.shape, 6
    position, valid = forward.prompt_layout(jnp.array(length), P)

    @functools.partial(jax.jit, static_argnums=0)
    def run(step, params, *inputs):
        merged = nnx.merge(model.graphdef, params)
        hidden, cache = step(merged, *inputs)
        return jax.nn.log_softmax(merged.logits(hidden[:, -1])), cache

    cache = decoder.init_cache(model.config, B, P + steps, jnp.float32)
    log_probs, cache = run(decoder.Decoder.prefill, params, prompt, position, valid, cache)
    for t in range(steps):
        for row, p in enumerate(length):
            sequence = np.concatenate([prompt[row, -p:], response[row, :t]])
            expected = torch_log_probs(reference, sequence)[-1]
            np.testing.assert_allclose(log_probs[row], expected, atol=2e-4, rtol=0)
        position = jnp.array(length)[:, None] + t
        log_probs, cache = run(decoder.Decoder.decode, params, response[:, t : t + 1], position, cache, P + t)


def changed(params):
    return params | {"final_norm": params["final_norm"] * 1.1}


def test_the_exported_directory_gives_the_same_logits(directory, model, params, reference, tmp_path):
    export.save(tmp_path / "out", changed(params), pathlib.Path(directory))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS[1:4]:
        ids = tokens(text)["input_ids"]
        merged = nnx.merge(model.graphdef, changed(params))
        hidden = merged(jnp.array(ids)[None], jnp.arange(len(ids))[None], jnp.ones((1, len(ids)), bool))
        actual = jax.nn.log_softmax(merged.logits(hidden)[0])
        np.testing.assert_allclose(actual, torch_log_probs(exported, ids), atol=2e-4, rtol=0)
        assert np.abs(torch_log_probs(reference, ids) - torch_log_probs(exported, ids)).max() > 1e-2


OTHER = """
import json, sys
import numpy as np, torch, transformers
assert transformers.__version__.startswith("4.57"), transformers.__version__
out, rows = sys.argv[1], json.loads(sys.argv[2])
model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(out)
with torch.no_grad():
    for i, (text, ids) in enumerate(rows):
        messages = [{"role": "user", "content": text}]
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == ids, text
        np.save(f"{out}/{i}.npy", model(torch.tensor([ids])).logits[0].numpy())
"""


@pytest.mark.skipif(not OTHER_PYTHON, reason="MSD_JAX_TRANSFORMERS4 names no interpreter with transformers 4.57")
def test_transformers_4_computes_the_same_from_an_export(directory, model, params, tmp_path):
    """The same ids of a prompt, and the same logits."""
    out = tmp_path / "out"
    export.save(out, changed(params), pathlib.Path(directory), companions=model.companions())
    exported = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    prompts = {text: token_ids(model.tokenizer, [{"role": "user", "content": text}], {}).tolist() for text in TEXTS}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [OTHER_PYTHON, "-c", OTHER, str(out), json.dumps(list(prompts.items()))]
    subprocess.run(command, check=True, env=environment)
    with torch.no_grad():
        for i, ids in enumerate(prompts.values()):
            np.testing.assert_allclose(np.load(out / f"{i}.npy"), exported(torch.tensor([ids])).logits[0], atol=1e-4)


@pytest.mark.parametrize("directory", ["smollm2"], indirect=True)
def test_bfloat16_is_close_to_float32(directory, model, params):
    """On the model's own greedy replies: log-probabilities within 3e-2 in the mean by probability, loss within 2%."""
    half = pretrained.load(directory, dtype="bfloat16", param_dtype="float32", remat="full")
    rows = [token_ids(model.tokenizer, [{"role": "user", "content": text}], {}) for text in TEXTS[:3]]
    hints = [np.concatenate([model.tokenizer("Think first: is it safe?")["input_ids"], row]) for row in rows]
    (student, student_length), (teacher, teacher_length) = (
        padding.left_pad(prompt, 96, model.pad_id) for prompt in (rows, hints)
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    greedy = rollout.Generator(model.graphdef, mesh, rollout.Sampling(24, 0.0), model.stop_ids, model.pad_id)
    hash_B, active_B = np.arange(len(rows), dtype=np.uint32), np.ones(len(rows), bool)
    written = greedy(params, student, student_length, hash_B, active_B, jax.random.key(0))
    mask = np.asarray(forward.response_mask(written.length_B, 24))
    batch = packing.TrainBatch(
        student, student_length, teacher, teacher_length, np.asarray(written.response_BxR), np.asarray(written.length_B)
    )

    @functools.partial(jax.jit, static_argnums=0)
    def run(graphdef, params):
        student, teacher = both_logits(graphdef, params, params, batch)
        total, normaliser, _ = losses.dpsw_loss(student, teacher, batch.response_BxR, mask)
        return jax.nn.log_softmax(student), losses.mean_loss(total, normaliser)

    (exact, exact_loss), (rounded, rounded_loss) = run(model.graphdef, params), run(half.graphdef, params)
    difference = np.sum(np.exp(exact) * np.abs(exact - rounded), axis=-1)[mask]
    print(f"mean {difference.mean():.4f}, largest {difference.max():.4f}; losses {exact_loss:.5f}, {rounded_loss:.5f}")
    assert difference.mean() < 3e-2
    assert abs(rounded_loss / exact_loss - 1) < 0.02
