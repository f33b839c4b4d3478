"""A Hugging Face model as this project uses it: decoder, tokenizer and stop tokens, by path or hub id."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from msd_jax.errors import UserError
from msd_jax.io.console import log
from msd_jax.models import config as model_config
from msd_jax.models import decoder, location, template_check, tensor_files, weights
from msd_jax.models.lora import Lora, is_adapter
from msd_jax.models.tokenizer import describe_bos, load_tokenizer, stop_token_ids
from msd_jax.parallel import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What follows from a model's config.json and config.model: enough to compile its programs, without its weights.

    Attributes:
      config: sizes and family differences.
      graphdef, abstract, axes: of the decoder: structure, ShapeDtypeStructs and logical axes of its params.
      dtype: of matrix products and of generation.
      lora: settings of the adapters, which alone are trained; None without adapters.
      freeze_embeddings: embeddings, and with them a tied head, are not trained.
      stored: the dtypes of the checkpoint, from weights.dtypes; {} where there is none yet. Under LoRA the base has
        them too (float32 where layers differ, bfloat16 where there is no checkpoint).
    """

    config: model_config.DecoderConfig
    graphdef: nnx.GraphDef
    abstract: decoder.Params
    axes: Any
    dtype: jnp.dtype
    lora: Lora | None
    freeze_embeddings: bool
    stored: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def split(self, params: Any) -> tuple[Any, Any]:
        """(trained, frozen) parts of a tree like params; decoder.join puts them together again."""
        if self.lora:
            return decoder.split(params, is_adapter)
        return decoder.split(params, lambda name: not (self.freeze_embeddings and name == "embedding"))

    def shardings(self, mesh: Mesh, rules: sharding.Rules) -> Any:
        """NamedSharding of each parameter under `rules`."""
        return sharding.param_shardings(mesh, self.abstract, self.axes, rules)

    def on(self, mesh: Mesh) -> Self:
        """The same with activations split over another mesh."""
        model = nnx.merge(self.graphdef, self.abstract)
        model.mesh = mesh
        return dataclasses.replace(self, graphdef=nnx.graphdef(model))

    def target(self, mesh: Mesh) -> decoder.Params:
        """ShapeDtypeStructs of params in the training layout."""
        return jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            self.abstract,
            self.shardings(mesh, sharding.TRAIN),
        )

    def frozen_teacher(self, trained: decoder.Params) -> decoder.Params:
        """ShapeDtypeStructs of a frozen teacher, in the narrowest dtypes that change none of its numbers.

        A weight that the checkpoint has in bfloat16 is widened where it is used, one layer at a time, which is exact;
        one that the decoder casts to `dtype` before each use is held in `dtype`.

        Args:
          trained: ShapeDtypeStructs of the student's trained weights, the first part of `split`.
        """

        def held(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            name = ".".join(key.key for key in path)
            exact = [leaf.dtype]
            if self.stored.get(name) == "BF16":
                exact.append(jnp.dtype(jnp.bfloat16))
            if name != "embedding" and "norm" not in name:  # those are used in float32
                exact.append(self.dtype)
            within = (dtype for dtype in exact if jnp.promote_types(dtype, leaf.dtype) == leaf.dtype)
            return leaf.update(dtype=min(within, key=lambda dtype: dtype.itemsize))

        return jax.tree.map_with_path(held, trained)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained(Architecture):
    """Everything of a model but its weights.

    Attributes:
      directory: the local Hugging Face directory.
      tokenizer: transformers' fast tokenizer.
      stop_ids: tokens that end a response.
      pad_id: fills unused columns; within the vocabulary; masks never depend on it.
      chat_template: the file that the tokenizer's chat template was read from; "" for its own.
    """

    directory: pathlib.Path
    tokenizer: Any
    stop_ids: tuple[int, ...]
    pad_id: int
    chat_template: str = ""

    def params(self, mesh: Mesh, directory: pathlib.Path | None = None, seed: int = 0) -> decoder.Params:
        """Weights of `directory` (default: the model's own) in the training layout, and new adapters from `seed`."""
        adapters, base = decoder.split(self.target(mesh), is_adapter)
        params = weights.read(directory or self.directory, self.config, base)
        if not self.lora:
            return params

        def new_adapters() -> decoder.Params:
            _, params = decoder.init(self.config, jax.random.key(seed), lora=self.lora)
            params, _ = decoder.split(params, is_adapter)
            return jax.tree.map(lambda p, leaf: p.astype(leaf.dtype), params, adapters)

        return decoder.join(params, jax.jit(new_adapters, out_shardings=jax.tree.map(lambda x: x.sharding, adapters))())

    def require_embedded(self, ids: np.ndarray | Sequence[int], what: str) -> None:
        """Checks that the model has an embedding for each token: a tokenizer may hold tokens beyond the vocabulary.

        Args:
          ids: of a prompt.
          what: whose they are, for the error.

        Raises:
          UserError: names the first token that has none.
        """
        ids = np.asarray(ids)
        beyond = ids[ids >= self.config.vocab_size].tolist()
        if beyond:
            raise UserError(
                f"{what}: the prompt holds the token {self.tokenizer.convert_ids_to_tokens(beyond[0])!r} with id "
                f"{beyond[0]}, for which {self.directory} has no embedding (config.json: vocab_size="
                f"{self.config.vocab_size}); remove it from the text or the chat template"
            )

    def require_length(self, parts: Mapping[str, int]) -> None:
        """Checks that the model takes sequences of so many tokens, before anything long begins.

        Args:
          parts: the most tokens of each part of a sequence, by the name of the setting.

        Raises:
          UserError: names the settings, and what the model takes.
        """
        tokens, longest = sum(parts.values()), self.config.longest
        if longest is not None and tokens > longest:
            named = " and ".join(f"{key}={value}" for key, value in parts.items())
            raise UserError(
                f"{named} ask for sequences of {tokens} tokens, and {self.directory} takes at most {longest} here: "
                "beyond, its RoPE (longrope) has other frequencies, which are not implemented; lower one of these"
            )

    def frozen_params(self, mesh: Mesh) -> decoder.Params:
        """The part of `params` that is not trained."""
        _, frozen = self.split(self.target(mesh))
        return weights.read(self.directory, self.config, frozen)

    def companions(self) -> dict[str, str]:
        """What an export has beside the model's own files, text by name: stops that were found, a template given."""
        files = {"chat_template.jinja": self.tokenizer.chat_template} if self.chat_template else {}
        file = self.directory / "generation_config.json"
        ids = {"bos_token_id": self.tokenizer.bos_token_id, "pad_token_id": self.pad_id}
        values = {key: value for key, value in ids.items() if value is not None}
        if file.exists():
            values = json.loads(file.read_text(encoding="utf-8"))
            named = values.get("eos_token_id")
            if set(self.stop_ids) == set(named if isinstance(named, list) else [named]):
                return files
            values.pop("_from_model_config", None)  # or transformers makes it anew from config.json
        return files | {"generation_config.json": json.dumps(values | {"eos_token_id": self.stop_ids}, indent=2) + "\n"}


def architecture(
    config: model_config.DecoderConfig,
    *,
    dtype: str,
    param_dtype: str,
    remat: str,
    attention: str = "auto",
    freeze_embeddings: bool = False,
    lora: Any = None,
    mesh: Mesh | None = None,
    stored: Mapping[str, str] | None = None,
) -> Architecture:
    """The decoder of `config`, without allocating; `stored` is as in Architecture, the other arguments as in `load`."""
    adapters = Lora(lora["rank"], lora["alpha"], tuple(lora["targets"])) if lora and lora["rank"] else None
    graphdef, abstract, axes = decoder.abstract(
        config,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        remat=remat,
        attention=attention,
        mesh=mesh,
        lora=adapters,
    )
    if adapters:
        trained, base = decoder.split(abstract, is_adapter)
        if not trained:
            raise UserError(f"config.model.lora.targets={adapters.targets}: the model has none of these matrices")
        abstract = decoder.join(trained, _in_stored_dtypes(base, stored or {}))
    return Architecture(
        config=config,
        graphdef=graphdef,
        abstract=abstract,
        axes=axes,
        dtype=jnp.dtype(dtype),
        lora=adapters,
        freeze_embeddings=freeze_embeddings,
        stored=stored or {},
    )


def _in_stored_dtypes(base: decoder.Params, stored: Mapping[str, str]) -> decoder.Params:
    def held(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = stored.get(".".join(key.key for key in path), "BF16")
        return leaf.update(dtype=jnp.dtype(weights.DTYPES.get(dtype, jnp.float32)))

    return jax.tree.map_with_path(held, base)


def load(path: str, *, chat_template: str = "", **options: Any) -> Pretrained:
    """Reads everything of a model but its weights; prints a line on each thing about it that may surprise.

    Args:
      path: a directory or a hub id.
      chat_template: config.prompts.chat_template.
      **options: the other keys of config.model, and `mesh`:
        dtype: of matrix products and of generation;
        param_dtype: of trained weights; under LoRA the base stays in its checkpoint's dtypes;
        remat, attention, mesh: see decoder.Decoder;
        freeze_embeddings: see Architecture;
        lora: a mapping with rank (0: no adapters), alpha and targets.

    Raises:
      UserError: the message names the file and what is wrong with it.
    """
    directory = location.resolve(path)
    config = weights.read_config(directory)
    files = weights.check(directory, config)
    for line in _oddities(directory, config):
        log(line)
    tokenizer = load_tokenizer(str(directory), chat_template)
    if tokenizer.chat_template:  # without one the model may be scored
        turns = [{"role": role, "content": ""} for role in ("user", "assistant")]
        template_check.check(tokenizer, {"a conversation": (turns, {})}, shows=False)
        for line in describe_bos(tokenizer):
            log(line)
    stop_ids = stop_token_ids(tokenizer, str(directory))
    outside = [stop for stop in stop_ids if not 0 <= stop < config.vocab_size]
    if outside:
        raise UserError(
            f"{directory}: the stop tokens {outside} are outside the vocabulary of {config.vocab_size}; correct "
            "eos_token_id in generation_config.json or, where that names none, in config.json"
        )
    pad_id = tokenizer.pad_token_id
    mesh = options.get("mesh")
    if mesh is not None and sharding.is_replicated(sharding.TRAIN, mesh, "kv_heads", config.kv_heads):
        log(
            f"{path}: key/value heads ({config.kv_heads}) do not divide over config.mesh.tensor="
            f"{mesh.shape['tensor']}; each device holds all of them"
        )
    return Pretrained(
        **vars(architecture(config, **options, stored=weights.dtypes(files, config))),
        directory=directory,
        tokenizer=tokenizer,
        stop_ids=tuple(stop_ids),
        chat_template=chat_template,
        pad_id=min(stop_ids) if pad_id is None or pad_id >= config.vocab_size else pad_id,
    )


def _oddities(directory: pathlib.Path, config: model_config.DecoderConfig) -> list[str]:
    """A line on each thing in a model's directory that contradicts another, and on what is done about it."""
    lines = []
    if tensor_files.has_stale_index(directory):
        lines.append(f"note: {directory / tensor_files.INDEX} does not name {tensor_files.WHOLE} beside it; ignored")
    if model_config.read(directory).tied_embeddings != config.tied_embeddings:
        lines.append(
            f"note: {directory}: config.json ties the head to the embeddings, and lm_head.weight differs from them; it "
            "is used, trained and exported as a head of its own"
        )
    return lines
