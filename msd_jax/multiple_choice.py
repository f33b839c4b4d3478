"""Multiple choice by log-likelihood: MMMLU and what looks like it.

MMLU (Hendrycks et al., arXiv 2009.03300) shows a question with its options by letter, ends in "Answer:" and takes the
letter that the model finds most probable next. OpenAI's simple-evals, from which MMMLU comes, shows the translated
question in an English frame and lets the model reason; Llama 3's evaluations begin the assistant's turn themselves and
let the model add the letter. So does this: the question is the user's message, in an English frame of our own wording,
the assistant's turn is begun with "Answer:", and the letters are scored after it. All letters have the same prompt, so
that one forward pass scores a question, and no length needs to be normalised. Without examples, and without reasoning:
a model's figures here are for comparison with its own before and after, and lower than those that its makers print.
"""

import csv
import dataclasses
import io
import pathlib
import reprlib
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from msd_jax import likelihood, prompts, queries
from msd_jax.console import say
from msd_jax.models import decoder, pretrained

QUESTION = """\
Here is a question with {count} possible answers, of which one is right. Reply with its letter alone.

{question}

{options}"""
LEAD = "Answer:"
LETTERS = string.ascii_uppercase

# Our codes -> those in MMMLU's file names.
MMMLU_LANGUAGES = {
    "ar": "AR-XY",
    "bn": "BN-BD",
    "de": "DE-DE",
    "en": "EN-US",
    "es": "ES-LA",
    "fr": "FR-FR",
    "hi": "HI-IN",
    "id": "ID-ID",
    "it": "IT-IT",
    "ja": "JA-JP",
    "ko": "KO-KR",
    "pt": "PT-BR",
    "sw": "SW-KE",
    "yo": "YO-NG",
    "zh": "ZH-CN",
}
_COLUMNS = ("Question", "A", "B", "C", "D", "Answer", "Subject")


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      id: the same in every language.
      language: BCP-47 code.
      subject: such as "abstract_algebra", "" for none.
      question: its text.
      choices: two or more texts.
      answer: index of the right one.
    """

    id: str
    language: str
    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model makes of an item.

    Attributes:
      log_likelihoods: of each choice's letter, in nats.
      choice: index of the most probable one; the first of several.
      correct: whether that is the right one.
    """

    log_likelihoods: tuple[float, ...]
    choice: int
    correct: bool


def read_mmmlu(path: str | pathlib.Path, language: str) -> tuple[Item, ...]:
    """MMMLU's questions in one language, in the file's order.

    Args:
      path: a CSV file as openai/MMMLU and simple-evals have it (an unnamed index, Question, A, B, C, D, Answer,
        Subject), or a directory that holds it as [test/]mmlu_SW-KE.csv. The set has no English: that is mmlu.csv of
        simple-evals, mmlu_EN-US.csv, or the original's all/test-00000-of-00001.parquet (cais/mmlu).
      language: BCP-47 code; "sw" and "SW-KE" mean the same.

    Raises:
      FileNotFoundError, ValueError: one message that names the file, the line and what to mend.
    """
    path = pathlib.Path(path).expanduser()
    code = language if queries.is_language(language) else language
    file = path if path.is_file() else _find(path, language)
    rows = _parquet(file) if file.suffix == ".parquet" else _csv(file)
    items, lines = [], {}
    for where, row in rows:
        item = _item(where, row, code)
        if item.id in lines:
            raise ValueError(f"{where}: index {item.id} is already at {lines[item.id]}; give each question its own")
        lines[item.id] = where
        items.append(item)
    if not items:
        raise ValueError(f"{file}: there are no questions in it")
    return tuple(items)
