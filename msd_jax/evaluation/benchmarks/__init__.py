"""Benchmarks as small declarations: where a dataset comes from, how its files are read, what is measured on it.

config.eval.benchmarks names them, and each is read from config.eval.NAME.path: `hf://OWNER/NAME` (the Hugging Face
hub), or a file or directory on this machine. A new benchmark is one `Benchmark` in `BENCHMARKS`, and its section in
configs/default.py.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from msd_jax.data import hub, sources
from msd_jax.data.records import Query, describe, require_languages
from msd_jax.errors import UserError, UserFileError
from msd_jax.evaluation.benchmarks import mmmlu, safety, utility
from msd_jax.io.console import log

if TYPE_CHECKING:
    import ml_collections

OWN = "queries"  # the name of the benchmark that is the user's own file, config.eval.path


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A dataset of queries, and how responses to them are scored.

    Attributes:
      name: in config.eval.benchmarks and in summaries.
      what: one line: its contents and its paper.
      get: where a user gets it.
      read: its file or directory -> queries, not all of which need have every language.
      judged: whether config.judge judges responses; otherwise the rules look for refusals of harmless prompts.
      correct: (response, answer, language) -> whether the response gives the reference answer.
      choices: whether queries are multiple choice, scored by the log-likelihood of each choice, without generation.
    """

    name: str
    what: str
    get: str
    read: Callable[[pathlib.Path], Sequence[Query]]
    judged: bool
    correct: Callable[[str, str, str], bool] = utility.exact_match
    choices: bool = False


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(OWN, "config.eval.path", "a file ending in .jsonl or .csv", sources.read, judged=True),
        Benchmark(
            "multijail",
            "315 harmful queries in ten languages, written or checked by speakers (arXiv 2310.06474)",
            "MultiJail.csv of https://huggingface.co/datasets/DAMO-NLP-SG/MultiJail",
            safety.read_multijail,
            judged=True,
        ),
        Benchmark(
            "xsafety",
            "2,800 queries of 14 kinds in ten languages, unlabelled: not all are to be refused (arXiv 2310.00905)",
            "git clone https://github.com/Jarviswang94/Multilingual_safety_benchmark",
            safety.read_xsafety,
            judged=True,
        ),
        Benchmark(
            "pku_saferlhf",
            "the prompts of PKU-SafeRLHF, English, and any translations of them (arXiv 2406.15513)",
            "data/*/test.jsonl of https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF",
            safety.read_pku_saferlhf,
            judged=True,
        ),
        Benchmark(
            "xstest",
            "250 harmless queries that look harmful and 200 harmful ones, English (arXiv 2308.01263)",
            "xstest_prompts.csv of https://github.com/paul-rottger/xstest",
            safety.read_xstest,
            judged=True,
        ),
        Benchmark(
            "mgsm",
            "250 grade-school word problems in eleven languages (arXiv 2210.03057)",
            "mgsm_*.tsv of https://huggingface.co/datasets/juletxara/mgsm",
            utility.read_mgsm,
            judged=False,
            correct=utility.same_number,
        ),
        Benchmark(
            "mmmlu",
            "MMLU's 14,042 questions of four choices in fourteen languages and English (arXiv 2009.03300)",
            "mmlu_*.csv of https://huggingface.co/datasets/openai/MMMLU",
            mmmlu.read_mmmlu,
            judged=False,
            choices=True,
        ),
    )
}
SAMPLES = ("spread", "first")  # of config.eval.sample
NAMES = tuple(name for name in BENCHMARKS if name != OWN)  # of config.eval.benchmarks


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A benchmark's queries, limited as the config says.

    Attributes:
      benchmark: the declaration.
      queries: each with a text in at least one of `languages`; it is asked in those of them that it has.
      languages: those that the config asks for and the benchmark has.
    """

    benchmark: Benchmark
    queries: tuple[Query, ...]
    languages: tuple[str, ...]


def load(config: "ml_collections.ConfigDict") -> tuple[Loaded, ...]:
    """Reads the user's own file first, then config.eval.benchmarks in their order; `config` is config.eval.

    Prints a line for each: how many queries there are by label and language.

    Raises:
      UserError: a set is missing or not fit; the message names the key, the path and the remedy.
    """
    loaded = [_load_own(config)] if config.path else []
    return (*loaded, *(_load(name, config) for name in config.benchmarks))


def _load_own(config: "ml_collections.ConfigDict") -> Loaded:
    queries = sources.read(config.path, harmful=config.harmful, key="config.eval.path")
    require_languages(queries, config.languages, config.path)
    return _loaded(BENCHMARKS[OWN], queries, tuple(config.languages), config.limit, config.sample)


def _load(name: str, config: "ml_collections.ConfigDict") -> Loaded:
    benchmark, settings = BENCHMARKS[name], config[name]
    key = f"config.eval.{name}"
    remedy = f"name a file or directory that holds {benchmark.get}, or hf://OWNER/NAME with network access"
    if not settings.path:
        raise UserError(f"{key}.path is empty: {remedy}")
    if hub.is_uri(settings.path):
        path = hub.fetch(settings.path, key=f"{key}.path")
    else:
        path = pathlib.Path(settings.path).expanduser()
        if not path.exists():
            raise UserFileError(f"{key}.path={settings.path}: there is no such file or directory; {remedy}")
    queries = benchmark.read(path)
    have = dict.fromkeys(language for query in queries for language in query.texts)
    asked = tuple(settings.languages) or tuple(config.languages)
    if settings.languages and (missing := [language for language in asked if language not in have]):
        raise UserError(f"{key}.languages: {settings.path} has no {', '.join(missing)}; it has {', '.join(have)}")
    languages = tuple(language for language in asked if language in have)
    if not languages:
        raise UserError(
            f"{settings.path} has none of config.eval.languages={asked}; it has {', '.join(have)}: remove {name} from "
            "config.eval.benchmarks, or add one of its languages"
        )
    return _loaded(benchmark, queries, languages, settings.limit or config.limit, config.sample)


def _loaded(
    benchmark: Benchmark, queries: Sequence[Query], languages: tuple[str, ...], limit: int, sample: str
) -> Loaded:
    """The queries that have one of `languages`, at most `limit` of them; prints how many there are of each."""
    queries = [query for query in queries if any(language in query.texts for language in languages)]
    chosen = limited(queries, limit, sample)
    if missing := [language for language in languages if all(language not in query.texts for query in chosen)]:
        raise UserError(
            f"{benchmark.name}: none of the {len(chosen)} records that a limit of {limit} leaves has a text in "
            f"{', '.join(missing)}; raise the limit"
        )
    log(f"evaluation on {benchmark.name}: {describe(chosen, languages)}")
    return Loaded(benchmark, chosen, languages)


def limited(records: Sequence[Any], limit: int, sample: str) -> tuple[Any, ...]:
    """At most `limit` of `records`, 0 for all; "spread" takes them evenly, for files are often sorted by kind."""
    if not limit:
        return tuple(records)
    return tuple(records[:limit] if sample == "first" else records[:: -(-len(records) // limit)])
