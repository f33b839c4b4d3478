"""Checks a config before anything is compiled: unknown keys, wrong types, impossible values and combinations."""

import math
import re
from collections.abc import Iterator
from typing import Any

import ml_collections

from msd_jax import losses
from msd_jax.configs import default
from msd_jax.data import sources
from msd_jax.errors import UserError
from msd_jax.evaluation import benchmarks
from msd_jax.models.lora import ADAPTABLE
from msd_jax.planning import topology

# Mappings whose keys are the user's own, and the type of their values (None: any).
_FREE = {
    "ablation.variants": None,
    "data.languages": float,
    "data.sources": None,
    "prompts.student_template_kwargs": None,
    "prompts.teacher_template_kwargs": None,
    "judge.openai.request": None,
}

_CHOICES = {
    "model.param_dtype": ("float32", "bfloat16"),
    "model.dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "xla"),
    "model.remat": ("none", "dots", "full"),
    "model.lora.base_dtype": ("float32", "bfloat16"),
    "data.harmful": ("file", "true", "false"),
    "eval.sample": ("spread", "first"),
    "judge.translate": ("no", "endpoint", "model"),
    "data.near_duplicates": ("report", "drop"),
    "prompts.cot": ("instruction", "generated", "none"),
    "teacher.kind": ("frozen", "live", "ema", "periodic"),
    "rollout.policy": ("on_policy", "off_policy", "mixed"),
    "loss.divergence": ("auto", *losses.OBJECTIVES),
    "loss.weighting": tuple(losses.WEIGHTINGS),
    "loss.student_token": losses.STUDENT_TOKENS,
    "loss.normalize": losses.NORMALIZATIONS,
    "optimizer.name": ("adamw", "adafactor"),
    "optimizer.moments_dtype": ("float32", "bfloat16"),
    "optimizer.schedule": ("cosine", "constant"),
    "eval.harmful": ("file", "true", "false"),
    "launch.accelerator": ("tpu", "gpu"),
    "judge.kind": ("rules", "guard", "openai", "ensemble"),
    "judge.guard.format": ("llama_guard", "polyguard"),
    "judge.guard.dtype": ("float32", "bfloat16"),
    "judge.openai.format": ("rubric", "llama_guard", "polyguard"),
    "judge.openai.addresses": ("public", "private", "any"),
}

