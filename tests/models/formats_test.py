"""Checkpoints as others write them, in and out again: heads, indexes, stop tokens, and what other releases read."""

import copy
import json
import os
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from msd_jax.errors import UserError
from msd_jax.models import config as model_config
from msd_jax.models import export, layout, pretrained, releases, tensor_files, trained, weights
from msd_jax.parallel import sharding
from tests.conftest import LLAMA, write_tokenizer

OPTIONS = {"dtype": "float32", "param_dtype": "float32", "remat": "none"}
OTHER_PYTHON = os.environ.get("MSD_JAX_TRANSFORMERS4", "")  # an interpreter that has transformers 4.57
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 64}
GEMMA3 = LLAMA | {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
del GEMMA3["rope_theta"]
QWEN3 = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 8}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}  # the families' own are beyond the vocabulary
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.2, 1.5], "long_factor": [4.0] * 3, "rope_theta": 1e4}
LONG_ROPE |= {"original_max_position_embeddings": 64, "partial_rotary_factor": 0.75}
YARN_ROPE = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 5e5}
# As transformers 5 writes them.
NEWER = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 3e5}} | {"tie_word_embeddings": False},
    "llama3": {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}},
    "qwen3": QWEN3 | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}},
    "gemma3": GEMMA3
    | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "cohere": {"model_type": "cohere", "architectures": ["CohereForCausalLM"], "logit_scale": 0.5}
    | SPECIAL
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 4e6}, "use_qk_norm": True},
    "cohere2": {"model_type": "cohere2", "architectures": ["Cohere2ForCausalLM"], "logit_scale": 0.5}
    | SPECIAL
    | WINDOWS
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    "phi4": {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 64}
    | SPECIAL
    | {"rope_parameters": LONG_ROPE, "sliding_window": 4},
    "phi3": {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "tie_word_embeddings": False}
    | SPECIAL
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 2.5e5, "partial_rotary_factor": 1.0}},
    "smollm3": {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0, 1]}
    | SPECIAL
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    "olmo3": {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "tie_word_embeddings": False}
    | SPECIAL
    | WINDOWS
    | {
        "rope_parameters": {
            "full_attention": YARN_ROPE,
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        }
    },
    "granite": {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "logits_scaling": 2.0}
    | SPECIAL
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7}, "attention_multiplier": 0.3}
    | {"embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "apertus": {"model_type": "apertus", "architectures": ["ApertusForCausalLM"], "hidden_act": "xielu"}
    | SPECIAL
    | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 1.2e7}, "tie_word_embeddings": False},
}


