"""Every fault of a config is named with its key, its value and what would do, before anything else happens."""

import math

import ml_collections
import pytest
from msd_jax.configs import default

from msd_jax import cli, settings
from msd_jax.training import former_keys


@pytest.fixture
def config():
    return default.get_config()


def test_the_defaults_pass(config):
    settings.check(config)


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "loss.beta_ramp",
            0.5,
            r"config.loss.beta_ramp=0.5 with config.loss.divergence='auto': only the beta of a blend",
        ),
        ("loss.token_cap", -1.0, r"config.loss.token_cap=-1.0 must be at least 0"),
        ("loss.entropy_scale", "log", r"config.loss.entropy_scale='log': choose one of linear, exponential"),
        ("loss.divergence", "kl", r"config.loss.divergence='kl': choose one of auto, reverse_kl"),
        ("train.steps", -1, r"config.train.steps=-1 must be at least 0"),
        ("rollout.temperature", -1.0, r"config.rollout.temperature=-1.0 must be at least 0"),
        ("rollout.weights", "int4", r"config.rollout.weights='int4': choose one of float, int8"),
        ("eval.weights", "", r"config.eval.weights='': choose one of float, int8"),
        ("rollout.top_p", 0.0, r"config.rollout.top_p=0.0 must be greater than 0"),
        ("rollout.top_p", 1.5, r"config.rollout.top_p=1.5 must be greater than 0 and at most 1"),
        ("loss.beta", 2.0, r"config.loss.beta=2.0 must be at least 0 and at most 1"),
        ("loss.weight_top_k", 1, r"config.loss.weight_top_k=1 must be at least 2"),
        ("teacher.kind", "", r"config.teacher.kind='': choose one of frozen, live, ema, periodic"),
        ("launch.accelerator", "cpu", r"config.launch.accelerator='cpu': choose one of tpu, gpu"),
        ("launch.topology", "v5e-64", r"config.launch.topology='v5e-64': write GENERATION:SHAPE"),
        ("launch.slices", 0, r"config.launch.slices=0 must be at least 1"),
        ("judge.kind", "gpt", r"config.judge.kind='gpt': choose one of rules, guard, openai, ensemble"),
        ("eval.passes", (), r"config.eval.passes=\(\): choose one or more of greedy, t1, each once"),
        ("eval.benchmarks", ("mgsm", "gsm8k"), r"config.eval.benchmarks=\('mgsm', 'gsm8k'\): choose any number of mu"),
        ("model.remat", "all", r"config.model.remat='all': choose one of none, dots, full"),
        ("train.steps", 10**12, r"config.train.steps=1000000000000 must be at least 0 and at most 10000000"),
        ("data.batch_size", 10**12, r"config.data.batch_size=1000000000000 must be at least 1 and at most 10000000"),
        ("optimizer.learning_rate", -1e-5, r"config.optimizer.learning_rate=-1e-05 must be at least 0"),
        ("optimizer.learning_rate", 1e30, r"config.optimizer.learning_rate=1e\+30 must be at least 0 and at most 1"),
        ("optimizer.learning_rate", float("nan"), r"config.optimizer.learning_rate=nan must be a finite number"),
        ("teacher.ema_decay", float("nan"), r"config.teacher.ema_decay=nan must be a finite number"),
        ("loss.beta", float("nan"), r"config.loss.beta=nan must be a finite number"),
        ("train.steps", 10**12, r"config.train.steps=10+ must be at least 0 and at most 10000000"),
        ("train.skip_spikes", 0.5, r"config.train.skip_spikes=0.5 must be 0, or greater than 1"),
        ("train.micro_batches", 5, r"micro_batches=5 does not divide config.data.batch_size=32"),
    ],
)
def test_impossible_values(config, key, value, message):
    section, name = key.split(".")
    config[section][name] = value
    with pytest.raises(ValueError, match=message):
        settings.check(config)


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.path", "s3://bucket/queries.csv"),
        ("eval.mgsm.path", "gs:/bucket/mgsm"),
        ("judge.guard.path", "abfs://container/guard"),
        ("data.sources", {"mine": {"path": "gs://bucket/x.csv"}}),
    ],
)
def test_object_stores_are_refused(config, key, value):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=rf"config.{key}\S*=\S+: \w+:// is not read or written directly; mount it"):
        settings.check(config)


