"""The model card of an exported model, in Hugging Face's format, made without contacting the hub."""

import pathlib
import re
from collections.abc import Iterator
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from msd_jax.report import origin, tables, untrusted
from msd_jax.report.results import Results
from msd_jax.report.rows import ASR_KEYS, MOST_UNJUDGED, RATES, RateRow
from msd_jax.report.words import interval, language_label, percent

_OURS = "This card was written by `msd_jax.report`, which replaces it as long as this line stands."
_SAFE = 0.05  # an upper end of attack success, or an over-refusal, above which a language is named among the limits
_USAGE = """\
```python
from transformers import pipeline

chat = pipeline("text-generation", "MODEL")  # this directory, or its name on the hub
reply = chat([{"role": "user", "content": "..."}], max_new_tokens=256)
print(reply[0]["generated_text"][-1]["content"])
```

With vLLM, as an OpenAI-compatible server: `vllm serve MODEL`."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write(results: Results) -> pathlib.Path | None:
    """Writes README.md beside the exported model; None where there is no model, or the card is no longer ours."""
    directory = results.run.model
    if directory is None:
        return None
    path = directory / "README.md"
    if path.exists() and _OURS not in path.read_text(encoding="utf-8"):
        return None
    card = ModelCard(f"---\n{metadata(results).to_yaml()}\n---\n\n{_body(results)}")
    card.save(path)
    return path


def metadata(results: Results) -> ModelCardData:
    """The card's front matter; base model and license only where they are known."""
    config = results.run.config
    base, data = config["model"]["path"], config["data"]
    trained = [untrusted.visible(code) for code, weight in data["languages"].items() if weight]
    return ModelCardData(
        model_name=untrusted.visible(results.run.directory.resolve().name),
        base_model=base if _is_hub_id(base) else None,
        language=list(dict.fromkeys([data["source_language"], *trained])),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["safety", "alignment", "multilingual", "self-distillation", "msd_jax"],
        eval_results=_eval_results(results) or None,
        **_license(base),
    )


def _is_hub_id(base: str) -> bool:
    return _HUB_ID.fullmatch(base) is not None and not pathlib.Path(base).expanduser().exists()


def _license(base: str) -> dict[str, Any]:
    """What the base model's own card says, where it is on this machine."""
    if _is_hub_id(base):
        path = huggingface_hub.try_to_load_from_cache(base, "README.md")
    else:
        path = str(pathlib.Path(base).expanduser() / "README.md")
    if not isinstance(path, str) or not pathlib.Path(path).is_file():
        return {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except yaml.YAMLError:
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if isinstance(data.get(key), str)}


def _eval_results(results: Results) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=untrusted.visible(benchmark),
            dataset_name=untrusted.visible(f"{benchmark} ({row.label})"),
            dataset_config=untrusted.visible(row.name),
            metric_type=rate.key,
            metric_name=rate.title,
            metric_value=round(row.after[rate.key], 4),
        )
        for rate in RATES
        for benchmark, rows in results.rows(rate.key).items()
        for row in rows
        if not row.pooled and not (rate.key in ASR_KEYS and row.unjudged(rate.key) > MOST_UNJUDGED)
    ]


def _body(results: Results) -> str:
    config, safe = results.run.config, untrusted.markdown
    base = config["model"]["path"]
    name = base if _is_hub_id(base) else pathlib.Path(base).name
    trained = ", ".join(safe(language_label(code)) for code, weight in config["data"]["languages"].items() if weight)
    source = safe(language_label(config["data"]["source_language"]))
    facts = {key: value for key, value in results.facts().items() if key not in ("model", "queries")}
    came_from = {key: origin.without_paths(value) for key, value in origin.facts(results.run).items()}
    parts = [
        f"# {safe(results.run.directory.resolve().name)}",
        f"Base model: {safe(name)}. It was aligned with msd_jax by Multilingual Self-Distillation with "
        "Dual-Perspective Safety Weighting ([arXiv 2605.02971](https://arxiv.org/abs/2605.02971)), which trains a "
        f"model to behave in some languages (here {trained}) as it does in another ({source}).",
        "## Usage",
        _USAGE,
        "## What was measured",
        "\n".join(f"- {safe(origin.without_paths(finding.text))}" for finding in results.findings),
        *(f"### {safe(table.title)}\n\n{tables.markdown(table)}" for table in tables.benchmarks(results)),
        "Attack success (ASR) is the share of harmful prompts whose response a judge called unsafe "
        f"({safe(origin.without_paths(', '.join(results.judges)) or 'no judge')}); brackets hold 95% Wilson intervals, "
        "p is of McNemar's exact test on the same prompts.",
        "## Limits",
        "\n".join(f"- {safe(line)}" for line in _limits(results)),
        "## How it was trained",
        "\n".join(f"- {key}: {safe(origin.without_paths(value))}" for key, value in facts.items()),
        "\n".join(f"- {safe(key)}: {safe(value)}" for key, value in came_from.items()),
        _OURS,
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _limits(results: Results) -> Iterator[str]:
    """What the model is not to be trusted with, language by language, as far as it was measured."""
    measured = set()
    for benchmark, rows in results.rows("asr").items():
        for row in rows:
            measured.add(row.name)
            if not row.pooled and row.after["asr_interval"][1] > _SAFE:
                unsafe = f"{_rate(row, 'asr')} of harmful prompts of {benchmark} get an unsafe response"
                yield f"{row.label} ({row.group}): {unsafe}"
    for benchmark, rows in results.rows("over_refusal").items():
        for row in rows:
            if not row.pooled and row.after["over_refusal"] > _SAFE:
                refused = f"{_rate(row, 'over_refusal')} of harmless prompts of {benchmark} are refused"
                yield f"{row.label} ({row.group}): {refused}"
    trained = results.run.config["data"]["languages"]
    if unknown := [language_label(code) for code, weight in trained.items() if weight and code not in measured]:
        yield f"{', '.join(unknown)}: trained, but attack success was not measured"
    yield (
        "A judge errs, and languages, topics and attacks that are not in these tables were not measured: evaluate the "
        "model on your own before you rely on it."
    )


def _rate(row: RateRow, key: str) -> str:
    return f"{percent(row.after[key])} {interval(row.after, key)}"
