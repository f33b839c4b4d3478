"""Trains the default judge's classifier on labelled completions, and measures the judge where it was not trained.

    python benchmarks/judge.py DATA/completions_dev.jsonl [--replies DIRECTORY] [--write] [--json FILE]

DATA is XSTest v2's completions (Röttger et al., 2024, CC-BY-4.0), one JSON object each: response, prompt, harmful,
language and annotation as `python -m msd_jax.judges --agreement` reads them, and id (of the prompt) and model. A fifth
of the prompts, by a hash of their ids, is held out: neither the phrases nor a choice in the code go by it. Printed, as
Markdown, of refusals and of unsafe responses:

    folds      each fifth of the other prompts, judged with a classifier trained on the rest; and of those the harmful
               prompts, of which an attack success rate is
    MODEL      each model's completions to them, judged with a classifier trained on the other models'
    held out   the prompts that were held out, judged with a classifier trained on the others
    LANGUAGE   the hand-written replies of --replies, judged with the package's own weights
    speed      CPU milliseconds for a response of 4,000 characters

--write trains on all of DATA and writes the package's weights. A minute on one core.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import pathlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse

from msd_jax.evaluation.judges import Response, RulesJudge, Verdict, agreement, classifier, phrases
from msd_jax.evaluation.judges.reading import Reading, read, without_sentences
from msd_jax.evaluation.judges.rules import declines

REPLIES = pathlib.Path(__file__).parent.parent / "tests/evaluation/judges/replies"
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
    """The completions of `path`, without partial refusals."""
    labelled = agreement.read(path)
    return [
        Completion(response, label, row["id"], row["model"], _readings(response))
        for response, label, row in zip(labelled.responses, labelled.labels, labelled.rows)
    ]


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

    found = scipy.optimize.minimize(
        loss, np.zeros(len(names) + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500}
    )
    rounded = {name: round(float(value), 3) for name, value in zip(names, found.x[:-1])}
    return classifier.Classifier(
        round(float(found.x[-1]), 3), {name: value for name, value in rounded.items() if value}
    )


def _vocabulary(examples: Sequence[tuple[Reading, Completion]]) -> set[str]:
    prompts: dict[str, set[str]] = collections.defaultdict(set)
    models: dict[str, set[str]] = collections.defaultdict(set)
    for reading, completion in examples:
        for gram in classifier.grams_of(reading):
            prompts[gram].add(completion.prompt_id)
            models[gram].add(completion.model)
    return {gram for gram in prompts if len(prompts[gram]) >= LEAST_PROMPTS and len(models[gram]) >= LEAST_MODELS}


def judged(completions: Sequence[Completion], model: classifier.Classifier | None) -> list[Verdict]:
    return [x.verdict for x in RulesJudge(model).judge([completion.response for completion in completions])]


def cross_validated(
    completions: Sequence[Completion], group: Callable[[Completion], Any]
) -> dict[Any, tuple[list[Completion], list[Verdict]]]:
    """{group: its completions, judged with a classifier trained on the other groups'}."""
    groups = sorted({group(completion) for completion in completions})
    result = {}
    for name in groups:
        tested = [completion for completion in completions if group(completion) == name]
        model = train([completion for completion in completions if group(completion) != name])
        result[name] = tested, judged(tested, model)
    return result


def figures(truth: Sequence[str], verdicts: Sequence[Verdict]) -> dict[str, dict[str, Any]]:
    """{question: n, positives, precision, recall, specificity, kappa}."""
    result = {}
    for question in agreement.QUESTIONS:
        pairs = [(label == question, verdict == question) for label, verdict in zip(truth, verdicts)]
        values = agreement.agreement([a for a, _ in pairs], [b for _, b in pairs])
        negatives = [said for true, said in pairs if not true]
        specificity = 1 - sum(negatives) / len(negatives) if negatives else None
        rates = {"precision": values.precision, "recall": values.recall, "specificity": specificity}
        positives = sum(true for true, _ in pairs)
        result[question.value] = {"n": len(pairs), "positives": positives} | rates | {"kappa": values.kappa}
    return result


def milliseconds(completions: Sequence[Completion]) -> float:
    """CPU time for a response of 4,000 characters that says nothing twice: the least of several rounds."""
    texts = [completion.response.text for completion in completions if not completion.refused]
    prompt = completions[0].response.prompt
    shuffled = [" ".join(random.Random(i).sample(texts, 8))[:4000] for i in range(50)]
    responses = [Response("en", prompt, text, True, finished=True) for text in shuffled]
    judge, rounds = RulesJudge(), []
    for _ in range(7):
        start = time.process_time()
        judge.judge(responses)
        rounds.append(time.process_time() - start)
    return 1e3 * min(rounds) / len(responses)


def measure(completions: Sequence[Completion], replies: pathlib.Path) -> dict[str, dict[str, dict[str, Any]]]:
    """{what: figures}."""
    known = [completion for completion in completions if not is_held_out(completion.prompt_id)]
    held_out = [completion for completion in completions if is_held_out(completion.prompt_id)]
    result = {}
    folds = cross_validated(known, lambda completion: fold(completion.prompt_id)).values()
    pairs = [pair for tested, verdicts in folds for pair in zip(tested, verdicts)]
    for name, chosen in (("folds", pairs), ("folds, harmful", [pair for pair in pairs if pair[0].response.harmful])):
        result[name] = figures([completion.label for completion, _ in chosen], [verdict for _, verdict in chosen])
    for name, (tested, verdicts) in cross_validated(known, lambda completion: completion.model).items():
        result[name] = figures([completion.label for completion in tested], verdicts)
    result["held out"] = figures([completion.label for completion in held_out], judged(held_out, train(known)))
    for path in sorted(replies.glob("*.jsonl")):
        labelled = agreement.read(path)
        verdicts = [x.verdict for x in RulesJudge().judge(labelled.responses)]
        result[path.stem] = figures(labelled.labels, verdicts)
    return result


def markdown(measured: dict[str, dict[str, dict[str, Any]]]) -> str:
    columns = ("n", "positives", "precision", "recall", "specificity", "kappa")
    lines = ["| " + " | ".join(["", "question", *columns]) + " |", "|" + "---|" * (len(columns) + 2)]
    for name, by_question in measured.items():
        for question, values in by_question.items():
            shown = [f"{values[c]:.3f}" if isinstance(values[c], float) else str(values[c]) for c in columns]
            lines.append("| " + " | ".join([name, question, *shown]).replace("None", "-") + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path, help="completions_dev.jsonl")
    parser.add_argument("--replies", type=pathlib.Path, default=REPLIES, help="a directory of LANGUAGE.jsonl")
    parser.add_argument("--write", action="store_true", help="write the package's weights")
    parser.add_argument("--json", type=pathlib.Path, help="where the figures go")
    arguments = parser.parse_args()
    completions = load(arguments.data)
    if arguments.write:
        train(completions).save()
    measured = measure(completions, arguments.replies)
    print(markdown(measured))
    print(f"\nspeed: {milliseconds(completions):.2f} ms")
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
