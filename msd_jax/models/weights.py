"""safetensors of a Hugging Face directory <-> params, by one table for both directions."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from msd_jax.errors import UserError
from msd_jax.models import config as model_config
from msd_jax.models import decoder, lora, tensor_files
from msd_jax.models.config import DecoderConfig
from msd_jax.parallel import distributed

DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}  # as safetensors names them
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED = 1 << 12  # rows that are compared at a time
_GROUPS = re.compile(r"\(([^)]*)\)|(\w)")  # of one side of an einops pattern


def layout(config: DecoderConfig) -> dict[str, tuple[str, str]]:
    """Parameter name -> (tensor name, einops pattern from tensor to parameter).

    Parameters of the layers have {} for the layer in the tensor's name, and the pattern of one layer.
    """
    table = {
        "embedding": (_EMBEDDING, "v d -> v d"),
        "final_norm": ("model.norm.weight", "d -> d"),
        "layers.attention_norm": ("input_layernorm.weight", "d -> d"),
        "layers.query": ("self_attn.q_proj.weight", "(n h) d -> d n h"),
        "layers.key": ("self_attn.k_proj.weight", "(n h) d -> d n h"),
        "layers.value": ("self_attn.v_proj.weight", "(n h) d -> d n h"),
        "layers.output": ("self_attn.o_proj.weight", "d (n h) -> n h d"),
        "layers.ffw_norm": ("post_attention_layernorm.weight", "d -> d"),
        "layers.gate": ("mlp.gate_proj.weight", "f d -> d f"),
        "layers.up": ("mlp.up_proj.weight", "f d -> d f"),
        "layers.down": ("mlp.down_proj.weight", "d f -> f d"),
    }
    if not config.tied_embeddings:
        table["head"] = (_HEAD, "v d -> d v")
    if config.qkv_bias:
        table["layers.query_bias"] = ("self_attn.q_proj.bias", "(n h) -> n h")
        table["layers.key_bias"] = ("self_attn.k_proj.bias", "(n h) -> n h")
        table["layers.value_bias"] = ("self_attn.v_proj.bias", "(n h) -> n h")
    if config.qk_norm:
        pattern = "(n h) -> n h" if config.qk_norm_over_heads else "h -> h"
        table["layers.query_norm"] = ("self_attn.q_norm.weight", pattern)
        table["layers.key_norm"] = ("self_attn.k_norm.weight", pattern)
    if config.post_norms:
        table["layers.post_attention_norm"] = ("post_attention_layernorm.weight", "d -> d")
        table["layers.ffw_norm"] = ("pre_feedforward_layernorm.weight", "d -> d")
        table["layers.post_ffw_norm"] = ("post_feedforward_layernorm.weight", "d -> d")
    if not config.pre_norms:
        del table["layers.attention_norm"], table["layers.ffw_norm"]
    return {
        name: (f"model.layers.{{}}.{tensor}" if name.startswith("layers.") else tensor, pattern)
        for name, (tensor, pattern) in table.items()
    }


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
    found = tensor_files.find(directory)
    if _HEAD not in found or _EMBEDDING not in found:
        return False
    head, embedding = (
        safetensors.safe_open(found[tensor], framework="np").get_slice(tensor) for tensor in (_HEAD, _EMBEDDING)
    )
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

    Tensors are read one at a time, and of each only the slices that this process holds.

    Args:
      directory: holds model.safetensors, or several files with model.safetensors.index.json.
      config: of the model, from its config.json.
      target: the parameters wanted, all or some, as ShapeDtypeStructs with the dtypes and shardings that they get
        (sharding None: the default device).

    Raises:
      UserError: as `check`, or a tensor holds a number that is not finite.
    """
    files = check(directory, config)
    table = layout(config)
    anywhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    finite: dict[str, list[jax.Array]] = {}  # of each tensor of the files, by the parts that this process holds

    def load(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        tensor, pattern = table[_name(path)]
        leaf = leaf.update(sharding=leaf.sharding or anywhere)
        if "{}" not in tensor:
            whole = _read_tensor(files[tensor], tensor, pattern, leaf)
            finite[tensor] = [_all_finite(shard.data) for shard in whole.addressable_shards]
            return whole
        # Stacked on the devices, so that the host never holds more than one layer of a parameter.
        stack = _making_zeros(leaf.shape, leaf.dtype, leaf.sharding)()
        one = leaf.update(shape=leaf.shape[1:], sharding=_without_layers(leaf.sharding))
        for layer in range(config.layers):
            name = tensor.format(layer)
            new = _read_tensor(files[name], name, pattern, one)
            finite[name] = [_all_finite(shard.data) for shard in new.addressable_shards]
            stack = _write_layer(stack, new, layer)
        return stack

    params = jax.tree.map_with_path(load, target)
    _require_finite(directory, finite)
    return params


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    """Whether all elements of one device's part are finite, bool []."""
    return jnp.isfinite(array).all()


def _require_finite(directory: pathlib.Path, finite: dict[str, list[jax.Array]]) -> None:
    """Raises a UserError, on every process, if a part of a tensor is not finite on one of them.

    The parts are not combined on the devices: sums over processes that nothing orders among each other can meet the
    wrong partner.
    """
    mine = [tensor for tensor, parts in jax.device_get(finite).items() if not all(parts)]
    for tensor in itertools.chain(*distributed.from_all(lambda: mine)):
        raise UserError(f"{directory}: {tensor} holds NaN or infinity: the weights are damaged")


def _read_tensor(file: Any, tensor: str, pattern: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """A tensor as the parameter `leaf`, or as the layer of a parameter."""
    slices: dict[tuple, np.ndarray] = {}  # devices that hold the same slice share one read

    def read_slice(index: Any) -> np.ndarray:
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape))
        if bounds not in slices:
            slices[bounds] = _read_slice(file, tensor, pattern, leaf.shape, bounds).astype(leaf.dtype)
        return slices[bounds]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, read_slice)


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


