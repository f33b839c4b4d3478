"""safetensors of a Hugging Face directory <-> params, by one table that serves both directions."""

import collections
import functools
import json
import math
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from msd_jax.errors import UserError, UserFileError
from msd_jax.models import decoder
from msd_jax.models.config import DecoderConfig
from msd_jax.models.tokenizer import is_hub_id

INDEX = "model.safetensors.index.json"
# What a model directory is made of besides its weights; nothing that holds code or pickles.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")


_GROUPS = re.compile(r"\(([^)]*)\)|(\w)")  # of one side of an einops pattern


def resolve(path: str) -> pathlib.Path:
    """The local directory of a model: `path` itself, or a snapshot of the hub id `path` (HF_HUB_OFFLINE respected)."""
    directory = pathlib.Path(path).expanduser()
    if path and directory.is_dir():
        return directory
    if not is_hub_id(path):
        raise UserFileError(
            f"config.model.path={path!r} is neither a directory nor a hub id (owner/name)"
            if path
            else "config.model.path is empty: give a Hugging Face model directory or a hub id (owner/name)"
        )
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(path, allow_patterns=list(HUB_PATTERNS)))
    except Exception as error:  # the hub's own errors are many; what the user can do is always the same
        raise UserFileError(
            f"config.model.path={path!r} is not a directory here, and the hub did not give it "
            f"({type(error).__name__}); copy the model to this machine and give its directory"
        ) from error


