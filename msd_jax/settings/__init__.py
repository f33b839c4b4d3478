"""Checks a config before anything is compiled: unknown keys, wrong types, impossible values and combinations."""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from msd_jax.configs import default
from msd_jax.data import prompts, records, sources
from msd_jax.errors import UserError
from msd_jax.evaluation import judges
from msd_jax.io import places, stores
from msd_jax.planning import hardware
from msd_jax.settings import allowed
from msd_jax.training import former_keys


def check(config: ml_collections.ConfigDict) -> None:
    """Checks all of a config.

    Raises:
      UserError: one line per fault, each with the key, its value and what would do.
    """
    faults = list(_structure(config, default.get_config(), ""))
    if not faults:  # the other checks read the keys
        faults = [fault for find in _CHECKS for fault in find(config)]
    if faults:
        raise UserError("\n".join(faults))


def _structure(config: Any, reference: Any, prefix: str) -> Iterator[str]:
    """Unknown and missing keys, values of another type than the default's, and floats that are not finite."""
    for key in sorted(set(config) - set(reference)):
        yield _unknown(f"config.{prefix}{key}", prefix + key, sorted(reference))
    for key in reference:
        name = prefix + key
        if key not in config:
            yield f"config.{name} is missing; start your config from msd_jax.configs.default"
            continue
        value, expected = config[key], reference[key]
        if name in allowed.FREE:
            if not isinstance(value, (Mapping, ml_collections.ConfigDict)):
                yield f"config.{name}={value!r} must be a mapping"
            elif (kind := allowed.FREE[name]) is not None:
                for inner, item in value.items():
                    yield from _mistyped(f"config.{name}.{inner}", item, kind())
        elif isinstance(expected, ml_collections.ConfigDict):
            if isinstance(value, ml_collections.ConfigDict):
                yield from _structure(value, expected, name + ".")
            else:
                yield f"config.{name}={value!r} must be a section with the keys {', '.join(sorted(expected))}"
        else:
            yield from _mistyped(f"config.{name}", value, expected)


def _unknown(name: str, key: str, known: Iterable[str]) -> str:
    if now := former_keys.today(key):
        return f"{name} is now {now}"
    return f"{name} is not a known key; known here are: {', '.join(known)}"


def _mistyped(name: str, value: Any, expected: Any) -> Iterator[str]:
    """What is wrong with a value whose type must be that of `expected`, where an int may stand for a float."""
    if isinstance(expected, tuple):
        if not (isinstance(value, (tuple, list)) and all(isinstance(item, str) for item in value)):
            yield f"{name}={value!r} must be a tuple of strings"
    elif isinstance(expected, float):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            yield f"{name}={value!r} must be a number"
        elif not math.isfinite(value):
            yield f"{name}={value!r} must be a finite number"
    elif not isinstance(value, type(expected)) or isinstance(value, bool) != isinstance(expected, bool):
        yield f"{name}={value!r} must be of type {type(expected).__name__}"


def _value(config: Any, key: str) -> Any:
    return functools.reduce(lambda section, part: section[part], key.split("."), config)


def _values(config: Any) -> Iterator[str]:
    """Values that are not among a key's choices, or not in its range."""
    for key, choices in allowed.CHOICES.items():
        yield from _other_than(f"config.{key}", _value(config, key), choices)
    for key, (choices, fewest) in allowed.SELECTIONS.items():
        yield from _selection(f"config.{key}", tuple(_value(config, key)), choices, fewest)
    for key, numbers in allowed.RANGES.items():
        if (value := _value(config, key)) not in numbers:
            yield f"config.{key}={value!r} must be {numbers}"


def _other_than(name: str, value: Any, choices: Sequence[str]) -> Iterator[str]:
    if value not in choices:
        yield f"{name}={value!r}: choose one of {', '.join(choices)}"


