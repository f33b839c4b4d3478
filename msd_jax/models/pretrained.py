"""A Hugging Face model as this project uses it: decoder, tokenizer and stop tokens, found by path or hub id."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from msd_jax import prompts, sharding
from msd_jax.models import config as model_config
from msd_jax.models import decoder, weights


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Everything of a model but its weights.

    Attributes:
      directory: the local Hugging Face directory.
      config: sizes and family differences.
      graphdef, abstract, axes: of the decoder: structure, ShapeDtypeStructs and logical axes of its params.
      dtype: of activations and of generation.
      tokenizer: transformers' fast tokenizer.
      stop_ids: tokens that end a response.
      pad_id: fills unused columns; masks never look at it.
    """

    directory: pathlib.Path
    config: model_config.DecoderConfig
    graphdef: nnx.GraphDef
    abstract: decoder.Params
    axes: Any
    dtype: jnp.dtype
    tokenizer: Any
    stop_ids: tuple[int, ...]
    pad_id: int

    def shardings(self, mesh: Mesh, rules: sharding.Rules) -> Any:
        return sharding.param_shardings(mesh, self.abstract, self.axes, rules)

    def params(self, mesh: Mesh, directory: pathlib.Path | None = None) -> decoder.Params:
        """Weights of `directory` (default: the model's own) in the training layout."""
        dtype = jax.tree.leaves(self.abstract)[0].dtype
        return weights.read(directory or self.directory, self.config, dtype, self.shardings(mesh, sharding.TRAIN))


def load(path: str, *, dtype: str, param_dtype: str, remat: str) -> Pretrained:
    """Reads all of a model but its weights; `path` is a directory or a hub id.

    Raises:
      FileNotFoundError, ValueError: with one message that names the file and what is wrong with it.
    """
    directory = weights.resolve(path)
    config = model_config.read(directory)
    weights.check(directory, config)
    tokenizer = prompts.load_tokenizer(str(directory))
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens, config.json's vocab_size is {config.vocab_size}"
        )
    graphdef, abstract, axes = decoder.abstract(
        config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype), remat=remat
    )
    stop_ids = prompts.stop_token_ids(tokenizer, str(directory))
    return Pretrained(
        directory=directory,
        config=config,
        graphdef=graphdef,
        abstract=abstract,
        axes=axes,
        dtype=jnp.dtype(dtype),
        tokenizer=tokenizer,
        stop_ids=tuple(stop_ids),
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stop_ids),
    )