def layout(config: DecoderConfig) -> dict[str, tuple[str, str]]:
    """Parameter name -> (tensor name with {} for the layer, einops pattern from tensor to one layer's parameter)."""
    table = {
        "embedding": ("model.embed_tokens.weight", "v d -> v d"),
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
        table["head"] = ("lm_head.weight", "v d -> d v")
    if config.qkv_bias:
        table["layers.query_bias"] = ("self_attn.q_proj.bias", "(n h) -> n h")
        table["layers.key_bias"] = ("self_attn.k_proj.bias", "(n h) -> n h")
        table["layers.value_bias"] = ("self_attn.v_proj.bias", "(n h) -> n h")
    if config.qk_norm:
        table["layers.query_norm"] = ("self_attn.q_norm.weight", "h -> h")
        table["layers.key_norm"] = ("self_attn.k_norm.weight", "h -> h")
    if config.sandwich_norms:
        table["layers.post_attention_norm"] = ("post_attention_layernorm.weight", "d -> d")
        table["layers.ffw_norm"] = ("pre_feedforward_layernorm.weight", "d -> d")
        table["layers.post_ffw_norm"] = ("post_feedforward_layernorm.weight", "d -> d")
    return {
        name: (f"model.layers.{{}}.{tensor}" if name.startswith("layers.") else tensor, pattern)
        for name, (tensor, pattern) in table.items()
    }


def read(directory: pathlib.Path, config: DecoderConfig, target: decoder.Params) -> decoder.Params:
    """Parameters from DIRECTORY's safetensors.

    Args:
      directory: holds model.safetensors, or several files with model.safetensors.index.json.
      config: of the model, from its config.json.
      target: the parameters wanted, all or some, as ShapeDtypeStructs: their dtypes are what the tensors are cast to,
        and their shardings (None: the default device) where they go. Tensors are read one at a time, and only for the
        slices that this process holds.

    Raises:
      UserError: as `check`, or a tensor holds a number that is not finite.
    """
    files = check(directory, config)
    table = layout(config)
    anywhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def put(
        tensor: str, pattern: str, shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding
    ) -> jax.Array:
        slices: dict[tuple, np.ndarray] = {}  # devices that hold the same slice share one read

        def read_slice(index: tuple[slice, ...]) -> np.ndarray:
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape))
            if bounds not in slices:
                slices[bounds] = _read_slice(files[tensor], tensor, pattern, shape, bounds).astype(dtype)
            return slices[bounds]

        return jax.make_array_from_callback(shape, sharding, read_slice)

    def load(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        tensor, pattern = table[".".join(key.key for key in path)]
        sharding = leaf.sharding or anywhere
        if "{}" not in tensor:
            return put(tensor, pattern, leaf.shape, leaf.dtype, sharding)
        # Stacked on the devices, so that the host never holds more than one layer of a parameter.
        stack = _making_zeros(leaf.shape, leaf.dtype, sharding)()
        for layer in range(config.layers):
            one = put(tensor.format(layer), pattern, leaf.shape[1:], leaf.dtype, _without_layers(sharding))
            stack = _write_layer(stack, one, layer)
        return stack

    params = jax.tree.map_with_path(load, target)
    for name, finite_L in jax.device_get(_finite(params)).items():
        for layer in np.flatnonzero(~np.atleast_1d(finite_L)):
            tensor = table[name][0].format(layer)
            raise UserError(f"{directory}: {tensor} holds NaN or infinity: the weights are damaged")
    return params


def _finite(params: decoder.Params) -> dict[str, jax.Array]:
    """Whether each parameter is finite, bool []; of a stacked one, each of its layers, bool [L]. One program."""
    flat = dict(_flat(params))
    shardings = [leaf.sharding for leaf in flat.values() if isinstance(leaf.sharding, jax.sharding.NamedSharding)]
    whole = jax.sharding.NamedSharding(shardings[0].mesh, jax.sharding.PartitionSpec()) if shardings else None
    return _checking_finite(whole)(flat)


@functools.cache
def _checking_finite(sharding: jax.sharding.Sharding | None) -> Any:
    def check(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            name: jnp.isfinite(leaf).all(axis=tuple(range(name.startswith("layers."), leaf.ndim)))
            for name, leaf in flat.items()
        }

    return jax.jit(check, out_shardings=sharding)


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
    """Part `bounds` (start and stop of each axis) of a parameter of `shape`; nothing else of the tensor is read."""
    left, right = pattern.split("->")
    axes = right.split()
    size, bound = dict(zip(axes, shape)), dict(zip(axes, bounds))
    part, inner_sizes = [], {}
    for group, single in _GROUPS.findall(left):
        outer, *inner = (group or single).split()
        step = math.prod(size[axis] for axis in inner)  # inner axes (a head's) are never split
        part.append(slice(bound[outer][0] * step, bound[outer][1] * step))
        inner_sizes |= {axis: size[axis] for axis in inner}
    return einops.rearrange(file.get_slice(tensor)[tuple(part)], pattern, **inner_sizes)


def check(directory: pathlib.Path, config: DecoderConfig) -> dict[str, Any]:
    """The open safetensors file of each tensor, all of them there and of the right shape; reads headers alone.

    Raises:
      UserError: a file is missing, truncated or not safetensors, or tensors are missing, left
        over or of another shape; the message names the file and the tensors.
    """
    _, abstract, _ = decoder.abstract(config)
    expected = {}
    for name, leaf in _flat(abstract):
        tensor, pattern = layout(config)[name]
        stacked = "{}" in tensor
        letters = dict(zip(pattern.split("->")[1].split(), leaf.shape[stacked:]))
        shape = _tensor_shape(pattern, letters)
        expected |= {tensor.format(layer): shape for layer in range(config.layers if stacked else 1)}
    found = _files(directory)
    # A tied head and rotary tables are sometimes stored; they follow from what is read.
    derived = {tensor for tensor in found if tensor.endswith("rotary_emb.inv_freq")}
    derived |= {"lm_head.weight"} if config.tied_embeddings else set()
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


def dtypes(files: dict[str, Any], config: DecoderConfig) -> dict[str, str]:
    """The dtype of each parameter in its files, as safetensors writes it ("F32", "BF16"); "mixed" where layers differ.

    Args:
      files: what `check` returned.
    """
    found = {}
    for name, (tensor, _) in layout(config).items():
        layers = {tensor.format(layer) for layer in range(config.layers)}
        first, *others = {files[name].get_slice(name).get_dtype() for name in layers}
        found[name] = "mixed" if others else first
    return found


def write(
    directory: pathlib.Path | None,
    params: decoder.Params,
    config: DecoderConfig,
    dtype: Any,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes params as model.safetensors, or as several files and an index above `max_shard_bytes`.

    Where they lie on the devices of several processes all of them call this, for each layer is gathered from all;
    those with `directory` None write nothing.
    """
    table = layout(config)
    sizes: list[tuple[str, int]] = []  # decided on shapes alone, so that one shard at a time is in host memory
    for name, leaf in _flat(params):
        tensor, _ = table[name]
        count = config.layers if "{}" in tensor else 1
        sizes += [(tensor.format(i), leaf.size // count * np.dtype(dtype).itemsize) for i in range(count)]
    total, shards, room = 0, 0, 0
    for _, size in sizes:
        total += size
        if shards == 0 or size > room:
            shards, room = shards + 1, max_shard_bytes
        room -= size

    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    room = max_shard_bytes

    def flush() -> None:
        number = len(set(weight_map.values())) + 1
        file = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"
        safetensors.numpy.save_file(shard, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors gives it to its owner alone
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for tensor, value in _tensors(params, table, dtype):
        if directory is None:
            continue
        value = np.ascontiguousarray(value)
        if shard and value.nbytes > room:
            flush()
            room = max_shard_bytes
        shard[tensor] = value
        room -= value.nbytes
    if directory is None:
        return
    flush()
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=1))


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies everything of a model directory but its weights: tokenizer, chat template, configs."""
    for pattern in HUB_PATTERNS[1:]:
        for file in sorted(source.glob(pattern)):
            if file.name != INDEX:
                shutil.copyfile(file, target / file.name)


def _files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """The safetensors file of each tensor, from headers alone."""
    index, weight_map = directory / INDEX, None
    if index.is_file():
        try:
            weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{index} is not a safetensors index ({error!r})") from error
        for name in set(weight_map.values()):
            if pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"{index} points to {name!r}, which is not a .safetensors file beside it")
        paths = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        paths = [directory / "model.safetensors"]
    found: dict[str, pathlib.Path] = {}
    for path in paths:
        if not path.is_file():
            pickled = sorted(p.name for p in directory.glob("*.bin"))
            hint = f"; {', '.join(pickled)} will not be opened: convert to safetensors" if pickled else ""
            raise UserFileError(f"{path} is missing{hint}")
        _check_link(directory, path)
        for tensor in _tensor_names(path):
            if weight_map is not None and weight_map.get(tensor) != path.name:
                raise UserError(f"{path} holds {tensor}, which {index.name} does not expect there")
            found[tensor] = path
    return found


def _check_link(directory: pathlib.Path, path: pathlib.Path) -> None:
    """Refuses a link out of the model's directory; the hub's cache keeps a snapshot's files in blobs/ beside it."""
    root = directory.resolve()
    allowed = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise UserError(f"{path} is a link to {path.resolve()}, outside of the model's directory; copy the file there")


def _tensor_names(path: pathlib.Path) -> list[str]:
    """Names of the tensors in a file. Duplicates are refused here; the library checks header, offsets and length."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, count in collections.Counter(name for name, _ in pairs).items():
            if count > 1:
                raise UserError(f"{path} holds {name} twice")
        return dict(pairs)

    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = list(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file: {error}") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        json.loads(file.read(length), object_pairs_hook=unique)
    return names


def _tensor_shape(pattern: str, letters: dict[str, int]) -> tuple[int, ...]:
    """Shape of the left side of an einops pattern."""
    groups = _GROUPS.findall(pattern.split("->")[0])
    return tuple(int(np.prod([letters[k] for k in (group or single).split()])) for group, single in groups)


def _flat(params: decoder.Params) -> list[tuple[str, jax.Array]]:
    return [(".".join(k.key for k in path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]


def _tensors(params: decoder.Params, table: dict[str, tuple[str, str]], dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the checkpoint in `dtype`, fetched to the host one layer at a time."""
    for name, leaf in _flat(params):
        tensor, pattern = table[name]
        left, right = pattern.split("->")
        for i in range(leaf.shape[0] if "{}" in tensor else 1):
            value = _fetch(leaf, i if "{}" in tensor else None, dtype)
            yield tensor.format(i), einops.rearrange(value, f"{right} -> {left}")


def _fetch(leaf: jax.Array, layer: int | None, dtype: Any) -> np.ndarray:
    """A parameter, or one layer of a stacked one, whole, on the host."""
    whole = None
    if not leaf.is_fully_addressable:  # gathered from the other processes, over the devices
        whole = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
    return np.asarray(jax.device_get(_taking(whole)(leaf, layer, np.dtype(dtype))))


@functools.cache
def _taking(sharding: jax.sharding.Sharding | None) -> Any:
    def take(leaf: jax.Array, layer: jax.Array | None, dtype: Any) -> jax.Array:
        return (leaf if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)).astype(dtype)

    return jax.jit(take, static_argnums=2, out_shardings=sharding)


def _some(names: set[str]) -> str:
    shown = sorted(names)[:4]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "none"
