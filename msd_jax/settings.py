"""Checks a config before anything is compiled: unknown keys, wrong types, impossible values and combinations."""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_collections

from msd_jax import losses
from msd_jax.configs import default
from msd_jax.data import near_duplicates, prompts, records, sources
from msd_jax.errors import UserError
from msd_jax.evaluation import answering, benchmarks, judges
from msd_jax.evaluation.judges import endpoint, formats, guard
from msd_jax.generation import responses
from msd_jax.models import attention, decoder, lora
from msd_jax.planning import hardware, launch
from msd_jax.training import former_keys, optimizer, train_step

# Mappings whose keys are the user's own, and the type of their values (None: any).
_FREE = {
    "ablation.variants": None,
    "data.languages": float,
    "data.sources": None,
    "prompts.student_template_kwargs": None,
    "prompts.teacher_template_kwargs": None,
    "judge.openai.request": None,
}

_DTYPES = ("float32", "bfloat16")
_CHOICES = {
    "model.param_dtype": _DTYPES,
    "model.dtype": _DTYPES,
    "model.attention": attention.CHOICES,
    "model.remat": tuple(decoder.REMAT_POLICIES),
    "data.harmful": tuple(records.LABELS),
    "data.near_duplicates": near_duplicates.ACTIONS,
    "prompts.cot": prompts.COT,
    "teacher.kind": train_step.TEACHERS,
    "rollout.policy": tuple(responses.POLICIES),
    "loss.divergence": ("auto", *losses.OBJECTIVES),
    "loss.weighting": tuple(losses.WEIGHTINGS),
    "loss.student_token": losses.STUDENT_TOKENS,
    "loss.normalize": losses.NORMALIZATIONS,
    "optimizer.name": optimizer.RULES,
    "optimizer.moments_dtype": _DTYPES,
    "optimizer.schedule": optimizer.SCHEDULES,
    "eval.harmful": tuple(records.LABELS),
    "eval.sample": benchmarks.SAMPLES,
    "launch.accelerator": launch.ACCELERATORS,
    "judge.kind": judges.KINDS,
    "judge.translate": judges.TRANSLATORS,
    "judge.guard.format": guard.FORMATS,
    "judge.guard.dtype": _DTYPES,
    "judge.openai.format": tuple(formats.FORMATS),
    "judge.openai.addresses": endpoint.ADDRESSES,
}
# Tuples of choices, each at most once: what they are chosen from, and the fewest.
_SELECTIONS = {
    "model.lora.targets": (tuple(lora.ADAPTABLE), 1),
    "eval.benchmarks": (benchmarks.NAMES, 0),
    "eval.passes": (tuple(answering.TEMPERATURES), 1),
}


