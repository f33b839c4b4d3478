"""The decoder against transformers' PyTorch models: every family, ragged left-padded batches, cached decoding."""

import copy
import dataclasses
import functools
import itertools
import pathlib

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from msd_jax import losses
from msd_jax.generation import rollout
from msd_jax.models import config as model_config
from msd_jax.models import decoder, export, forward, layout, lora, peft, weights
from msd_jax.parallel import sharding
from msd_jax.training import packing
from msd_jax.training.completions import both_logits

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers")

# Awkward on purpose: odd layer count, a vocabulary that no block divides, sequences beyond the sliding window.
SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20}
GEMMA3 = GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8, "vision_use_head": False, "model_type": "siglip_vision_model"}
GEMMA3_WITH_IMAGES = {"text_config": SIZES | GEMMA3, "vision_config": VISION, "mm_tokens_per_image": 4}
GEMMA3_WITH_IMAGES |= {"image_token_index": 130, "boi_token_index": 129, "eoi_token_index": 128}
# A head of 16, of which RoPE rotates 12.
PARTIAL = {"partial_rotary_factor": 0.75, "rope_theta": 1e4}
LONG_ROPE = PARTIAL | {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 3.0],
    "long_factor": [9.0] * 6,
}
LONG_ROPE |= {"original_max_position_embeddings": 128}
NO_PAD = {"pad_token_id": None}  # whose embedding would be zero and take no gradient
FAMILIES = {
    "llama2": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama3": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama_yarn": ("LlamaConfig", {"rope_parameters": YARN_ROPE}),
    "llama_linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "olmo2": ("Olmo2Config", NO_PAD),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "gemma2": ("Gemma2Config", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", GEMMA3),
    "gemma3_with_images": ("Gemma3Config", GEMMA3_WITH_IMAGES),
    "cohere": ("CohereConfig", NO_PAD | {"logit_scale": 0.3}),
    "cohere_qk_norm": ("CohereConfig", NO_PAD | {"use_qk_norm": True, "num_attention_heads": 4}),
    "cohere2": ("Cohere2Config", NO_PAD | {"sliding_window": 8, "num_hidden_layers": 5}),
    "phi3": ("Phi3Config", NO_PAD | {"sliding_window": 8}),
    "phi4": (
        "Phi3Config",
        NO_PAD
        | {"hidden_size": 96, "tie_word_embeddings": True, "rope_parameters": LONG_ROPE}
        | {"original_max_position_embeddings": 128},
    ),
    "smollm3": ("SmolLM3Config", NO_PAD | {"num_hidden_layers": 5}),
    "olmo3": (
        "Olmo3Config",
        NO_PAD
        | {"sliding_window": 8, "num_hidden_layers": 5}
        | {"rope_parameters": {"sliding_attention": {"rope_type": "default"}, "full_attention": YARN_ROPE}},
    ),
    "granite": (
        "GraniteConfig",
        NO_PAD
        | {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "tie_word_embeddings": True}
        | {"attention_multiplier": 0.09, "logits_scaling": 1.7},
    ),
    "apertus": ("ApertusConfig", NO_PAD | {"rope_parameters": LLAMA3_ROPE}),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """One random model, in PyTorch and here."""

    directory: pathlib.Path
    torch_model: object
    config: model_config.DecoderConfig
    graphdef: nnx.GraphDef
    params: decoder.Params

    def torch_log_probs(self, tokens, valid, positions):
        with torch.no_grad():
            logits = self.torch_model(
                input_ids=torch.tensor(tokens),
                attention_mask=torch.tensor(valid.astype(int)),
                position_ids=torch.tensor(positions),
            ).logits
        return torch.log_softmax(logits.double(), -1).numpy()


@pytest.fixture(scope="module", params=FAMILIES, ids=list(FAMILIES))
def pair(request, tmp_path_factory) -> Pair:
    name, options = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**options if "text_config" in options else SIZES | options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # norms and biases start at constants that would hide a fault
        for key, value in model.named_parameters():
            if "norm" in key or "bias" in key or "alpha" in key:
                value.add_(0.3 * torch.randn_like(value))
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    ours = model_config.read(directory)
    return Pair(
        directory, model, ours, decoder.abstract(ours)[0], weights.read(directory, ours, decoder.abstract(ours)[1])
    )


def ragged(rng, rows=3, T=29):
    """tokens, valid, positions of a left-padded batch, longer than the sliding window of 8."""
    lengths = np.array([T, 11, 20])[:rows]
    valid = np.arange(T) >= T - lengths[:, None]
    return rng.integers(0, SIZES["vocab_size"], (rows, T)), valid, np.maximum(np.cumsum(valid, 1) - 1, 0)