def _selection(name: str, chosen: tuple[str, ...], choices: Sequence[str], fewest: int) -> Iterator[str]:
    if set(chosen) - set(choices) or len(set(chosen)) < len(chosen) or len(chosen) < fewest:
        number = ("any number", "one or more", "two or more")[fewest]
        yield f"{name}={chosen!r}: choose {number} of {', '.join(choices)}, each once"


def _judge(config: Any) -> Iterator[str]:
    if config.judge.kind == "ensemble":
        members = tuple(kind for kind in judges.KINDS if kind != "ensemble")
        yield from _selection("config.judge.members", tuple(config.judge.members), members, 2)


def _launch(config: Any) -> Iterator[str]:
    if config.launch.accelerator == "tpu":
        try:
            hardware.parse_slice(config.launch.topology)
        except UserError as error:
            yield str(error)


def _languages(config: Any) -> Iterator[str]:
    weights = dict(config.data.languages)
    if not weights:
        yield "config.data.languages is empty: name at least one language to align, with its sampling weight"
    for language, weight in weights.items():
        if weight < 0:
            yield f"config.data.languages.{language}={weight!r}: a sampling weight must not be negative"
    if weights and not sum(weights.values()) > 0:
        yield f"config.data.languages={weights!r}: at least one sampling weight must be positive"


def _queries(config: Any) -> Iterator[str]:
    """What is wrong with where the queries come from."""
    data = config.data
    if data.harmful_share != -1 and data.harmful_share not in allowed.SHARE:
        yield f"config.data.harmful_share={data.harmful_share!r} must be from 0 to 1, or -1 for queries as they come"
    if data.sources and data.path:
        yield "config.data.sources beside config.data.path: make that one a source too"
    for name, source in data.sources.items():
        yield from _source(f"config.data.sources.{name}", name, source)
    weights = [source.get("weight", 1.0) for source in data.sources.values() if hasattr(source, "get")]
    if data.sources and not any(weights):
        yield "config.data.sources: at least one sampling weight must be positive"


def _source(key: str, name: str, source: Any) -> Iterator[str]:
    reference = sources.DEFAULTS | {"weight": 1.0}
    if not re.fullmatch(r"[\w-]+", name):
        yield f"{key}: a source's name has letters, digits, _ and - alone"
    if not isinstance(source, (dict, ml_collections.ConfigDict)):
        yield f"{key}={source!r} must be a section with the keys {', '.join(reference)}"
        return
    faults: list[str] = []
    for inner, value in source.items():
        if inner in reference:
            faults += _mistyped(f"{key}.{inner}", value, reference[inner])
        else:
            faults.append(_unknown(f"{key}.{inner}", f"data.{inner}", reference))
    yield from faults
    if faults:
        return
    if not source.get("path"):
        yield f"{key}.path is empty: name the source's queries"
    yield from _other_than(f"{key}.harmful", source.get("harmful", "file"), tuple(records.LABELS))
    if (weight := source.get("weight", 1.0)) < 0:
        yield f"{key}.weight={weight!r}: a sampling weight must not be negative"


def _places(config: Any) -> Iterator[str]:
    stored = dict.fromkeys(("config.model.path", "config.judge.guard.path"), stores.SCHEMES)
    yield from places.faults("config", config, keys=("path", "instruction"), schemes=("hf", "tfds"), others=stored)


def _steps(config: Any) -> Iterator[str]:
    if 0 < config.train.skip_spikes <= 1:
        yield f"config.train.skip_spikes={config.train.skip_spikes!r} must be 0, or greater than 1"
    size, parts = config.data.batch_size, config.train.micro_batches
    if parts and size % parts:
        yield f"config.train.micro_batches={parts} does not divide config.data.batch_size={size}"


