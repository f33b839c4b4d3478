"""Trains the default judge's classifier on labelled completions, and measures the judge where it was not trained.

    python benchmarks/judge.py DATA/completions_dev.jsonl [--replies tests/evaluation/judges/replies] [--write] [--json FILE]

The file is one that `python -m msd_jax.judges --agreement` reads, with id (of the prompt) and model beside: XSTest v2's
completions (Röttger et al., 2024, CC-BY-4.0). One process, a minute on two cores. It prints, of refusals and of unsafe
responses:

    folds      each fifth of the prompts, judged by a classifier trained on the other four
    model M    each model's completions, judged by a classifier trained on the other models'
    held out   a fifth of the prompts, by a hash of their ids, that neither training nor the writing of the phrases saw
    replies    the hand-written replies of --replies, language by language
    speed      milliseconds for a response of 4,000 characters

--write trains on the whole file and writes the package's weights.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse

from msd_jax.evaluation.judges import Response, RulesJudge, agreement, classifier, phrases
from msd_jax.evaluation.judges.reading import Reading, read, without_sentences
from msd_jax.evaluation.judges.rules import declines

FOLDS = 5
LEAST_PROMPTS, LEAST_MODELS = 3, 2  # that a word or pair of words must occur with
INVERSE_PENALTY = 5.0


@dataclasses.dataclass(frozen=True)
class Completion:
    """A labelled completion; `readings` are what the classifier may learn from it."""

    response: Response
    label: str
    prompt_id: str
    model: str
    readings: tuple[Reading, ...]

    @property
    def refused(self) -> bool:
        return self.label == "refused"


def load(path: pathlib.Path) -> list[Completion]:
    """All completions of `path` that are labelled as refusal or compliance."""
    responses, labels = agreement.read(path)
    rows = agreement.rows(path)
    completions = []
    for response, label, row in zip(responses, labels, rows, strict=True):
        completions.append(Completion(response, label, row["id"], row["model"], _readings(response)))
    return completions


def _readings(response: Response) -> tuple[Reading, ...]:
    """The response, unless a phrase settles it; and without the sentences that say so, as one that only lectures."""
    reading = read(response, phrases.load())
    if reading is None:
        return ()
    silent = without_sentences(reading, reading.cue("decline"))
    lecture = (silent,) if reading.cue("decline") and len(silent.opening) > 60 else ()
    return lecture if declines(reading) else (reading, *lecture)


def is_held_out(prompt_id: str) -> bool:
    return int(hashlib.sha256(prompt_id.encode()).hexdigest(), 16) % 5 == 0


def fold(prompt_id: str) -> int:
    return int(hashlib.sha256(f"fold {prompt_id}".encode()).hexdigest(), 16) % FOLDS


def train(completions: Sequence[Completion]) -> classifier.Classifier:
    """Logistic regression with a squared penalty; refusals and compliance weigh the same."""
    examples = [(reading, c) for c in completions for reading in c.readings]
    names = sorted(set(classifier.dense(examples[0][0])) | _vocabulary(examples))
    column = {name: index for index, name in enumerate(names)}
    entries = [
        (row, column[name], value)
        for row, (reading, _) in enumerate(examples)
        for name, value in classifier.features(reading, column).items()
    ]
    rows, columns, values = zip(*entries)
    x = scipy.sparse.csr_matrix((values, (rows, columns)), shape=(len(examples), len(names)))
    sign = np.array([1.0 if c.refused else -1.0 for _, c in examples])
    weight = np.where(sign > 0, 0.5 / (sign > 0).mean(), 0.5 / (sign < 0).mean())

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        w, bias = parameters[:-1], parameters[-1]
        margin = sign * (x @ w + bias)
        slope = -INVERSE_PENALTY * weight * sign / (1 + np.exp(margin))
        value = INVERSE_PENALTY * (weight * np.logaddexp(0, -margin)).sum() + 0.5 * w @ w
        return value, np.append(x.T @ slope + w, slope.sum())

    found = scipy.optimize.minimize(loss, np.zeros(len(names) + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    rounded = {name: round(float(value), 3) for name, value in zip(names, found.x[:-1])}
    return classifier.Classifier(round(float(found.x[-1]), 3), {name: value for name, value in rounded.items() if value})


def _vocabulary(examples: Sequence[tuple[Reading, Completion]]) -> set[str]:
    prompts, models = collections.defaultdict(set), collections.defaultdict(set)
    for reading, completion in examples:
        for gram in classifier.grams_of(reading):
            prompts[gram].add(completion.prompt_id)
            models[gram].add(completion.model)
    return {gram for gram in prompts if len(prompts[gram]) >= LEAST_PROMPTS and len(models[gram]) >= LEAST_MODELS}
