"""Weights in an object store, read by ranges of bytes; the store is fsspec's in memory."""

import math

import fsspec
import jax
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file

from msd_jax.data import batches
from msd_jax.errors import UserError
from msd_jax.io import objects, ranges, retries
from msd_jax.models import config as model_config
from msd_jax.models import decoder, export, location, tensor_files, weights
from msd_jax.parallel import sharding
from msd_jax.testbed import tiny
from msd_jax.training import fingerprint


class Counting:
    """A store that notes the ranges of weights it is asked for, and fails when it is told to."""

    def __init__(self):
        self.store, self.asked, self.failures = fsspec.filesystem("memory"), [], 0

    def __getattr__(self, name):
        return getattr(self.store, name)

    def cat_file(self, path, start=None, end=None):
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the store is away")
        found = self.store.cat_file(path, start=start, end=end)
        if start:
            self.asked.append((path, start, end))
        return found


@pytest.fixture
def store(monkeypatch, tmp_path) -> Counting:
    made = Counting()
    monkeypatch.setattr(objects, "file_system", lambda place: (made, place.replace("gs://", "/")))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    ranges.of.cache_clear()
    yield made
    made.store.rm("/", recursive=True)


def put(store, source) -> str:
    for path in source.iterdir():
        store.pipe_file(f"/bucket/models/{source.name}/{path.name}", path.read_bytes())
    return f"gs://bucket/models/{source.name}"


def targets(config, mesh):
    _, abstract, axes = decoder.abstract(config)
    shardings = sharding.param_shardings(mesh, abstract, axes, sharding.TRAIN)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def test_each_byte_is_read_once_and_by_rows(store):
    source = tiny.model("llama3_8b")
    directory = location.resolve(put(store, source))
    assert not store.asked  # headers alone
    config = model_config.read(directory)
    target = targets(config, sharding.make_mesh(2, 4, 1))
    found = weights.read(directory, config, target)
    jax.tree.map(np.testing.assert_array_equal, found, weights.read(source, config, target))
    wanted = [leaf.sharding for leaf in jax.tree.leaves(target)]
    assert all(leaf.sharding.is_equivalent_to(w, leaf.ndim) for leaf, w in zip(jax.tree.leaves(found), wanted))
    size = sum(tensor.nbytes for path in source.glob("*.safetensors") for tensor in load_file(path).values())
    assert len(set(store.asked)) == len(store.asked)
    assert sum(end - start for _, start, end in store.asked) == size
    # The rows of each tensor are spread over the eight devices, as evenly as heads and rows divide.
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads, "v_proj": config.kv_heads}
    for name, tensor in load_file(source / "model.safetensors").items():
        rows = next((count for part, count in heads.items() if part in name), len(tensor))
        begin = ranges.of(directory).slice(directory / "model.safetensors", name)._offset
        longest = max(end - start for _, start, end in store.asked if begin <= start < begin + tensor.nbytes)
        assert longest == tensor.nbytes // rows * math.ceil(rows / 8)


def test_exports_take_over_what_is_read_by_ranges(store, tmp_path):
    source = tiny.model("llama3_8b")
    directory = location.resolve(put(store, source))
    config = model_config.read(directory)
    export.save(tmp_path / "out", weights.read(directory, config, decoder.abstract(config)[1]), directory)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in source.iterdir()}
    for name, tensor in load_file(source / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(tmp_path / "out/model.safetensors")[name], tensor)


def test_a_store_that_fails_is_asked_again_and_then_named(store, monkeypatch, capsys):
    monkeypatch.setattr(retries, "PAUSES", (0.0, 0.0))
    counted = retries.count()
    directory = location.resolve(put(store, tiny.model("llama3_8b")))
    tensor = tensor_files.open_all(directory)["model.norm.weight"]
    store.failures = 2
    np.testing.assert_array_equal(tensor.whole(), tensor.slice()[:])
    assert capsys.readouterr().err.count("note: the store is away; retrying in 0 s (retry ") == 2
    assert retries.count() == counted + 2
    store.failures = 3
    with pytest.raises(
        UserError, match=r"^config.model.path=gs://bucket/models/\S+ cannot be reached: the store is away$"
    ):
        tensor.whole()


def test_what_is_no_safetensors_file_is_named_and_what_changes_is_noticed(store):
    place = put(store, tiny.model("llama3_8b"))
    path = f"/{place.removeprefix('gs://')}/model.safetensors"
    encoded = batches.Encoded((), (), 0, 0, {}, 0)
    before = fingerprint.of(location.resolve(place), encoded)
    content = store.store.cat_file(path)
    store.pipe_file(path, content[:-1])
    after = fingerprint.of(location.resolve(place), encoded)
    assert fingerprint.changes(before, after) == ["config.model.path: model.safetensors has changed"]
    with pytest.raises(UserError, match=r"model.safetensors is truncated or not a safetensors file"):
        tensor_files.find(location.resolve(place))
    store.pipe_file(path, bytes(range(256)))
    with pytest.raises(UserError, match=r"model.safetensors is truncated or not a safetensors file"):
        tensor_files.find(location.resolve(place))
