"""params -> a Hugging Face directory that transformers, vLLM and the like load.

A run exports its last step; `python -m msd_jax.export --config configs/NAME.py --checkpoint WORKDIR/checkpoints/STEP
--out DIR` exports another.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from msd_jax.models import config as model_config
from msd_jax.models import decoder, location, peft, pretrained, releases, tensor_files, weights
from msd_jax.models import lora as lora_lib
from msd_jax.parallel import distributed, sharding


def save(
    directory: pathlib.Path,
    params: decoder.Params,
    source: pathlib.Path,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    lora: lora_lib.Lora | None = None,
    companions: Mapping[str, str] | None = None,
) -> None:
    """Writes `params` to `directory` in the layout of the model that they came from.

    Where they lie on the devices of several processes, all of them call this and process 0 writes.

    Args:
      directory: replaced as a whole, and only when everything is written.
      params: of the decoder that SOURCE/config.json describes.
      source: the Hugging Face directory whose config.json and tokenizer go along.
      dtype: of the decoder's tensors; None leaves each in the dtype that it has in SOURCE, or, where that holds no
        weights, in the one that SOURCE/config.json names. Other tensors of SOURCE are copied as they are.
      max_shard_bytes: above this size the weights are split over several files with an index.
      lora: settings of the adapters in `params`, which are merged into the matrices.
      companions: further files, text by name, see Pretrained.companions.
    """
    original = model_config.read(source)
    config = dataclasses.replace(original, tied_embeddings="head" not in params)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if dtype:
        values["dtype"] = dtype
    if original.tied_embeddings and not config.tied_embeddings:
        values["tie_word_embeddings"] = False  # which only transformers 5 sees for itself
    fallback = jnp.dtype(values.get("dtype") or values.get("torch_dtype") or "float32")
    files = weights.Source.of(source)

    def exported_dtype(tensor: str) -> jnp.dtype:
        return jnp.dtype(dtype) if dtype else files.dtype(tensor, fallback)

    tensors = weights.tensors(params, config, exported_dtype, lora)
    if not _writes(params):
        for _ in tensors:  # takes its part in gathering them
            pass
        return
    with _replacing(directory) as unfinished:
        renamed = ((files.name(tensor, config), value) for tensor, value in tensors)
        weights.write(unfinished, itertools.chain(renamed, files.carried(config)), max_shard_bytes)
        copy_companions(source, unfinished)
        _write_json(unfinished / "config.json", releases.config_json(values))
        _write_texts(unfinished, companions or {})


def save_adapter(directory: pathlib.Path, params: decoder.Params, model: pretrained.Pretrained, base: str) -> None:
    """Writes the adapters alone, in PEFT's layout, with the tokenizer.

    Args:
      directory: replaced as a whole, and only when everything is written.
      params: holds the adapters.
      model: the model that they belong to.
      base: hub id or directory; of a directory its name alone is written down.
    """
    if model.lora is None:
        raise ValueError("the model has no adapters")
    adapters, _ = decoder.split(params, lora_lib.is_adapter)
    fetched = sharding.fetch(adapters)
    if not _writes(adapters):
        return
    with _replacing(directory) as unfinished:
        name = pathlib.Path(base).name if pathlib.Path(base).expanduser().exists() else base
        peft.write(unfinished, fetched, model.lora, model.config, name)
        copy_companions(model.directory, unfinished, location.TOKENIZER)
        _write_texts(unfinished, {name: t for name, t in model.companions().items() if name.endswith(".jinja")})


def copy_companions(source: pathlib.Path, target: pathlib.Path, patterns: Iterable[str] = location.COMPANIONS) -> None:
    """Copies a model directory without its weights: tokenizer, chat template, configs; the tokenizer for all releases.

    Args:
      source, target: directories.
      patterns: of the names of files.
    """
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.name != tensor_files.INDEX:
                shutil.copyfile(file, target / file.name)
    _rewrite(target / "tokenizer_config.json", releases.tokenizer_config)


def _write_texts(directory: pathlib.Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")


def _rewrite(file: pathlib.Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Applies `change` to a JSON object; a file that it leaves as it is keeps its bytes."""
    values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if (changed := change(values)) != values:
        _write_json(file, changed)


def _write_json(file: pathlib.Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