def _read_slice(file: Any, tensor: str, pattern: str, shape: tuple[int, ...], bounds: tuple) -> np.ndarray:
    """The part of a parameter of `shape` between `bounds`, (start, stop) of each axis; reads nothing else."""
    left, right = pattern.split("->")
    axes = right.split()
    size, bound = dict(zip(axes, shape)), dict(zip(axes, bounds))
    part: list[slice] = []
    inner_sizes: dict[str, int] = {}
    for group, single in _GROUPS.findall(left):
        outer, *inner = (group or single).split()
        step = math.prod(size[axis] for axis in inner)  # inner axes (a head's) are never split
        part.append(slice(bound[outer][0] * step, bound[outer][1] * step))
        inner_sizes |= {axis: size[axis] for axis in inner}
    return einops.rearrange(file.get_slice(tensor)[tuple(part)], pattern, **inner_sizes)


def check(directory: pathlib.Path, config: DecoderConfig) -> dict[str, Any]:
    """The open safetensors file of each tensor, all of them present and of the right shape; reads headers alone.

    Raises:
      UserError: a file is missing, truncated or not safetensors, or tensors are missing, left over or of another
        shape; the message names the file and the tensors.
    """
    expected = _expected_shapes(config)
    found = tensor_files.find(directory)
    # A tied head and rotary tables are sometimes stored; they follow from what is read.
    derived = {tensor for tensor in found if tensor.endswith("rotary_emb.inv_freq")}
    derived |= {_HEAD} if config.tied_embeddings else set()
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys() - derived
    if missing or extra:
        raise UserError(
            f"{directory}: the tensors do not fit config.json; missing: {_some(missing)}; left over: {_some(extra)}"
        )
    files = {path: safetensors.safe_open(path, framework="np") for path in set(found.values())}
    for tensor, shape in expected.items():
        actual = tuple(files[found[tensor]].get_slice(tensor).get_shape())
        if actual != shape:
            raise UserError(f"{found[tensor]}: {tensor} has shape {actual}, config.json asks for {shape}")
    return {tensor: files[path] for tensor, path in found.items()}


def _expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the config asks for."""
    _, abstract, _ = decoder.abstract(config)
    table = layout(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, leaf in _flat(abstract):
        tensor, pattern = table[name]
        stacked = "{}" in tensor
        shape = _tensor_shape(pattern, leaf.shape[1:] if stacked else leaf.shape)
        shapes |= {tensor.format(layer): shape for layer in range(config.layers if stacked else 1)}
    return shapes


def dtypes(files: dict[str, Any], config: DecoderConfig) -> dict[str, str]:
    """The dtype of each parameter in its files, as safetensors writes it ("F32", "BF16"); "mixed" where layers differ.

    Args:
      files: what `check` returned.
      config: of the model.
    """
    found = {}
    for name, (tensor, _) in layout(config).items():
        tensors = {tensor.format(layer) for layer in range(config.layers)}
        first, *others = {files[tensor].get_slice(tensor).get_dtype() for tensor in tensors}
        found[name] = "mixed" if others else first
    return found


def stored_dtypes(directory: pathlib.Path) -> dict[str, jnp.dtype]:
    """The dtype of each tensor of DIRECTORY, as far as the decoder has one; {} where it holds no safetensors."""
    if not any(directory.glob("*.safetensors")):
        return {}
    found = tensor_files.find(directory)
    files = {path: safetensors.safe_open(path, framework="np") for path in set(found.values())}
    names = {tensor: files[path].get_slice(tensor).get_dtype() for tensor, path in found.items()}
    return {tensor: jnp.dtype(DTYPES[name]) for tensor, name in names.items() if name in DTYPES}


def tensors(
    params: decoder.Params,
    config: DecoderConfig,
    dtype: Callable[[str], jnp.dtype],
    adapters: lora.Lora | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the checkpoint with its name, fetched to the host one layer at a time.

    Where params lie on the devices of several processes, all of them run through this, since each tensor is gathered
    from all.

    Args:
      params: of the model.
      config: its sizes.
      dtype: the tensor's name -> the dtype that it gets.
      adapters: settings of the adapters in `params`, which are merged into their matrices.
    """
    table, flat = layout(config), dict(_flat(params))
    for name in (name for name in flat if not lora.is_adapter(name)):
        tensor, pattern = table[name]
        left, right = pattern.split("->")
        update = None
        if adapters and name + lora.SUFFIX_A in flat:
            update = flat[name + lora.SUFFIX_A], flat[name + lora.SUFFIX_B], adapters.scale
        for layer in range(config.layers) if "{}" in tensor else (None,):
            tensor_name = tensor.format(layer)
            value = einops.rearrange(_fetch(flat[name], update, layer, dtype(tensor_name)), f"{right} -> {left}")
            yield tensor_name, np.ascontiguousarray(value)


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


def _tensor_shape(pattern: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the tensor of which an einops pattern makes a parameter of `shape`."""
    left, right = pattern.split("->")
    sizes = dict(zip(right.split(), shape))
    groups = [(group or single).split() for group, single in _GROUPS.findall(left)]
    return tuple(math.prod(sizes[axis] for axis in group) for group in groups)


def _name(path: tuple) -> str:
    return ".".join(key.key for key in path)


def _flat(params: decoder.Params) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]


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