# Inclusive ranges; None is open.
_RANGES = {
    "model.lora.rank": (0, None),
    "data.batch_size": (1, None),
    "data.length_window": (1, 64),
    "prompts.student_limit": (1, None),
    "prompts.teacher_limit": (1, None),
    "prompts.analysis_tokens": (1, None),
    "data.retain_fraction": (0.0, 1.0),
    "teacher.ema_decay": (0.0, 1.0),
    "teacher.period": (1, None),
    "rollout.on_policy_fraction": (0.0, 1.0),
    "rollout.max_new_tokens": (1, None),
    "rollout.temperature": (0.0, None),
    "rollout.top_k": (0, None),
    "loss.beta": (0.0, 1.0),
    "loss.top_k": (0, None),
    "loss.weight_top_k": (2, None),
    "optimizer.learning_rate": (0.0, None),
    "optimizer.warmup_steps": (0, None),
    "optimizer.final_fraction": (0.0, 1.0),
    "optimizer.b1": (0.0, 1.0),
    "optimizer.b2": (0.0, 1.0),
    "optimizer.weight_decay": (0.0, None),
    "train.steps": (0, None),
    "train.micro_batches": (1, None),
    "train.loss_chunk": (1, None),
    "train.checkpoint_every": (1, None),
    "train.checkpoints_kept": (1, None),
    "train.log_every": (1, None),
    "train.completions_every": (1, None),
    "train.completions_kept": (0, None),
    "eval.limit": (0, None),
    "eval.every": (0, None),
    "eval.slice": (1, None),
    "eval.utility_floor": (0.0, 1.0),
    "eval.prompt_limit": (0, None),
    "eval.batch_size": (1, None),
    "eval.max_new_tokens": (1, None),
    "judge.translation_tokens": (1, None),
    "ablation.seeds": (1, None),
    "launch.slices": (1, None),
    "launch.nodes": (1, None),
    "launch.gpus_per_node": (0, None),
    "judge.guard.threshold": (0.0, 1.0),
    "judge.guard.limit": (1, None),
    "judge.guard.batch_size": (1, None),
    "judge.openai.concurrency": (1, 256),
    "judge.openai.retries": (0, 100),
    "judge.openai.price_per_million_prompt_tokens": (0.0, None),
    "judge.openai.price_per_million_completion_tokens": (0.0, None),
}
_POSITIVE = (
    "model.lora.alpha",
    "rollout.top_p",
    "loss.temperature",
    "optimizer.clip_norm",
    "optimizer.eps",
    "judge.openai.timeout",
)


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a UserError with one line a fault, each naming the key, its value and what would do."""
    faults = list(_faults(config))
    if faults:
        raise UserError("\n".join(faults))


def _faults(config: ml_collections.ConfigDict) -> Iterator[str]:
    structure = list(_structure(config, default.get_config(), ""))
    yield from structure
    if structure:  # the checks below read the keys
        return

    def value(key: str) -> Any:
        node: Any = config
        for part in key.split("."):
            node = node[part]
        return node

    for key, choices in _CHOICES.items():
        if value(key) not in choices:
            yield f"config.{key}={value(key)!r}: choose one of {', '.join(choices)}"
    for key, (low, high) in _RANGES.items():
        if value(key) < low or (high is not None and value(key) > high):
            yield f"config.{key}={value(key)!r} must be at least {low}" + (f" and at most {high}" if high else "")
    for key in _POSITIVE:
        if not value(key) > 0:
            yield f"config.{key}={value(key)!r} must be greater than 0"
    if value("rollout.top_p") > 1:
        yield f"config.rollout.top_p={value('rollout.top_p')!r} must be at most 1"

    if config.launch.accelerator == "tpu":
        try:
            topology.parse(config.launch.topology)
        except ValueError as error:
            yield str(error)

    targets, known = set(config.model.lora.targets), set(ADAPTABLE)
    if not targets or targets - known:
        yield f"config.model.lora.targets={tuple(config.model.lora.targets)!r}: choose among {', '.join(ADAPTABLE)}"

    members = tuple(config.judge.members)
    if config.judge.kind == "ensemble" and (
        len(members) < 2 or len(set(members)) < len(members) or set(members) - {"rules", "guard", "openai"}
    ):
        yield f"config.judge.members={members!r}: choose two or more of rules, guard, openai, each once"

    for key, known in (("benchmarks", benchmarks.NAMES), ("passes", ("greedy", "t1"))):
        chosen = tuple(config.eval[key])
        if set(chosen) - set(known) or len(set(chosen)) < len(chosen) or (key == "passes" and not chosen):
            yield f"config.eval.{key}={chosen!r}: choose among {', '.join(known)}, each once"

    languages = dict(config.data.languages)
    if not languages:
        yield "config.data.languages is empty: name at least one language to align, with its sampling weight"
    for language, weight in languages.items():
        if weight < 0:
            yield f"config.data.languages.{language}={weight!r}: a sampling weight must not be negative"
    if languages and not sum(languages.values()) > 0:
        yield f"config.data.languages={languages!r}: at least one sampling weight must be positive"

    yield from _data_sources(config.data)
    if config.data.batch_size % config.train.micro_batches:
        yield (
            f"config.train.micro_batches={config.train.micro_batches} does not divide "
            f"config.data.batch_size={config.data.batch_size}"
        )
    if (
        config.rollout.policy != "on_policy"
        and config.teacher.kind != "frozen"
        and config.rollout.reuse_teacher_responses
    ):
        yield (
            f"config.rollout.policy={config.rollout.policy!r} with config.teacher.kind={config.teacher.kind!r}: the "
            "responses of a teacher that changes cannot be stored; set config.rollout.reuse_teacher_responses=False, "
            "or config.teacher.kind='frozen'"
        )

    if config.prompts.cot == "generated" and config.teacher.kind != "frozen":
        yield (
            f"config.prompts.cot='generated' with config.teacher.kind={config.teacher.kind!r}: the analyses of a "
            "teacher that changes cannot be kept; set config.teacher.kind='frozen', or config.prompts.cot='instruction'"
        )

    if config.data.retain_fraction > 0:
        key = f"config.data.retain_fraction={config.data.retain_fraction!r}"
        if config.data.retain_fraction == 1:
            yield f"{key} leaves no query to align; set it below 1"
        if config.teacher.kind != "frozen":
            yield (
                f"{key} with config.teacher.kind={config.teacher.kind!r}: only a frozen teacher is the initial model "
                "that the student is held to; set config.teacher.kind='frozen'"
            )
        if config.data.source_language in languages:
            yield (
                f"{key} with config.data.source_language={config.data.source_language!r} among config.data.languages: "
                "it would be both aligned and retained; take it out of one of them"
            )
    if config.loss.divergence == "cross_entropy" and config.loss.top_k:
        yield f"config.loss.top_k={config.loss.top_k!r} with config.loss.divergence='cross_entropy': set it to 0"
    yield from _monitoring(config)
    if not config.train.steps and not (config.eval.path or config.eval.benchmarks):
        yield "config.train.steps=0 and nothing to evaluate (config.eval.path, config.eval.benchmarks): nothing to do"


def _monitoring(config: Any) -> Iterator[str]:
    """What is wrong with the evaluation while training."""
    if config.eval.utility_floor and not config.eval.every:
        yield (
            f"config.eval.utility_floor={config.eval.utility_floor!r} with config.eval.every=0: utility is not "
            "measured while training; set config.eval.every to a number of steps"
        )
    if config.eval.every and not (config.eval.path or config.eval.benchmarks):
        yield f"config.eval.every={config.eval.every!r}: set config.eval.path or config.eval.benchmarks to evaluate"


def _data_sources(data: Any) -> Iterator[str]:
    """What is wrong with where the queries come from."""
    if not (data.harmful_share == -1 or 0 <= data.harmful_share <= 1):
        yield f"config.data.harmful_share={data.harmful_share!r} must be from 0 to 1, or -1 for queries as they come"
    if data.path and data.tfds:
        yield f"config.data.tfds={data.tfds!r} and config.data.path={data.path!r}: set one of them"
    if data.sources and (data.path or data.tfds):
        yield f"config.data.sources beside config.data.{'path' if data.path else 'tfds'}: make that one a source too"
    reference = sources.DEFAULTS | {"weight": 1.0}
    for name, source in data.sources.items():
        key = f"config.data.sources.{name}"
        if not re.fullmatch(r"[\w-]+", name):
            yield f"{key}: a source's name has letters, digits, _ and - alone"
        if not isinstance(source, (dict, ml_collections.ConfigDict)):
            yield f"{key}={source!r} must be a section with the keys {', '.join(reference)}"
            continue
        faults = [
            f"{key}.{inner} is not a known key; known here are: {', '.join(reference)}"
            if inner not in reference
            else f"{key}.{inner}={value!r} must be of type {type(reference[inner]).__name__}"
            for inner, value in source.items()
            if inner not in reference or not _same_type(value, reference[inner])
        ]
        yield from faults
        if faults:
            continue
        if bool(source.get("path")) == bool(source.get("tfds")):
            yield f"{key}: set either path or tfds"
        if source.get("harmful", "file") not in _CHOICES["data.harmful"]:
            yield f"{key}.harmful={source['harmful']!r}: choose one of {', '.join(_CHOICES['data.harmful'])}"
        if not 0 <= source.get("weight", 1.0) < math.inf:
            yield f"{key}.weight={source['weight']!r}: a sampling weight must be a number from 0 on"
    if data.sources and not any(
        source.get("weight", 1.0) for source in data.sources.values() if hasattr(source, "get")
    ):
        yield "config.data.sources: at least one sampling weight must be positive"


def _structure(config: Any, reference: Any, prefix: str) -> Iterator[str]:
    """Unknown and missing keys, and values of another type than the default's."""
    for key in sorted(set(config) - set(reference)):
        known = ", ".join(sorted(reference))
        yield f"config.{prefix}{key} is not a known key; known here are: {known}"
    for key in reference:
        name = prefix + key
        if key not in config:
            yield f"config.{name} is missing; start your config from msd_jax.configs.default"
            continue
        value, expected = config[key], reference[key]
        if name in _FREE:
            for inner, item in dict(value).items():
                if _FREE[name] is float and (not isinstance(item, (int, float)) or isinstance(item, bool)):
                    yield f"config.{name}.{inner}={item!r} must be a number"
        elif isinstance(expected, ml_collections.ConfigDict):
            if isinstance(value, ml_collections.ConfigDict):
                yield from _structure(value, expected, name + ".")
            else:
                yield f"config.{name}={value!r} must be a section with the keys {', '.join(sorted(expected))}"
        elif not _same_type(value, expected):
            yield f"config.{name}={value!r} must be of type {type(expected).__name__}"


def _same_type(value: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return isinstance(value, (tuple, list)) and all(isinstance(item, str) for item in value)
    if isinstance(expected, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(expected, bool)
    if isinstance(expected, float):
        return isinstance(value, (int, float))
    return isinstance(value, type(expected))
