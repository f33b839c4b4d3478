"""Readers and rules of the utility benchmarks, which tell whether the model can still do what it could before."""

import pathlib
import unicodedata

from msd_jax.data.records import Query
from msd_jax.errors import UserError
from msd_jax.evaluation.benchmarks import tables
from msd_jax.evaluation.benchmarks.final_number import last_number
from msd_jax.io.text import read_text

# What follows the text of a problem of MGSM, in its own language. The wording is ours.
_MGSM_INSTRUCTIONS = {
    "en": "Solve this step by step. Write the final answer, a number alone, on the last line.",
    "bn": "ধাপে ধাপে সমাধান করো। শেষ লাইনে শুধু চূড়ান্ত উত্তরের সংখ্যাটি লেখো।",
    "de": "Löse die Aufgabe Schritt für Schritt. Schreibe das Ergebnis, nur eine Zahl, in die letzte Zeile.",
    "es": "Resuélvelo paso a paso. Escribe el resultado final, solo un número, en la última línea.",
    "fr": "Résous ce problème étape par étape. Écris le résultat final, un nombre seul, sur la dernière ligne.",
    "ja": "順を追って解いてください。最後の行に、最終的な答えの数字だけを書いてください。",
    "ru": "Реши задачу шаг за шагом. В последней строке напиши окончательный ответ, только число.",
    "sw": "Tatua hatua kwa hatua. Andika jibu la mwisho, nambari pekee, kwenye mstari wa mwisho.",
    "te": "దశలవారీగా పరిష్కరించండి. చివరి వరుసలో తుది సమాధానం, సంఖ్య మాత్రమే, రాయండి.",
    "th": "แก้โจทย์ทีละขั้นตอน เขียนคำตอบสุดท้ายเป็นตัวเลขเท่านั้นในบรรทัดสุดท้าย",
    "zh": "请一步一步解答。在最后一行只写最终答案的数字。",
}


def exact_match(response: str, answer: str, language: str) -> bool:
    """Whether the response is the answer, up to spaces and Unicode form (NFC)."""
    del language
    normal = [" ".join(unicodedata.normalize("NFC", text).split()) for text in (response, answer)]
    return normal[0] == normal[1]


def same_number(response: str, answer: str, language: str) -> bool:
    """Whether the last number of the response is the answer's; see `final_number.last_number`."""
    found = last_number(response, language)
    return found is not None and found == last_number(answer, "und")


def read_mgsm(path: pathlib.Path) -> tuple[Query, ...]:
    """MGSM: mgsm_LANGUAGE.tsv, one problem and its answer per line, no header; line i is problem i in each language.

    An instruction in the language of the problem follows it, so that the last number of a response is its answer.

    Args:
      path: a directory of such files, or one of them.

    Raises:
      UserError: a line or a file does not fit; the message names it.
    """
    rows: dict[str, list[tuple[str, str]]] = {}
    for file in tables.find(path, "mgsm_*.tsv"):
        language = file.stem.removeprefix("mgsm_")
        if language not in _MGSM_INSTRUCTIONS:
            known = ", ".join(_MGSM_INSTRUCTIONS)
            raise UserError(f"{file}: MGSM has no language {language!r}; it has {known}")
        rows[language] = []
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            problem, tab, answer = line.rpartition("\t")
            if not tab or last_number(answer, "und") is None:
                raise UserError(f"{file}, line {number}: a line must be a problem, a tab and a number")
            rows[language].append((problem, answer.strip()))
    lengths = {language: len(problems) for language, problems in rows.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{path}: the files of MGSM have different numbers of problems: {lengths}; download them again")
    return tuple(
        Query(
            id=f"{i + 1:03d}",
            harmful=False,
            category="",
            texts={language: f"{rows[language][i][0]}\n\n{_MGSM_INSTRUCTIONS[language]}" for language in rows},
            answers={language: rows[language][i][1] for language in rows},
        )
        for i in range(next(iter(lengths.values())))
    )
