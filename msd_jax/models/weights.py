"""safetensors of a Hugging Face directory <-> params, by the one table of models/layout.py for both directions."""

import collections
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from msd_jax.errors import UserError
from msd_jax.models import config as model_config
from msd_jax.models import decoder, layout, lora, slices, tensor_files
from msd_jax.models.config import DecoderConfig
from msd_jax.parallel import distributed

DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}  # as safetensors names them
_COMPARED = 1 << 12  # rows that are compared at a time


def read_config(directory: pathlib.Path) -> DecoderConfig:
    """The model's config.json, and whether its files hold a head that is not the embedding.

    Such a head is used whatever tie_word_embeddings says, as transformers 5 does.

    Raises:
      UserError: as model_config.read and tensor_files.find.
    """
    config = model_config.read(directory)
    if config.tied_embeddings and has_own_head(directory):
        config = dataclasses.replace(config, tied_embeddings=False)
    return config


def has_own_head(directory: pathlib.Path) -> bool:
    """Whether the files hold a head with other values, or of another shape, than the embedding."""
    found = tensor_files.open_all(directory)
    if layout.HEAD not in found or layout.EMBEDDING not in found:
        return False
    head, embedding = (found[tensor].slice() for tensor in (layout.HEAD, layout.EMBEDDING))
    if head.get_shape() != embedding.get_shape():
        return True
    rows = head.get_shape()[0]
    bounds = ((first, min(first + _COMPARED, rows)) for first in range(0, rows, _COMPARED))
    return any(
        not np.array_equal(*(part[first:last].astype(np.float32) for part in (head, embedding)))
        for first, last in bounds
    )