def _teacher(config: Any) -> Iterator[str]:
    """What a teacher that changes cannot be asked for."""
    kind = f"config.teacher.kind={config.teacher.kind!r}"
    if config.teacher.kind == "frozen":
        return
    if config.rollout.policy in ("off_policy", "mixed") and config.rollout.reuse_teacher_responses:
        yield (
            f"config.rollout.policy={config.rollout.policy!r} with {kind}: the responses of a teacher that changes "
            "cannot be stored; set config.rollout.reuse_teacher_responses=False, or config.teacher.kind='frozen'"
        )
    if config.prompts.cot == "generated":
        yield (
            f"config.prompts.cot='generated' with {kind}: the analyses of a teacher that changes cannot be kept; set "
            "config.teacher.kind='frozen', or config.prompts.cot='instruction'"
        )
    if config.data.retain_fraction > 0:
        yield (
            f"config.data.retain_fraction={config.data.retain_fraction!r} with {kind}: only a frozen teacher is the "
            "initial model that the student is held to; set config.teacher.kind='frozen'"
        )


def _reference(config: Any) -> Iterator[str]:
    """What fine-tuning on the records' answers, without a teacher, has no use for."""
    if prompts.shows_teacher(config):
        return
    fit = {"teacher.kind": ("frozen",), "prompts.cot": ("instruction", "none"), "data.retain_fraction": (0.0,)}
    for key, values in fit.items():
        if (value := _value(config, key)) not in values:
            yield (
                f"config.{key}={value!r}: fine-tuning on answers (config.rollout.policy='reference', cross_entropy and "
                f"weights that read no teacher) has no teacher; set it to {values[0]!r}"
            )


def _retention(config: Any) -> Iterator[str]:
    """What is wrong with queries that hold the student to the initial model."""
    key = f"config.data.retain_fraction={config.data.retain_fraction!r}"
    if config.data.retain_fraction == 1:
        yield f"{key} leaves no query to align; set it below 1"
    if config.data.retain_fraction > 0 and config.data.source_language in config.data.languages:
        yield (
            f"{key} with config.data.source_language={config.data.source_language!r} among config.data.languages: "
            "it would be both aligned and retained; remove it from one of them"
        )


def _loss(config: Any) -> Iterator[str]:
    if config.loss.divergence == "cross_entropy" and config.loss.top_k:
        yield f"config.loss.top_k={config.loss.top_k!r} with config.loss.divergence='cross_entropy': set it to 0"
    if config.loss.beta_ramp and config.loss.divergence != "blend":
        yield (
            f"config.loss.beta_ramp={config.loss.beta_ramp!r} with config.loss.divergence={config.loss.divergence!r}: "
            "only the beta of a blend may move; set the divergence to blend, or the ramp to 0"
        )


def _evaluation(config: Any) -> Iterator[str]:
    """What is wrong with what is evaluated, and when."""
    monitor = config.eval.monitor
    if monitor.utility_floor and not monitor.every:
        yield (
            f"config.eval.monitor.utility_floor={monitor.utility_floor!r} with config.eval.monitor.every=0: utility is "
            "not measured during training; set config.eval.monitor.every to a number of steps"
        )
    if monitor.over_refusal_ceiling < 1 and not monitor.every:
        yield (
            f"config.eval.monitor.over_refusal_ceiling={monitor.over_refusal_ceiling!r} with "
            "config.eval.monitor.every=0: over-refusal is not measured during training; set config.eval.monitor.every "
            "to a number of steps"
        )
    if config.eval.path or config.eval.benchmarks:
        return
    if monitor.every:
        yield (
            f"config.eval.monitor.every={monitor.every!r}: set config.eval.path or config.eval.benchmarks to evaluate"
        )
    if not config.train.steps:
        yield "config.train.steps=0 and nothing to evaluate (config.eval.path, config.eval.benchmarks): nothing to do"


_CHECKS: tuple[Callable[[Any], Iterator[str]], ...] = (
    *(_values, _places, _judge, _launch, _languages, _queries, _steps),
    *(_teacher, _reference, _retention, _loss, _evaluation),
)