class _Range(NamedTuple):
    """The numbers from `low` to `high`, `low` itself only if not `above`."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: Any) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'greater than' if self.above else 'at least'} {self.low}" + (
            f" and at most {self.high}" if self.high < math.inf else ""
        )


_MOST = 10_000_000  # more steps, rows or tokens than any run has: what is larger is a slip of the keyboard
_COUNT, _COUNT_OR_NONE = _Range(1, _MOST), _Range(0, _MOST)
_SHARE, _AMOUNT, _POSITIVE = _Range(0, 1), _Range(0), _Range(0, above=True)
_AXIS = _Range(-1, _MOST)
_RANGES = {
    "seed": _Range(0, 2**32 - 1),
    "model.lora.rank": _COUNT_OR_NONE,
    "model.lora.alpha": _POSITIVE,
    "data.batch_size": _COUNT,
    "data.length_window": _Range(1, 64),
    "data.retain_fraction": _SHARE,
    "prompts.student_limit": _COUNT,
    "prompts.teacher_limit": _COUNT,
    "prompts.analysis_tokens": _COUNT,
    "teacher.ema_decay": _SHARE,
    "teacher.period": _COUNT,
    "rollout.on_policy_fraction": _SHARE,
    "rollout.max_new_tokens": _COUNT,
    "rollout.temperature": _AMOUNT,
    "rollout.top_k": _COUNT_OR_NONE,
    "rollout.top_p": _Range(0, 1, above=True),
    "loss.beta": _SHARE,
    "loss.top_k": _COUNT_OR_NONE,
    "loss.temperature": _POSITIVE,
    "loss.weight_top_k": _Range(2, _MOST),
    "optimizer.learning_rate": _Range(0, 1),  # of an update whose entries are about 1
    "optimizer.warmup_steps": _COUNT_OR_NONE,
    "optimizer.adamw.b1": _SHARE,
    "optimizer.adamw.b2": _SHARE,
    "optimizer.adamw.eps": _POSITIVE,
    "optimizer.weight_decay": _AMOUNT,
    "optimizer.clip_norm": _POSITIVE,
    "train.steps": _COUNT_OR_NONE,
    "train.micro_batches": _COUNT,
    "train.loss_chunk": _COUNT,
    "train.max_skipped": _COUNT,
    "train.checkpoints.every": _COUNT,
    "train.checkpoints.kept": _COUNT,
    "train.log_every": _COUNT,
    "train.completions.every": _COUNT,
    "train.completions.kept": _COUNT_OR_NONE,
    "eval.limit": _COUNT_OR_NONE,
    "eval.monitor.every": _COUNT_OR_NONE,
    "eval.monitor.slice": _COUNT,
    "eval.monitor.utility_floor": _SHARE,
    "eval.monitor.over_refusal_ceiling": _SHARE,
    "eval.prompt_limit": _COUNT_OR_NONE,
    "eval.batch_size": _COUNT,
    "eval.max_new_tokens": _COUNT,
    **{f"eval.{name}.limit": _COUNT_OR_NONE for name in benchmarks.NAMES},
    "preflight.min_flip": _SHARE,
    "preflight.min_language_match": _SHARE,
    "preflight.max_over_refusal_rise": _SHARE,
    "judge.translation_tokens": _COUNT,
    "judge.guard.threshold": _SHARE,
    "judge.guard.limit": _COUNT,
    "judge.guard.batch_size": _COUNT,
    "judge.openai.concurrency": _Range(1, 256),
    "judge.openai.timeout": _POSITIVE,
    "judge.openai.retries": _Range(0, 100),
    "judge.openai.price_per_million_prompt_tokens": _AMOUNT,
    "judge.openai.price_per_million_completion_tokens": _AMOUNT,
    "ablation.seeds": _COUNT,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
    "launch.slices": _COUNT,
    "launch.nodes": _COUNT,
    "launch.gpus_per_node": _COUNT_OR_NONE,
}


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
        if name in _FREE:
            if (kind := _FREE[name]) is not None:
                for inner, item in dict(value).items():
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
    for key, choices in _CHOICES.items():
        yield from _other_than(f"config.{key}", _value(config, key), choices)
    for key, (choices, fewest) in _SELECTIONS.items():
        yield from _selection(f"config.{key}", tuple(_value(config, key)), choices, fewest)
    for key, allowed in _RANGES.items():
        if (value := _value(config, key)) not in allowed:
            yield f"config.{key}={value!r} must be {allowed}"


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
    if data.harmful_share != -1 and data.harmful_share not in _SHARE:
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


def _micro_batches(config: Any) -> Iterator[str]:
    size, parts = config.data.batch_size, config.train.micro_batches
    if parts and size % parts:
        yield f"config.train.micro_batches={parts} does not divide config.data.batch_size={size}"


def _teacher(config: Any) -> Iterator[str]:
    """What a teacher that changes cannot be asked for."""
    kind = f"config.teacher.kind={config.teacher.kind!r}"
    if config.teacher.kind == "frozen":
        return
    if config.rollout.policy != "on_policy" and config.rollout.reuse_teacher_responses:
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
    *(_values, _judge, _launch, _languages, _queries, _micro_batches, _teacher, _retention, _loss, _evaluation),
)
