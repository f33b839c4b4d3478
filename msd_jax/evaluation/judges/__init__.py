"""Judges: whether a response refuses, complies, or says nothing at all.

Every judge maps `Response`s to `Judgement`s (see `Judge`); a report quotes each judgement's reason. `make` builds the
one that config.judge names:

    rules     refusal phrases, script and repetition; no model, no network
    guard     a guard model (Llama Guard, PolyGuard) on our own decoder
    openai    any OpenAI-compatible endpoint
    ensemble  the majority of several

`python -m msd_jax.judges --agreement FILE` measures a judge against human labels.
"""

import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from msd_jax.errors import UserError
from msd_jax.evaluation.judges.ensemble import EnsembleJudge
from msd_jax.evaluation.judges.interface import Judge, Judgement, Keep, Response, Verdict, ignore
from msd_jax.evaluation.judges.rules import RulesJudge, compile_phrase, normalize

if TYPE_CHECKING:
    import ml_collections
    from jax.sharding import Mesh

    from msd_jax.evaluation.judges.translate import Translator

__all__ = [
    "EnsembleJudge",
    "Judge",
    "Judgement",
    "Keep",
    "Response",
    "RulesJudge",
    "Verdict",
    "cached",
    "compile_phrase",
    "ignore",
    "make",
    "normalize",
]

KINDS = ("rules", "guard", "openai", "ensemble")  # of config.judge.kind
TRANSLATORS = ("no", "endpoint", "model")  # of config.judge.translate


def make(config: "ml_collections.ConfigDict", mesh: "Mesh", itself: "Callable[[], Translator] | None" = None) -> Judge:
    """The judge of `config`, which is config.judge; the guard's model is spread over `mesh`.

    `itself` makes the translator of config.judge.translate = "model": the model that is evaluated.

    Raises:
      UserError: it cannot work, for what one line says; nothing was judged or sent.
    """
    kinds = config.members if config.kind == "ensemble" else (config.kind,)
    members = [_make(kind, config, mesh) for kind in kinds]
    if config.translate != "no":
        from msd_jax.evaluation.judges.translate import EndpointTranslator, TranslatingJudge, Translations

        if config.translate == "endpoint":
            translator = EndpointTranslator(config.openai)
        elif itself is None:
            raise UserError("config.judge.translate='model': there is no model here; set it to endpoint or no")
        else:
            translator = itself()
        work = Translations(translator)
        members = [m if isinstance(m, RulesJudge) else TranslatingJudge(m, work) for m in members]
    return EnsembleJudge(members) if config.kind == "ensemble" else members[0]


def _make(kind: str, config: "ml_collections.ConfigDict", mesh: "Mesh") -> Judge:
    if kind == "rules":
        return RulesJudge()
    if kind == "guard":
        from msd_jax.evaluation.judges.guard import GuardJudge

        return GuardJudge(config.guard, mesh)
    from msd_jax.evaluation.judges.openai import OpenAIJudge

    return OpenAIJudge(config.openai)


def cached(judge: Judge, path: pathlib.Path) -> Judge:
    """`judge` with its judgements kept in the file `path`; an ensemble's members each, the rules never."""
    from msd_jax.evaluation.judges.cache import CachedJudge

    if isinstance(judge, EnsembleJudge):
        return EnsembleJudge([cached(member, path) for member in judge.members])
    if isinstance(judge, RulesJudge):
        return judge
    # A translating judge keeps its translations too.
    stored = judge.stored(path.with_name("translations.jsonl")) if hasattr(judge, "stored") else judge
    return CachedJudge(stored, path)
