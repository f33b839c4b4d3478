"""Eight fake devices for every test, quick compilation, and a tiny random model in Hugging Face's format."""

import os

from tests import quick

os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", quick.COMPILATION)
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import gc
import json
import pathlib
import tempfile
import zlib

import jax
import numpy as np
import pytest
import tokenizers
import transformers

from msd_jax.models import config as model_config
from msd_jax.models import decoder, export

# For the processes that tests start; JAX has read its environment in this one, which keeps nothing.
COMPILED = tempfile.TemporaryDirectory(prefix="compiled")
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"  # data and models that are not part of this project; tests skip without

MAPPINGS = 30_000  # Linux lets a process have 65,530, and XLA ends one that needs more


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """After a module, where the compiled programs of those before take many of the process's mappings of memory."""
    yield
    if len(pathlib.Path("/proc/self/maps").read_bytes().splitlines()) > MAPPINGS:
        jax.clear_caches()
        gc.collect()


WORDS = (
    "how",
    "do",
    "i",
    "wash",
    "make",
    "a",
    "cup",
    "bomb",
    "?",
    "vipi",
    "kikombe",
    "bomu",
    "answer",
    "in",
    "no",
    "yes",
)
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
    "dtype": "float32",
}


def write_tokenizer(directory: pathlib.Path) -> None:
    """A word-level chat tokenizer whose pad token is its eos token and whose turns end in another."""
    special = ["<unk>", "<eos>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<eos>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = CHATML
    fast.save_pretrained(directory)


def write_model(directory: pathlib.Path, seed: int = 0, **overrides) -> pathlib.Path:
    """A tiny random model directory, its weights and tokenizer included."""
    source = directory.with_name(directory.name + ".source")
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(LLAMA | overrides))
    write_tokenizer(source)
    config = model_config.read(source)
    _, params = decoder.init(config, jax.random.key(seed))
    export.save(directory, params, source)
    return directory


def slow_disk(directory: pathlib.Path, name: str, seconds: float) -> dict[str, str]:
    """Environment of a Python in which every copy of a file of this name takes so long, as on storage that is slow."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(
        "import pathlib, shutil, time\n"
        "def copyfile(source, target, *, copy=shutil.copyfile):\n"
        "    copied = copy(source, target)\n"
        f"    time.sleep({seconds} if pathlib.Path(source).name == {name!r} else 0)\n"
        "    return copied\n"
        "shutil.copyfile = copyfile\n"
    )
    return {"PYTHONPATH": str(directory)}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> pathlib.Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Fresh for each test, and the same each time."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))
