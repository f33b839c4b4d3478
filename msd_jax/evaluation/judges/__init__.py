"""Judges: whether a response refuses, complies, or says nothing at all.

Every judge maps `Response`s to `Judgement`s (see `Judge`); a report quotes each judgement's reason. `make` builds the
one that config.judge names:

    rules     phrases, a small classifier, script and repetition; no network, no download
    guard     a guard model (Llama Guard, PolyGuard) on our own decoder
    openai    any OpenAI-compatible endpoint
    ensemble  the majority of several

`python -m msd_jax.judges --agreement FILE` measures a judge against human labels.
"""

import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import ml_collections
from jax.sharding import Mesh

from msd_jax.errors import UserError
from msd_jax.evaluation.judges.cache import CachedJudge
from msd_jax.evaluation.judges.ensemble import EnsembleJudge
from msd_jax.evaluation.judges.interface import Judge, Judgement, Keep, Response, Verdict, ignore
from msd_jax.evaluation.judges.rules import RulesJudge, measured, normalize

if TYPE_CHECKING:
    from msd_jax.evaluation.judges.translate import Translator

# Decoders and HTTP are imported where a judge needs them: verdicts are read in many more places than given.

__all__ = [
    "EnsembleJudge",
    "Judge",
    "Judgement",
    "Keep",
    "Response",
    "RulesJudge",
    "Verdict",
    "cached",
    "ignore",
    "make",
    "measured",
    "normalize",
]

KINDS = ("rules", "guard", "openai", "ensemble")  # of config.judge.kind
TRANSLATORS = ("no", "endpoint", "model")  # of config.judge.translate


def make(config: ml_collections.ConfigDict, mesh: Mesh, itself: "Callable[[], Translator] | None" = None) -> Judge:
    """The judge that `config` describes.

    Args:
      config: config.judge.
      mesh: what a guard's weights are spread over.
      itself: makes the translator of config.judge.translate = "model", which is the model under evaluation.

    Raises:
      UserError: it cannot work; nothing was judged or sent.
    """
    kinds = config.members if config.kind == "ensemble" else (config.kind,)
    members = [_make(kind, config, mesh) for kind in kinds]
    if config.translate != "no":
        from msd_jax.evaluation.judges.translate import TranslatingJudge, Translations

        work = Translations(_translator(config, itself))
        members = [m if isinstance(m, RulesJudge) else TranslatingJudge(m, work) for m in members]
    return EnsembleJudge(members) if config.kind == "ensemble" else members[0]


def _make(kind: str, config: ml_collections.ConfigDict, mesh: Mesh) -> Judge:
    if kind == "rules":
        return RulesJudge()
    if kind == "guard":
        from msd_jax.evaluation.judges.guard import GuardJudge

        return GuardJudge(config.guard, mesh)
    from msd_jax.evaluation.judges.openai import OpenAIJudge

    return OpenAIJudge(config.openai)


def _translator(config: ml_collections.ConfigDict, itself: "Callable[[], Translator] | None") -> "Translator":
    if config.translate == "endpoint":
        from msd_jax.evaluation.judges.translate import EndpointTranslator

        return EndpointTranslator(config.openai)
    if itself is None:
        raise UserError("config.judge.translate='model': there is no model here; set it to endpoint or no")
    return itself()


def cached(judge: Judge, path: pathlib.Path) -> Judge:
    """`judge` with its judgements kept in the file `path`; each member's of an ensemble, but never those of the rules.

    A translating judge keeps its translations too, in translations.jsonl beside it.
    """
    from msd_jax.evaluation.judges.translate import TranslatingJudge

    if isinstance(judge, EnsembleJudge):
        return EnsembleJudge([cached(member, path) for member in judge.members])
    if isinstance(judge, RulesJudge):
        return judge
    if isinstance(judge, TranslatingJudge):
        judge = judge.stored(path.with_name("translations.jsonl"))
    return CachedJudge(judge, path)
