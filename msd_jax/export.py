"""params -> a Hugging Face directory that transformers, vLLM and the like load (`python -m msd_jax.export`)."""

import json
import pathlib
import shutil

import jax

from msd_jax.models import config as model_config
from msd_jax.models import decoder, weights


def save(
    directory: pathlib.Path,
    params: decoder.Params,
    source: pathlib.Path,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes `params` to `directory` in the layout of the model that they came from.

    Args:
      directory: replaced as a whole, and only when everything is written.
      params: of the decoder that SOURCE/config.json describes.
      source: the Hugging Face directory whose config.json and tokenizer go along.
      dtype: of the tensors; None takes the one that SOURCE/config.json names.
      max_shard_bytes: above this size the weights are split over several files with an index.
    """
    config = model_config.read(source)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    dtype = dtype or values.get("dtype") or values.get("torch_dtype") or "float32"
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    weights.write(unfinished, params, config, jax.numpy.dtype(dtype), max_shard_bytes)
    weights.copy_tokenizer(source, unfinished)
    values.pop("torch_dtype", None)
    (unfinished / "config.json").write_text(json.dumps(values | {"dtype": dtype}, indent=2) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    unfinished.rename(directory)
