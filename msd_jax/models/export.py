"""params -> a Hugging Face directory that transformers, vLLM and the like load.

A run exports its last step; `python -m msd_jax.export --config configs/NAME.py --checkpoint WORKDIR/checkpoints/STEP
--out DIR` exports another.
"""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from msd_jax.models import config as model_config
from msd_jax.models import decoder, pretrained, weights
from msd_jax.models import lora as lora_lib
from msd_jax.parallel import distributed, sharding


def save(
    directory: pathlib.Path,
    params: decoder.Params,
    source: pathlib.Path,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    lora: lora_lib.Lora | None = None,
) -> None:
    """Writes `params` to `directory` in the layout of the model that they came from.

    Where they lie on the devices of several processes, all of them call this and process 0 writes.

    Args:
      directory: replaced as a whole, and only when everything is written.
      params: of the decoder that SOURCE/config.json describes.
      source: the Hugging Face directory whose config.json and tokenizer go along.
      dtype: of the tensors; None takes the one that SOURCE/config.json names.
      max_shard_bytes: above this size the weights are split over several files with an index.
      lora: settings of the adapters in `params`, which are merged into the matrices.
    """
    config = model_config.read(source)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    dtype = dtype or values.get("dtype") or values.get("torch_dtype") or "float32"
    values.pop("torch_dtype", None)
    if lora:
        params = lora_lib.merge(params, lora, jnp.dtype(dtype))
    tensors = weights.tensors(params, config, jnp.dtype(dtype))
    if not _writes(params):
        for _ in tensors:  # takes its part in gathering them
            pass
        return
    with _replacing(directory) as unfinished:
        weights.write(unfinished, tensors, max_shard_bytes)
        weights.copy_companions(source, unfinished)
        (unfinished / "config.json").write_text(json.dumps(values | {"dtype": dtype}, indent=2) + "\n")


def save_adapter(directory: pathlib.Path, params: decoder.Params, model: pretrained.Pretrained, base: str) -> None:
    """Writes the adapters alone, in PEFT's layout, with the tokenizer.

    Args:
      directory: replaced as a whole, and only when everything is written.
      params: holds the adapters.
      model: the model that they belong to.
      base: hub id or directory, named as the base model.
    """
    if model.lora is None:
        raise ValueError("the model has no adapters")
    adapters, _ = decoder.split(params, lora_lib.is_adapter)
    fetched = sharding.fetch(adapters)
    if not _writes(adapters):
        return
    with _replacing(directory) as unfinished:
        lora_lib.write_peft(unfinished, fetched, model.lora, weights.layout(model.config), base)
        model.tokenizer.save_pretrained(unfinished)


def _writes(params: decoder.Params) -> bool:
    """Whether this process writes `params`: process 0 does, and so does any process that alone holds them."""
    return distributed.is_first() or all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params))


@contextlib.contextmanager
def _replacing(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new directory to write into, which takes the place of `directory` once all is written."""
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    shutil.rmtree(directory, ignore_errors=True)
    unfinished.rename(directory)