def test_log_probs_equal_pytorch(pair, rng):
    tokens, valid, positions = ragged(rng)

    @jax.jit
    def run(params, *inputs):
        model = nnx.merge(pair.graphdef, params)
        return jax.nn.log_softmax(model.logits(model(*inputs)))

    actual = run(pair.params, tokens, positions, valid)
    expected = pair.torch_log_probs(tokens, valid, positions)
    np.testing.assert_allclose(np.asarray(actual)[valid], expected[valid], atol=2e-4, rtol=0)


def test_cached_decoding_equals_pytorch(pair, rng):
    """A prompt at once, or in two parts, of which the second attends to the cache, and then token by token."""
    tokens, valid, positions = ragged(rng)
    T = tokens.shape[1]

    @functools.partial(jax.jit, static_argnums=0)
    def run(step, params, *inputs):
        model = nnx.merge(pair.graphdef, params)
        hidden, cache = step(model, *inputs)
        return jax.nn.log_softmax(model.logits(hidden)), cache

    def decoded(P):
        cache = decoder.init_cache(pair.config, len(tokens), T, jnp.float32)
        prompt = tokens[:, :P], positions[:, :P], valid[:, :P]
        log_probs, cache = run(decoder.Decoder.prefill, pair.params, *prompt, cache)
        yield log_probs
        for first, last in [(P, 20)] * (P < 20) + [(t, t + 1) for t in range(20, T)]:
            inputs = tokens[:, first:last], positions[:, first:last], cache, first
            log_probs, cache = run(decoder.Decoder.decode, pair.params, *inputs)
            yield log_probs

    expected = pair.torch_log_probs(tokens, valid, positions)
    for P in (20, 7):
        actual = np.concatenate(list(decoded(P)), axis=1)
        np.testing.assert_allclose(actual[valid], expected[valid], atol=2e-4, rtol=0)


def test_greedy_generation_equals_transformers(pair, rng):
    tokens, valid, _ = ragged(rng, T=20)
    lengths = valid.sum(1).astype(np.int32)
    new = 64
    with torch.no_grad():
        expected = pair.torch_model.generate(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(valid.astype(int)),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        ).numpy()[:, tokens.shape[1] :]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    greedy = rollout.Sampling(new, temperature=0.0)
    generator = rollout.Generator(pair.graphdef, mesh, greedy, stop_ids=(-1,), pad_id=0)
    ones = np.ones(len(tokens))
    actual = generator(
        pair.params, tokens.astype(np.int32), lengths, ones.astype(np.uint32), ones.astype(bool), jax.random.key(0)
    )
    np.testing.assert_array_equal(np.asarray(actual.response_BxR), expected)


def test_response_logits_equal_pytorch_on_the_unpadded_sequence(pair, rng):
    """Each row alone, without padding, through PyTorch: the layout adds nothing and shifts nothing."""
    P, R = 13, 9
    prompt_lengths, response_lengths = np.array([13, 4, 1, 7]), np.array([9, 5, 9, 1])
    prompt = rng.integers(0, SIZES["vocab_size"], (4, P))
    response = rng.integers(0, SIZES["vocab_size"], (4, R))
    run = jax.jit(forward.response_logits, static_argnums=0)
    logits = run(pair.graphdef, pair.params, prompt, prompt_lengths, response, response_lengths)
    actual = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    for row, (p, r) in enumerate(zip(prompt_lengths, response_lengths)):
        sequence = np.concatenate([prompt[row, P - p :], response[row, :r]])[None]
        expected = pair.torch_log_probs(sequence, np.ones_like(sequence), np.arange(p + r)[None])[0]
        np.testing.assert_allclose(actual[row, :r], expected[p - 1 : p + r - 1], atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_is_bit_identical(pair, tmp_path, dtype):
    """In the checkpoint's own dtype, and transformers computes the same from it. Image encoders get the hub's names."""
    copy.deepcopy(pair.torch_model).to(getattr(torch, dtype)).save_pretrained(tmp_path / "in")
    _, abstract, _ = decoder.abstract(pair.config, param_dtype=jnp.dtype(dtype))
    export.save(tmp_path / "out", weights.read(tmp_path / "in", pair.config, abstract), tmp_path / "in")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    before = {layout.carried_name(name, pair.config): tensor for name, tensor in before.items()}
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(tensor, after[name], err_msg=name)
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, attn_implementation="eager")
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        logits = [load(tmp_path / name)(tokens).logits for name in ("in", "out")]
    assert logits[0].dtype == getattr(torch, dtype) and torch.equal(*logits)