def test_datasets_of_the_hub_and_of_tfds_are_no_object_stores(config):
    config.data.path, config.eval.path = "hf://owner/name", "tfds://parallel_queries:1.0.0/test?data_dir=/data"
    settings.check(config)


@pytest.mark.parametrize(("seed", "fits"), [(0, True), (2**32 - 1, True), (2**32, False), (-1, False)])
def test_a_seed_has_32_bits(config, seed, fits):
    config.seed = seed
    if fits:
        return settings.check(config)
    with pytest.raises(ValueError, match=rf"^config.seed={seed} must be at least 0 and at most 4294967295$"):
        settings.check(config)


def numbers(section, prefix=""):
    """(key, value) of every number in the config, those in mappings of the user's own left out."""
    for key, value in section.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + key, value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_float_is_infinite_or_no_number(config, value):
    keys = [key for key, default in numbers(config) if isinstance(default, float)]
    assert len(keys) > 20 and "data.languages.sw" in keys
    config.update_from_flattened_dict(dict.fromkeys(keys, value))
    with pytest.raises(ValueError) as caught:
        settings.check(config)
    assert sorted(str(caught.value).splitlines()) == sorted(
        f"config.{key}={value!r} must be a finite number" for key in keys
    )


def test_no_count_is_absurd(config):
    keys = [key for key, default in numbers(config) if isinstance(default, int)]
    assert len(keys) > 30
    config.update_from_flattened_dict(dict.fromkeys(keys, 10**12))
    with pytest.raises(ValueError) as caught:
        settings.check(config)
    for key in keys:
        assert f"config.{key}=1000000000000 must be " in str(caught.value)


def test_unknown_missing_and_mistyped_keys(config):
    config.loss.weigthing = "dpsw"
    with pytest.raises(ValueError, match=r"config.loss.weigthing is not a known key; known here are: .*weighting"):
        settings.check(config)
    config = default.get_config()
    del config.loss.weighting
    with pytest.raises(ValueError, match=r"config.loss.weighting is missing"):
        settings.check(config)
    config = default.get_config()
    with config.ignore_type():
        config.train.steps, config.train.export = "many", 1
    with pytest.raises(ValueError, match=r"(?s)export=1 must be of type bool.*steps='many' must be of type int"):
        settings.check(config)


def test_an_old_key_ends_in_the_new_one(config):
    with config.unlocked():
        config.optimizer.b1 = 0.9
    with config.data.unlocked():
        config.data.sources = {"a": {"tfds": "set:1.0.0"}}
    with pytest.raises(ValueError) as caught:
        settings.check(config)
    assert str(caught.value) == "config.optimizer.b1 is now config.optimizer.adamw.b1"
    del config.optimizer.b1
    with pytest.raises(ValueError, match=r"^config\.data\.sources\.a\.tfds is now config\.data\.path='tfds://"):
        settings.check(config)
    flag = "--config.eval.every=2"
    assert cli._explain(AttributeError("'every' Did you mean \"xstest\"?"), [flag]) == (
        f"{flag}: config.eval.every is now config.eval.monitor.every"
    )


def test_former_keys_lead_to_keys_that_exist():
    for old, new in former_keys.RENAMED.items():
        with pytest.raises((AttributeError, KeyError)):
            settings._value(default.get_config(), old)
        settings._value(default.get_config(), new)


@pytest.mark.parametrize("members", [("rules",), ("rules", "rules"), ("rules", "gpt")])
def test_members_of_an_ensemble(config, members):
    config.judge.members = members
    settings.check(config)  # they are not used
    config.judge.kind = "ensemble"
    with pytest.raises(ValueError, match=r"config.judge.members=\(.*choose two or more of rules, guard, openai"):
        settings.check(config)


def test_a_request_of_the_user_is_free(config):
    config.judge.openai.request.max_completion_tokens = 300
    settings.check(config)
    config.judge.openai.timeout = 0.0
    with pytest.raises(ValueError, match=r"config.judge.openai.timeout=0.0 must be greater than 0"):
        settings.check(config)


