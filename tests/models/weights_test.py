"""safetensors in and out: several files and devices, every tensor used, nothing from outside the directory."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from msd_jax.models import config as model_config
from msd_jax.models import decoder, export, layout, slices, tensor_files, weights
from msd_jax.parallel import sharding
from tests.conftest import LLAMA


def read(directory, config, dtype=np.float32, shardings=None):
    _, abstract, _ = decoder.abstract(config, param_dtype=dtype)
    if shardings:
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    return weights.read(directory, config, abstract)


@pytest.fixture
def loaded(model_dir):
    config = model_config.read(model_dir)
    return config, read(model_dir, config)


def test_several_files_with_an_index(model_dir, loaded, tmp_path):
    config, params = loaded
    export.save(tmp_path / "out", params, model_dir, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / tensor_files.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == files
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path / "out", config), params)


def test_weights_are_read_into_their_sharding(model_dir, loaded):
    config, params = loaded
    mesh = sharding.make_mesh(2, 2, 2)
    _, abstract, axes = decoder.abstract(config)
    shardings = sharding.param_shardings(mesh, abstract, axes, sharding.TRAIN)
    spread = read(model_dir, config, shardings=shardings)
    for leaf, whole, wanted in zip(*map(jax.tree.leaves, (spread, params, shardings))):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
        np.testing.assert_array_equal(leaf, whole)


def test_bfloat16_and_back(model_dir, loaded, tmp_path):
    config, params = loaded
    export.save(tmp_path / "out", params, model_dir, dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    back = read(tmp_path / "out", config, jnp.bfloat16)
    for leaf, whole in zip(jax.tree.leaves(back), jax.tree.leaves(params)):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(whole.astype(jnp.bfloat16)))


def test_a_failed_export_leaves_the_directory_as_it_was(model_dir, loaded, tmp_path, monkeypatch):
    _, params = loaded
    export.save(tmp_path / "out", params, model_dir)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(export, "copy_companions", lambda *_: 1 / 0)
    changed = jax.tree.map(lambda x: x + 1, params)
    for name in ("out", "other"):
        with pytest.raises(ZeroDivisionError):
            export.save(tmp_path / name, changed, model_dir)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "other").exists()


def test_every_tensor_is_used_and_every_parameter_filled(model_dir, loaded, tmp_path):
    config, params = loaded
    export.save(tmp_path / "out", params, model_dir)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    taken = {k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.weight"}
    save_file(taken | {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}, file)
    with pytest.raises(ValueError, match=r"missing: model.layers.1.mlp.up_proj.weight; left over: \S+q_proj.bias"):
        read(tmp_path / "out", config)
    # What follows from other tensors may be stored or not.
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, file)
    read(tmp_path / "out", config)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "pytorch_model.bin"])
def test_an_index_that_points_outside_the_directory_is_refused(model_dir, loaded, tmp_path, name):
    config, params = loaded
    export.save(tmp_path / "out", params, model_dir)
    (tmp_path / "out" / tensor_files.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match=r"index.json points to '\S+', which is not a .safetensors file beside it"):
        read(tmp_path / "out", config)


def copy_of(model_dir, tmp_path):
    return pathlib.Path(shutil.copytree(model_dir, tmp_path / "copy"))


def raw(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04pickle, not safetensors",
        (10**8 + 1).to_bytes(8, "little") + b"{" + b" " * 50,
        raw(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"\0" * 4),
        raw(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}}', b"\0" * 8),
        raw(
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
            b' "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
            b"\0" * 12,
        ),
        raw(b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', b"\0" * 8),
    ],
    ids=["empty", "pickle", "long header", "truncated", "out of range", "overlapping", "wrong size"],
)
def test_a_broken_file_is_refused_by_name(model_dir, loaded, tmp_path, content):
    directory = copy_of(model_dir, tmp_path)
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"copy/model.safetensors is truncated or not a safetensors file"):
        weights.check(directory, loaded[0])


def test_a_tensor_named_twice_is_refused(model_dir, loaded, tmp_path):
    directory = copy_of(model_dir, tmp_path)
    one = b'"model.norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    (directory / "model.safetensors").write_bytes(raw(b"{" + one + b", " + one + b"}", b"\0" * 8))
    with pytest.raises(ValueError, match=r"model.safetensors (holds model.norm.weight twice|is truncated or not)"):
        weights.check(directory, loaded[0])


def test_a_tensor_where_the_index_does_not_expect_it_is_refused(model_dir, loaded, tmp_path):
    config, params = loaded
    directory = tmp_path / "out"
    export.save(directory, params, model_dir, max_shard_bytes=20_000)
    index = json.loads((directory / tensor_files.INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    (directory / second).write_bytes((directory / first).read_bytes())
    with pytest.raises(ValueError, match=r"which \S+ does not expect there"):
        weights.check(directory, config)


def test_links_stay_inside_the_model_or_the_hubs_cache(model_dir, loaded, tmp_path):
    config, _ = loaded
    directory = copy_of(model_dir, tmp_path)
    file = directory / "model.safetensors"
    outside = tmp_path / "outside.safetensors"
    file.rename(outside)
    file.symlink_to(outside)
    with pytest.raises(ValueError, match=r"model.safetensors is a link to \S+outside.safetensors, outside the model"):
        weights.check(directory, config)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    shutil.copytree(directory, snapshot, symlinks=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    outside.rename(tmp_path / "models--a--b" / "blobs" / "abcd")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcd")
    weights.check(snapshot, config)


def test_pickles_are_not_opened(model_dir, loaded, tmp_path):
    directory = copy_of(model_dir, tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing; pytorch_model.bin will not be opened"):
        weights.check(directory, loaded[0])


def test_each_device_reads_its_own_slice_once(model_dir, loaded, monkeypatch):
    config, params = loaded
    read_elements = []
    read_slice = slices._read_slice

    def counted(*args):
        part = read_slice(*args)
        read_elements.append(part.size)
        return part

    monkeypatch.setattr(slices, "_read_slice", counted)
    mesh = sharding.make_mesh(2, 2, 2)  # each slice is on two devices at least
    _, abstract, axes = decoder.abstract(config)
    read(model_dir, config, shardings=sharding.param_shardings(mesh, abstract, axes, sharding.TRAIN))
    assert sum(read_elements) == sum(leaf.size for leaf in jax.tree.leaves(params))


PEAK = """
import sys, threading, time, pathlib, jax, numpy as np
from msd_jax.models import config as model_config, decoder, weights

def resident():  # without the pages of the mapped file, which the kernel may take back at any time
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024

directory = pathlib.Path(sys.argv[1])
config = model_config.read(directory)
abstract = decoder.abstract(config)[1]
jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(3))())
before, peak, done = resident(), [0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], resident())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
params = jax.block_until_ready(weights.read(directory, config, abstract))
done.set()
thread.join()
print(peak[0] - before - sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def test_host_memory_stays_within_two_tensors_of_the_models_own(tmp_path):
    """A random checkpoint of 1 GB, read by a fresh process with one device."""
    width, ffw, vocabulary, layers = 1024, 8192, 32_000, 8
    values = LLAMA | {"hidden_size": width, "intermediate_size": ffw, "num_hidden_layers": layers}
    values |= {"vocab_size": vocabulary, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = model_config.read(tmp_path)
    rng = np.random.default_rng(0)
    tensors = {name: rng.random(shape, np.float32) for name, shape in layout.shapes(config).items()}
    total = sum(t.nbytes for t in tensors.values())
    assert total > 0.95e9
    save_file(tensors, tmp_path / "model.safetensors")
    largest = max(t.nbytes for t in tensors.values())
    del tensors
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 2 * largest