@pytest.mark.parametrize("targets", [lora.ADAPTABLE, ("key", "up", "down")], ids=["all", "some"])
def test_adapters_in_peft_and_merged(pair, tmp_path, rng, targets):
    """Those of matrices that share a tensor, too, and of a decoder within a larger model."""
    peft_library = pytest.importorskip("peft")
    adapters = lora.Lora(3, 7.0, targets)
    graphdef, params = decoder.init(pair.config, jax.random.key(0), lora=adapters)
    new, _ = decoder.split(params, lora.is_adapter)
    new = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), new)
    params = decoder.join(pair.params, new)
    tokens = rng.integers(0, SIZES["vocab_size"], (2, 11))

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        positions = np.broadcast_to(np.arange(11), tokens.shape)
        return model.logits(model(tokens, positions, np.ones(tokens.shape, bool)))

    (tmp_path / "adapter").mkdir()
    peft.write(tmp_path / "adapter", jax.device_get(params), adapters, pair.config, "base")
    export.save(tmp_path / "merged", params, pair.directory, lora=adapters)
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, attn_implementation="eager")
    with_adapter = peft_library.PeftModel.from_pretrained(load(pair.directory), tmp_path / "adapter")
    expected = np.asarray(run(params))
    with torch.no_grad():
        before = pair.torch_model(torch.tensor(tokens)).logits.numpy()
        for theirs in (with_adapter, load(tmp_path / "merged")):
            np.testing.assert_allclose(theirs(torch.tensor(tokens)).logits.numpy(), expected, atol=5e-4, rtol=1e-4)
    assert np.abs(before - expected).max() > 1e-2


def test_gradients_of_the_msd_loss_equal_autograd(pair, rng):
    """Reverse KL with DPSW weights, every parameter, against PyTorch's autograd in float64 on unpadded sequences."""
    B, P, Q, R = 3, 8, 14, 9
    # Not token 0: it is Gemma's pad, whose embedding is zero and takes no gradient in PyTorch.
    prompt, teacher_prompt, response = (jnp.array(rng.integers(1, SIZES["vocab_size"], (B, n))) for n in (P, Q, R))
    lengths = (jnp.array(rows) for rows in ([8, 3, 5], [14, 9, 12], [9, 4, 1]))
    batch = packing.TrainBatch(*itertools.chain(*zip((prompt, teacher_prompt, response), lengths)))

    @jax.jit
    @jax.grad
    def gradient(params):
        student, teacher = both_logits(pair.graphdef, params, pair.params, batch)
        mask = forward.response_mask(batch.response_length_B, R)
        total, normaliser, _ = losses.dpsw_loss(student, teacher, batch.response_BxR, mask)
        return losses.mean_loss(total, normaliser)

    actual = gradient(pair.params)

    model = copy.deepcopy(pair.torch_model).double()
    total, normaliser = 0.0, 0.0
    for row in range(B):
        response = np.asarray(batch.response_BxR[row, : batch.response_length_B[row]])

        def log_probs(prompt, length, response=response):
            ids = torch.tensor(np.concatenate([np.asarray(prompt)[-int(length) :], response]))[None]
            return torch.log_softmax(model(ids).logits[0, int(length) - 1 : -1], -1)

        student = log_probs(batch.student_prompt_BxP[row], batch.student_length_B[row])
        with torch.no_grad():
            teacher = log_probs(batch.teacher_prompt_BxP[row], batch.teacher_length_B[row])
            top = torch.softmax(torch.topk(teacher, 20).values, -1)
            w_teacher = 1 + (top * top.log()).sum(-1) / np.log(20)
            w_student = 1 - student.gather(-1, teacher.argmax(-1, keepdim=True))[:, 0].exp()
            weight = w_teacher * w_student
        total = total + (weight * (student.exp() * (student - teacher)).sum(-1)).sum()
        normaliser += weight.sum()
    (total / normaliser).backward()
    expected = {layout.in_file(name): p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}

    table = layout.layout(pair.config)
    for name, grad in decoder.flat(actual):
        tensor, pattern, row = table[name]
        left, right = pattern.split("->")
        for layer, value in enumerate(np.asarray(grad) if "{}" in tensor else [np.asarray(grad)]):
            value = einops.rearrange(value, f"{right} -> {left}")
            wanted = expected[tensor.format(layer)][row : row + len(value)]
            assert np.linalg.norm(value - wanted) <= 1e-3 * np.linalg.norm(wanted) > 0, (name, layer)