def made(directory: pathlib.Path, dtype=np.float32, **changes) -> pathlib.Path:
    """A model directory with random tensors; a change to None removes the key of config.json."""
    directory.mkdir(parents=True)
    values = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(values))
    write_tokenizer(directory)
    rng = np.random.default_rng(0)
    shapes = layout.shapes(model_config.read(directory))
    tensors = {name: (0.3 * rng.normal(size=shape)).astype(dtype) for name, shape in shapes.items()}
    if values["model_type"] == "apertus":  # the parameters of its activation are bfloat16 in transformers 4
        tensors = {name: x.astype(jnp.bfloat16).astype(dtype) if "act_fn" in name else x for name, x in tensors.items()}
        for layer in range(3):
            constants = {"beta": 0.5, "eps": -1e-6}
            tensors |= {f"model.layers.{layer}.mlp.act_fn.{n}": np.array(x, dtype) for n, x in constants.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def add_tensor(directory: pathlib.Path, name: str, value: np.ndarray) -> None:
    file = directory / "model.safetensors"
    save_file(load_file(file) | {name: value}, file, metadata={"format": "pt"})


def exported(source: pathlib.Path, out: pathlib.Path) -> pretrained.Pretrained:
    """The model of `source`, written to `out` as it came."""
    model = pretrained.load(str(source), **OPTIONS)
    params = model.params(sharding.make_mesh(devices=jax.devices()[:1]))
    export.save(out, params, source, companions=model.companions())
    return model


def values_of(file: pathlib.Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture
def told(monkeypatch) -> list[str]:
    lines = []
    monkeypatch.setattr(pretrained, "log", lines.append)
    return lines


def torch_logits(directory: pathlib.Path, tokens: np.ndarray, dtype: str = "float32") -> np.ndarray:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    with torch.no_grad():
        return model.to(getattr(torch, dtype))(torch.tensor(tokens)).logits.numpy()


TOKENS = np.arange(24).reshape(2, 12)


def test_a_stored_head_that_differs_is_used_and_exported(tmp_path, told):
    source = made(tmp_path / "source", tie_word_embeddings=True)
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    add_tensor(source, "lm_head.weight", embedding[::-1].copy())
    model = exported(source, tmp_path / "out")
    assert not model.config.tied_embeddings and len(told) == 1 and "lm_head.weight differs" in told[0]
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    assert values_of(tmp_path / "out" / "config.json")["tie_word_embeddings"] is False  # for transformers 4

    params = model.params(sharding.make_mesh(devices=jax.devices()[:1]))
    positions = np.broadcast_to(np.arange(12), TOKENS.shape)

    @jax.jit
    def logits(params):
        ours = nnx.merge(model.graphdef, params)
        return ours.logits(ours(TOKENS, positions, np.ones(TOKENS.shape, bool)))

    for directory in (source, tmp_path / "out"):
        np.testing.assert_allclose(torch_logits(directory, TOKENS), logits(params), atol=2e-4)


def test_a_stored_head_that_is_the_embedding_stays_tied(tmp_path, told):
    source = made(tmp_path / "source", tie_word_embeddings=True)
    add_tensor(source, "lm_head.weight", load_file(source / "model.safetensors")["model.embed_tokens.weight"])
    assert weights.read_config(source).tied_embeddings
    exported(source, tmp_path / "out")
    assert not told and "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert values_of(tmp_path / "out" / "config.json")["tie_word_embeddings"] is True


def test_a_checkpoint_with_another_head_than_the_models_is_refused(tmp_path):
    model = pretrained.load(str(made(tmp_path / "tied", tie_word_embeddings=True)), **OPTIONS)
    other = made(tmp_path / "other", tie_word_embeddings=True)
    add_tensor(other, "lm_head.weight", np.ones((40, 32), np.float32))
    with pytest.raises(UserError, match=r"^--checkpoint=\S+other has an lm_head.weight of its own"):
        trained.load_params(str(other), model, sharding.make_mesh())


def test_a_head_of_another_shape_is_named(tmp_path):
    source = made(tmp_path / "source", tie_word_embeddings=True)
    add_tensor(source, "lm_head.weight", np.ones((41, 32), np.float32))
    with pytest.raises(UserError, match=r"lm_head.weight has shape \(41, 32\), config.json asks for \(40, 32\)"):
        pretrained.load(str(source), **OPTIONS)


def test_a_stale_index_is_told_and_passed_over(tmp_path, told):
    source = made(tmp_path / "source")
    stale = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (source / tensor_files.INDEX).write_text(json.dumps(stale))
    pretrained.load(str(source), **OPTIONS)
    assert len(told) == 1 and "does not name model.safetensors beside it; ignored" in told[0]
    # An index that speaks of the file decides.
    (source / tensor_files.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))
    with pytest.raises(UserError, match="does not expect there"):
        pretrained.load(str(source), **OPTIONS)


def test_each_tensor_keeps_its_dtype(tmp_path):
    """Whatever config.json calls the dtype of all."""
    source = made(tmp_path / "source", dtype=jnp.bfloat16)
    add_tensor(source, "model.norm.weight", np.float32([0.1] * 32))
    add_tensor(source, "model.layers.1.input_layernorm.weight", np.float16([0.1] * 32))
    exported(source, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.tobytes() == after[name].tobytes(), name


@pytest.mark.parametrize(
    "generation, config, expected, kept",
    [
        (None, [3, 5], (1, 3, 5), {"pad_token_id": 1}),
        (None, 5, (1, 3, 5), {"pad_token_id": 1}),
        ({"eos_token_id": 6, "top_k": 2}, [5], (1, 3, 6), {"top_k": 2}),
        ({"temperature": 0.5, "_from_model_config": True}, [5], (1, 3, 5), {"temperature": 0.5}),
        ({"eos_token_id": [3, 1], "top_k": 2}, [5], (1, 3), None),
    ],
)
def test_stop_tokens_of_config_json(tmp_path, generation, config, expected, kept):
    """They count where generation_config.json names none, as for transformers; an export names all that were found."""
    source = made(tmp_path / "source", eos_token_id=config)
    if generation:
        (source / "generation_config.json").write_text(json.dumps(generation))
    model = pretrained.load(str(source), **OPTIONS)
    assert model.stop_ids == expected  # 1 is the tokenizer's eos, 3 ends a turn of its template
    companions = model.companions()
    if kept is None:  # the source's file names all of them, and is copied as it is
        assert not companions
    else:
        assert json.loads(companions["generation_config.json"]) == kept | {"eos_token_id": list(expected)}


@pytest.mark.parametrize("name", NEWER)
def test_older_keys_beside_newer_ones(name):
    """Ours read the same from the older keys alone; transformers 5 the same from both."""
    transformers = pytest.importorskip("transformers")
    newer = {key: value for key, value in (LLAMA | NEWER[name]).items() if key != "rope_theta"}
    both = releases.config_json(newer)
    older = {key: value for key, value in both.items() if key not in ("rope_parameters", "dtype")}
    assert model_config.from_dict(newer) == model_config.from_dict(both) == model_config.from_dict(older)
    assert both["torch_dtype"] == both["dtype"] == "float32"
    theirs = [transformers.AutoConfig.for_model(**copy.deepcopy(values)) for values in (newer, both, older)]
    for other in theirs[1:]:  # the older name of rope_type may stay beside it
        kept = {key: value for key, value in other.rope_parameters.items() if key != "type"}
        assert theirs[0].rope_parameters == kept
    assert releases.config_json(both) == both


def with_images(directory: pathlib.Path, hub: bool = True) -> pathlib.Path:
    """A Gemma 3 with an image encoder, as transformers 5 writes it, or (`hub`) in the names of the hub's files."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8, "model_type": "siglip_vision_model", "vision_use_head": False}
    text = {key: value for key, value in NEWER["gemma3"].items() if key != "architectures"} | SPECIAL
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, dtype="float32")
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    assert "vision_tower.post_layernorm.weight" in tensors
    if hub:
        tensors = {name.replace("vision_tower.", "vision_tower.vision_model."): x for name, x in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})
    write_tokenizer(directory)
    return directory


def test_a_model_with_images_keeps_all_that_is_not_trained(tmp_path):
    """Bit for bit, in their own dtypes; under either of the names that releases give the decoder's tensors."""
    source = with_images(tmp_path / "hub")
    tensors = load_file(source / "model.safetensors")
    vision = [name for name in tensors if "language_model" not in name]
    assert len(vision) > 10 and "language_model.model.norm.weight" in tensors
    tensors |= {vision[0]: tensors[vision[0]].astype(np.float16)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    other = tmp_path / "other"
    shutil.copytree(source, other)
    renamed = {
        name.replace("language_model.model.", "model.language_model.") if name not in vision else f"model.{name}": x
        for name, x in tensors.items()
    }
    save_file(renamed, other / "model.safetensors", metadata={"format": "pt"})
    for directory, before in ((source, tensors), (other, renamed)):
        model = pretrained.load(str(directory), **OPTIONS)
        params = model.params(sharding.make_mesh(devices=jax.devices()[:1]))
        params["final_norm"] += 0.5
        out = tmp_path / f"{directory.name}.out"
        export.save(out, params, directory, max_shard_bytes=20_000)  # several files
        files = tensor_files.open_all(out)
        after = {tensor.name: tensor.whole() for tensor in files.values()}
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            same = tensor.dtype == after[name].dtype and tensor.tobytes() == after[name].tobytes()
            assert same != name.endswith("language_model.norm.weight" if directory is other else "model.norm.weight")
        assert values_of(out / "config.json")["vision_config"] == values_of(directory / "config.json")["vision_config"]
        assert pretrained.load(str(out), **OPTIONS).config == model.config


def test_a_tensor_that_no_part_explains_is_left_over(tmp_path):
    source = with_images(tmp_path / "hub")
    add_tensor(source, "audio_tower.weight", np.ones(3, np.float32))
    with pytest.raises(UserError, match=r"left over: audio_tower\.weight"):
        pretrained.load(str(source), **OPTIONS)


def test_the_tokenizer_is_legible_to_older_releases(tmp_path):
    source = made(tmp_path / "source")
    assert values_of(source / "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    model = exported(source, tmp_path / "out")
    written = values_of(tmp_path / "out" / "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(written.get("extra_special_tokens"), list)
    again = pretrained.load(str(tmp_path / "out"), **OPTIONS)
    assert again.stop_ids == model.stop_ids
    assert again.tokenizer.added_tokens_decoder == model.tokenizer.added_tokens_decoder
    text = "<|im_start|> user make a cup <|im_end|>"
    assert again.tokenizer(text).input_ids == model.tokenizer(text).input_ids


OTHER = """
import json, sys
import numpy as np, torch, transformers
assert transformers.__version__.startswith("4.57"), transformers.__version__
tokens = torch.arange(24).reshape(2, 12)
for directory in sys.argv[1:]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "make a cup"}]
    dtype = str(model.dtype)
    with torch.no_grad():
        np.save(directory + "/logits.npy", model(tokens).logits.float().numpy())
        np.save(directory + "/exact.npy", model.double()(tokens).logits.numpy())
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    json.dump([ids, model.generation_config.eos_token_id, dtype], open(directory + "/seen.json", "w"))
"""
# How far transformers 4.57 is from its own float64, where that is not the rounding of float32: it keeps the parameters
# of xIELU in bfloat16, whatever the dtype of the model, and computes their softplus in it.
ROUNDED = {"apertus": 1e-2}


@pytest.mark.skipif(not OTHER_PYTHON, reason="MSD_JAX_TRANSFORMERS4 names no interpreter with transformers 4.57")
def test_transformers_4_computes_the_same_from_an_export(tmp_path):
    """Of sources that transformers 5 wrote, one of them with a head beside tied embeddings; in float64 as well."""
    for name, changes in NEWER.items():
        source = made(tmp_path / "sources" / name, **changes | {"rope_theta": None})
        if name == "llama3":
            add_tensor(source, "lm_head.weight", np.random.default_rng(1).normal(size=(40, 32)).astype(np.float32))
        exported(source, tmp_path / name)
    exported(with_images(tmp_path / "sources" / "gemma3_with_images", hub=False), tmp_path / "gemma3_with_images")
    names = [*NEWER, "gemma3_with_images"]
    directories = [str(tmp_path / name) for name in names]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([OTHER_PYTHON, "-c", OTHER, *directories], check=True, env=environment)
    for name in names:
        theirs, exact = (np.load(tmp_path / name / f"{kind}.npy") for kind in ("logits", "exact"))
        for directory in (tmp_path / name, tmp_path / "sources" / name):
            np.testing.assert_allclose(theirs, torch_logits(directory, TOKENS), atol=ROUNDED.get(name, 1e-5), rtol=0)
            np.testing.assert_allclose(exact, torch_logits(directory, TOKENS, "float64"), atol=1e-7, rtol=0)
        model = pretrained.load(str(tmp_path / name), **OPTIONS)
        ids = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": "make a cup"}], add_generation_prompt=True, return_dict=False
        )
        assert values_of(tmp_path / name / "seen.json") == [ids, list(model.stop_ids), "torch.float32"], name