def read(directory: pathlib.Path, config: DecoderConfig, target: decoder.Params) -> decoder.Params:
    """Parameters from DIRECTORY's safetensors.

    Tensors are read one at a time, and of each only the slices that this process holds. From an object store each
    process reads some rows of the files, as many as any other, and the devices exchange them: rows alone are one range
    of bytes.

    Args:
      directory: holds model.safetensors, or several files with model.safetensors.index.json.
      config: of the model, from its config.json.
      target: the parameters wanted, all or some, as ShapeDtypeStructs with the dtypes and shardings that they get
        (sharding None: the default device).

    Raises:
      UserError: as `check`, or a tensor holds a number that is not finite.
    """
    files = check(directory, config)
    table = layout.layout(config)
    anywhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    # Of each tensor of the files, by the parts that this process holds.
    finite: dict[str, list[jax.Array]] = collections.defaultdict(list)

    def load_tensors(names: list[str], stored: layout.Stored, leaf: jax.ShapeDtypeStruct) -> Iterator[jax.Array]:
        for name, array in zip(names, slices.arrays([files[name] for name in names], stored, leaf)):
            finite[name] += [_all_finite(shard.data) for shard in array.addressable_shards]
            yield array

    def load(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        stored = table[decoder.name_of(path)]
        leaf = leaf.update(sharding=leaf.sharding or anywhere)
        if "{}" not in stored.tensor:
            return next(load_tensors([stored.tensor], stored, leaf))
        # Stacked on the devices, so that the host never holds more than one layer of a parameter.
        stack = _making_zeros(leaf.shape, leaf.dtype, leaf.sharding)()
        one = leaf.update(shape=leaf.shape[1:], sharding=_without_layers(leaf.sharding))
        names = [stored.tensor.format(layer) for layer in range(config.layers)]
        for layer, array in enumerate(load_tensors(names, stored, one)):
            stack = _write_layer(stack, array, layer)
        return stack

    params = jax.tree.map_with_path(load, target)
    _require_finite(directory, finite)
    return params


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    """Whether all elements of one device's part are finite, bool []."""
    return jnp.isfinite(array).all()


def _require_finite(directory: pathlib.Path, finite: Mapping[str, list[jax.Array]]) -> None:
    """Raises a UserError, on every process, if a part of a tensor is not finite on one of them.

    The parts are not combined on the devices: sums over processes that nothing orders among each other can meet the
    wrong partner.
    """
    mine = [tensor for tensor, parts in jax.device_get(dict(finite)).items() if not all(parts)]
    for tensor in itertools.chain(*distributed.from_all(lambda: mine)):
        raise UserError(f"{directory}: {tensor} holds NaN or infinity: the weights are damaged")


@functools.cache
def _making_zeros(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(stack: jax.Array, one: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, one, layer, 0)


def _without_layers(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The sharding of one layer of a stacked parameter."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    return sharding


def check(directory: pathlib.Path, config: DecoderConfig) -> dict[str, tensor_files.Tensor]:
    """Each tensor of the files, those of the config present and of the right shape; reads headers alone.

    Raises:
      UserError: a file is missing, truncated or not safetensors, or tensors are missing, left over or of another
        shape; the message names the file and the tensors.
    """
    expected, found = layout.shapes(config), tensor_files.open_all(directory)
    missing = expected.keys() - found.keys()
    extra = {
        tensor
        for tensor in found.keys() - expected.keys()
        if not (layout.is_derived(tensor, config) or layout.is_carried(tensor, config))
    }
    if missing or extra:
        raise UserError(
            f"{directory}: the tensors do not fit config.json; missing: {_some(missing)}; left over: {_some(extra)}"
        )
    for tensor, shape in expected.items():
        actual = tuple(found[tensor].slice().get_shape())
        if actual != shape:
            raise UserError(
                f"{found[tensor].path}: {found[tensor].name} has shape {actual}, config.json asks for {shape}"
            )
    return found


def dtypes(files: Mapping[str, tensor_files.Tensor], config: DecoderConfig) -> dict[str, str]:
    """The dtype of each parameter in its files, as safetensors writes it ("F32", "BF16"); "mixed" where layers differ.

    Args:
      files: what `check` returned.
      config: of the model.
    """
    found = {}
    for name, (tensor, *_) in layout.layout(config).items():
        tensors = {tensor.format(layer) for layer in range(config.layers)}
        first, *others = {files[tensor].slice().get_dtype() for tensor in tensors}
        found[name] = "mixed" if others else first
    return found


@dataclasses.dataclass(frozen=True)
class Source:
    """What an export takes over from the files that a model came from; nothing where there are none.

    Attributes:
      files: each tensor of the files, by the name that layout.layout gives it.
    """

    files: Mapping[str, tensor_files.Tensor]

    @classmethod
    def of(cls, directory: pathlib.Path) -> "Source":
        return cls(tensor_files.open_all(directory) if any(directory.glob("*.safetensors")) else {})

    def dtype(self, tensor: str, otherwise: jnp.dtype) -> jnp.dtype:
        """The dtype of a tensor, if the decoder has it."""
        stored = self.files[tensor].slice().get_dtype() if tensor in self.files else ""
        return jnp.dtype(DTYPES.get(stored, otherwise))

    def name(self, tensor: str, config: DecoderConfig) -> str:
        """What the files call a tensor."""
        return self.files[tensor].name if tensor in self.files else layout.new_name(tensor, config)

    def carried(self, config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors that the decoder does without and that an export holds all the same."""
        for tensor, file in self.files.items():
            if layout.is_carried(tensor, config):
                yield layout.carried_name(file.name, config), file.whole()


def tensors(
    params: decoder.Params,
    config: DecoderConfig,
    dtype: Callable[[str], jnp.dtype],
    adapters: lora.Lora | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the decoder with layout's name for it, fetched to the host one layer at a time.

    Where params lie on the devices of several processes, all of them run through this, since each tensor is gathered
    from all.

    Args:
      params: of the model.
      config: its sizes.
      dtype: the tensor's name -> the dtype that it gets.
      adapters: settings of the adapters in `params`, which are merged into their matrices.
    """
    table, flat, parts = layout.layout(config), dict(decoder.flat(params)), layout.shared(config)

    def fetch(name: str, layer: int | None, dtype: jnp.dtype) -> np.ndarray:
        update = None
        if adapters and name + lora.SUFFIX_A in flat:
            update = flat[name + lora.SUFFIX_A], flat[name + lora.SUFFIX_B], adapters.scale
        left, right = table[name].pattern.split("->")
        return einops.rearrange(_fetch(flat[name], update, layer, dtype), f"{right} -> {left}")

    for tensor in dict.fromkeys(table[name].tensor for name in flat if not lora.is_adapter(name)):
        for layer in range(config.layers) if "{}" in tensor else (None,):
            tensor_name = tensor.format(layer)
            rows = [fetch(name, layer, dtype(tensor_name)) for name in parts[tensor]]
            yield tensor_name, np.ascontiguousarray(rows[0] if len(rows) == 1 else np.concatenate(rows))


def write(directory: pathlib.Path, named: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int) -> None:
    """Writes tensors as model.safetensors or, above `max_shard_bytes`, as several files and an index.

    Args:
      directory: exists.
      named: from `tensors`; the host holds those of one file at a time.
      max_shard_bytes: a larger tensor has a file of its own.
    """
    names: list[list[str]] = []  # of each file
    total = 0
    for shard in _shards(named, max_shard_bytes):
        names.append(list(shard))
        total += sum(value.nbytes for value in shard.values())
        path = directory / f"{len(names)}.safetensors"  # until it is known how many there are
        safetensors.numpy.save_file(shard, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files that only their owner may read
    files = [f"model-{number:05d}-of-{len(names):05d}.safetensors" for number in range(1, len(names) + 1)]
    if len(files) == 1:
        files = ["model.safetensors"]
    for number, file in enumerate(files, 1):
        (directory / f"{number}.safetensors").rename(directory / file)
    if len(files) > 1:
        weight_map = {name: file for file, inside in zip(files, names) for name in inside}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / tensor_files.INDEX).write_text(json.dumps(index, indent=1))


def _shards(named: Iterable[tuple[str, np.ndarray]], max_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    """The tensors of one file after the other, each filled up to `max_bytes`; valid until the next is asked for."""
    shard: dict[str, np.ndarray] = {}
    room = max_bytes
    for name, value in named:
        if shard and value.nbytes > room:
            yield shard
            shard.clear()  # not a new one, which would keep this one in memory beside it
            room = max_bytes
        shard[name] = value
        room -= value.nbytes
    yield shard


def _fetch(
    leaf: jax.Array, update: tuple[jax.Array, jax.Array, float] | None, layer: int | None, dtype: jnp.dtype
) -> np.ndarray:
    """A whole parameter (layer None), or one layer of a stacked one, on the host, with its adapter (a, b, scale)."""
    replicated = None
    if not leaf.is_fully_addressable:  # gathered from the other processes, over the devices
        assert isinstance(leaf.sharding, jax.sharding.NamedSharding)
        replicated = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
    return np.asarray(jax.device_get(_taking_layer(replicated)(leaf, update, layer, jnp.dtype(dtype))))


@functools.cache
def _taking_layer(sharding: jax.sharding.Sharding | None) -> Any:
    def take(leaf: jax.Array, update: Any, layer: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
        def part(whole: jax.Array) -> jax.Array:
            return whole if layer is None else jax.lax.dynamic_index_in_dim(whole, layer, keepdims=False)

        if update is None:
            return part(leaf).astype(dtype)
        a, b, scale = update
        return lora.merge(part(leaf), part(a), part(b), scale).astype(dtype)

    return jax.jit(take, static_argnums=3, out_shardings=sharding)


def _some(names: set[str]) -> str:
    shown = sorted(names)[:4]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "none"
