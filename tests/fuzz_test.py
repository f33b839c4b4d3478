"""Whatever a file or a flag holds, it is taken or refused with an error of ours, within five seconds and a gigabyte."""

import contextlib
import json
import math
import pathlib
import resource
import signal

import ml_collections
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msd_jax.configs import default

from msd_jax import settings as config_settings
from msd_jax.data import files
from msd_jax.errors import UserError
from msd_jax.models import config as model_config
from msd_jax.models import template_check, weights
from msd_jax.models.tokenizer import load_tokenizer
from tests.conftest import CHATML, LLAMA
from tests.data.prompts_test import byte_tokenizer

# The same cases each time.
fuzz = settings(
    max_examples=50,
    deadline=None,  # by the clock, and the machine may be busy; see only_our_errors
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
few = settings(fuzz, max_examples=12)


@contextlib.contextmanager
def only_our_errors():
    """Fails after five seconds of computing, or where a gigabyte is allocated."""

    def end(*_):
        raise TimeoutError("five seconds")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, 5)
    try:
        with contextlib.suppress(UserError):
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kilobytes


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from([0, -1, 10**30, 2**31, 1e308, math.nan, math.inf, "", "\x00", "\ud800"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
deep = st.integers(1, 200_000).map(lambda depth: "[" * depth)


def dumps(value) -> str:
    return json.dumps(value)  # NaN, Infinity and lone surrogates included, as Python writes and reads them


record_keys = st.sampled_from(["id", "harmful", "texts", "answers", "category", "x"])
records = st.one_of(
    st.dictionaries(record_keys, values, max_size=4),
    st.fixed_dictionaries(
        {"id": scalars, "harmful": scalars, "texts": st.dictionaries(st.sampled_from(["en", "sw", ""]), scalars)}
    ),
    values,
)
query_files = st.one_of(
    st.binary(max_size=200),
    st.lists(records, max_size=4).map(lambda rows: "\n".join(map(dumps, rows)).encode()),
    st.text(alphabet='id,en\n"\r\t;0é', max_size=80).map(lambda text: ("id,harmful,en,sw\n" + text).encode()),
    deep.map(str.encode),
)


@fuzz
@given(query_files, st.sampled_from(["jsonl", "csv", "parquet", "json", "tsv"]))
def test_query_files(tmp_path, content, suffix):
    path = tmp_path / f"queries.{suffix}"
    path.write_bytes(content)
    with only_our_errors():
        files.read(str(path))


def keys(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from keys(value, f"{prefix}{key}.")
        yield prefix + key


@fuzz
@given(st.lists(st.tuples(st.sampled_from(sorted(keys(default.get_config()))), values), min_size=1, max_size=3))
def test_config_overrides(overrides):
    config = default.get_config()
    config.model.path, config.data.path = "model", "queries.jsonl"
    for name, value in overrides:
        *sections, key = name.split(".")
        section = config
        for part in sections:
            section = section[part] if isinstance(section, ml_collections.ConfigDict) else {}
        if isinstance(section, ml_collections.ConfigDict):
            # ml_collections guards the types of most keys itself
            with contextlib.suppress(TypeError, ValueError), section.ignore_type():
                section[key] = value
    with only_our_errors():
        config_settings.check(config)


EXTRA = ["rope_scaling", "rope_parameters", "layer_types", "head_dim", "sliding_window", "num_experts", "hidden_act"]
EXTRA += ["text_config", "no_rope_layers", "logit_scale", "partial_rotary_factor", "original_max_position_embeddings"]


@fuzz
@given(
    st.sampled_from(model_config.SUPPORTED),
    st.dictionaries(st.sampled_from(sorted(LLAMA.keys() | set(EXTRA))), values, min_size=1, max_size=2),
)
def test_config_json(tmp_path, family, changes):
    (tmp_path / "config.json").write_text(dumps(LLAMA | {"model_type": family} | changes))
    with only_our_errors():
        read = model_config.read(tmp_path)
        {rope: rope.frequencies(read.head_dim) for rope in read.ropes}


@few
@given(st.one_of(deep, values.map(dumps), st.text(max_size=20)))
def test_config_json_that_is_no_object(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with only_our_errors():
        model_config.read(tmp_path)


@pytest.fixture(scope="module")
def header_and_data(model_dir) -> tuple[dict, bytes]:
    content = (model_dir / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@fuzz
@given(
    st.data(),
    st.sampled_from(["entry", "dtype", "shape", "data_offsets", "name", "length", "bytes"]),
    st.one_of(values, st.lists(st.integers(-1, 2**63), min_size=2, max_size=2)),
)
def test_safetensors_headers(tmp_path, model_dir, header_and_data, data, part, value):
    header, body = header_and_data
    header = {name: dict(entry) for name, entry in header.items()}
    name = data.draw(st.sampled_from(sorted(header)))
    if part == "entry":
        header[name] = value
    elif part == "name":
        header[str(value)] = header.pop(name)
    else:
        header[name][part] = value
    text = dumps(header).encode()
    length = data.draw(st.integers(0, 2**64 - 1)) if part == "length" else len(text)
    if part == "bytes":
        text = data.draw(st.binary(max_size=64))
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text + body)
    with only_our_errors():
        weights.check(tmp_path, model_config.read(model_dir))


FRAGMENTS = (
    CHATML,
    "{% for m in messages %}",
    "{% for i in range(99999) %}",
    "{% endfor %}",
    "{{ m.content }}",
    "{{ messages[7].content }}",
    "{{ 'x' * 99999999999 }}",
    "{{ 1 // 0 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ range(10**9) | list }}",
    "{{ '%999999999d' % 1 }}",
    "{{ lipsum(n=9**7) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__ }}",
    "{{ cycler.__init__ }}",
    "{{ raise_exception(messages) }}",
    "{{ messages | tojson }}",
    "{{ dict(messages) }}",
    "{% include 'x' %}",
    "{% set x = messages * 99999999 %}",
    "{% if x %}",
    "{%",
    "}}",
    "\x00",
)


@few
@given(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=4))
def test_chat_templates(tmp_path, parts):
    tokenizer = load_tokenizer(str(byte_tokenizer(tmp_path, "".join(parts))))
    with only_our_errors():
        template_check.check(tokenizer, {"the student": ([{"role": "user", "content": ""}], {})})


def test_a_deep_query_file_and_config(tmp_path):
    """Deeper than the interpreter recurses."""
    for path in (tmp_path / "queries.jsonl", tmp_path / "config.json"):
        path.write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"queries.jsonl"):
        files.read(str(tmp_path / "queries.jsonl"))
    with pytest.raises(UserError, match=r"config.json"):
        model_config.read(pathlib.Path(tmp_path))