def test_languages(config):
    for weights, message in [
        ({}, "is empty"),
        ({"sw": -1.0}, "must not be negative"),
        ({"sw": 0.0}, "at least one sampling weight"),
        ({"sw": "x"}, "must be a number"),
        ({"sw": math.nan}, "must be a finite number"),
    ]:
        with config.unlocked(), config.ignore_type():
            config.data.languages = weights
        with pytest.raises(ValueError, match=message):
            settings.check(config)


@pytest.mark.parametrize("policy", ["off_policy", "mixed"])
@pytest.mark.parametrize("kind", ["live", "ema", "periodic"])
def test_stored_responses_need_a_frozen_teacher(config, policy, kind):
    config.rollout.policy, config.teacher.kind = policy, kind
    with pytest.raises(ValueError, match=r"reuse_teacher_responses=False"):
        settings.check(config)
    config.rollout.reuse_teacher_responses = False
    settings.check(config)


@pytest.mark.parametrize(
    "sources, message",
    [
        ({"a": {"path": "x.csv"}, "b": {"path": "tfds://parallel_queries:1.0.0/test", "weight": 2}}, None),
        (
            {"a": {"path": "x.csv", "weigth": 1.0}},
            r"sources\.a\.weigth is not a known key; known here are: path, h",
        ),
        ({"a": {"path": "x.csv", "weight": "1"}}, r"sources\.a\.weight='1' must be a number"),
        ({"a": {"path": "x.csv", "weight": -1.0}}, r"sources\.a\.weight=-1\.0: a sampling weight must not be negative"),
        ({"a": {"path": "x.csv", "weight": float("nan")}}, r"sources\.a\.weight=nan must be a finite number"),
        ({"a": {"path": "x.csv", "weight": 0.0}}, r"sources: at least one sampling weight must be positive"),
        ({"a": {"path": "x.csv", "harmful": "yes"}}, r"sources\.a\.harmful='yes': choose one of file, true, false"),
        ({"a": {"path": "x.csv", "split": "x"}}, r"sources\.a\.split is now the end of config\.data\.path='tfds://"),
        ({"a": {"weight": 1.0}}, r"sources\.a\.path is empty: name the source's queries"),
        ({"a/b": {"path": "x.csv"}}, r"sources\.a/b: a source's name has letters, digits, _ and - alone"),
        ({"a": "x.csv"}, r"sources\.a='x\.csv' must be a section with the keys path, harmful"),
    ],
)
def test_sources(config, sources, message):
    with config.unlocked(), config.ignore_type():
        config.data.sources = sources
    if message is None:
        settings.check(config)
        config.data.path = "y.csv"
        message = r"sources beside config\.data\.path: make that one a source too"
    with pytest.raises(ValueError, match=r"config\.data\." + message):
        settings.check(config)


def test_a_share(config):
    config.data.path = "x"
    for share in (-1.0, 0.0, 0.5, 1.0):
        config.data.harmful_share = share
        settings.check(config)
    for share in (-0.5, 1.5):
        config.data.harmful_share = share
        with pytest.raises(ValueError, match=r"config\.data\.harmful_share=.* must be from 0 to 1, or -1"):
            settings.check(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.retain_fraction": 1.0}, r"retain_fraction=1\.0 leaves no query to align"),
        ({"teacher.kind": "ema"}, r"retain_fraction=0\.2 with config\.teacher\.kind='ema': only a frozen teacher"),
        ({"data.source_language": "sw"}, r"retain_fraction=0\.2 with config\.data\.source_language='sw' among"),
        ({"loss.divergence": "cross_entropy", "loss.top_k": 5}, r"loss\.top_k=5 with .*'cross_entropy': set it to 0"),
        ({"train.steps": 0}, r"train\.steps=0 and nothing to evaluate"),
    ],
)
def test_baselines_that_contradict_themselves(config, changes, message):
    config.data.retain_fraction = 0.2
    settings.check(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        settings.check(config)


def test_a_seed_of_too_many_digits(config):
    config.seed = 10**30
    with pytest.raises(ValueError, match=r"config.seed=10+ must be at least 0 and at most 4294967295"):
        settings.check(config)
