"""Workdirs as runs leave them, made at random; texts are placeholders."""

import dataclasses
import functools
import json
import math
import pathlib

import ml_collections
import numpy as np
import pytest
from msd_jax.configs import default

from msd_jax.evaluation import rates
from msd_jax.evaluation.records import ResponseRecord

TEXT = {  # a harmless sentence in each script that must show properly
    "en": "Water boils at a lower temperature on a mountain.",
    "zh": "山上的水在较低的温度下沸腾。",
    "it": "In montagna l'acqua bolle a una temperatura più bassa.",
    "ar": "يغلي الماء على الجبل عند درجة حرارة أقل (90 °C).",
    "th": "น้ำบนภูเขาเดือดที่อุณหภูมิต่ำกว่า",
    "bn": "পাহাড়ে জল কম তাপমাত্রায় ফোটে।",
    "am": "በተራራ ላይ ውሃ በዝቅተኛ ሙቀት ይፈላል።",
    "sw": "Maji huchemka kwa joto la chini mlimani.",
    "jv": "Banyu ing gunung umob ing suhu sing luwih endhek.",
}
UNSEEN = ("ar", "th", "am")
HOSTILE = {
    "script": "<script>alert(1)</script>",
    "end": 'before </script><img src="https://example.invalid/x.png" onerror="alert(1)"> after',
    "comment": "<!--<script> ]]> --> &lt;b&gt; {{ 7 * 7 }} {% raw %}",
    "bidi": "safe \u202egnp.exe\u202c \u2066isolated\u2069 \u200fmark \u061c",
    "ansi": "\x1b[2J\x1b[31mred\x1b]0;title\x07 \x9b31m \x1b]8;;https://example.invalid\x1b\\link",
    "controls": "NUL \x00 backspace \x08\x08 bell \x07 delete \x7f separators \u2028 \u2029 carriage\rreturn",
    "lone": "half a pair \ud83d here",
    "tags": "hidden \U000e0068\U000e0069 \ufeff \u200b text",
    "markdown": "| a | b |\n|---|---|\n![x](https://example.invalid/x.png) [y](javascript:alert(1)) `c` ~~n~~ <b>b</b>",
    "long": "word " * 20_000,
}


@dataclasses.dataclass
class Maker:
    """Writes workdirs."""

    rng: np.random.Generator
    directory: pathlib.Path

    def config(self, **overrides) -> ml_collections.ConfigDict:
        config = default.get_config()
        config.model.path = "owner/base-model"
        config.data.path = "queries.csv"
        config.data.languages = ml_collections.ConfigDict({"sw": 1.0, "bn": 1.0, "jv": 1.0})
        config.eval.languages = tuple(TEXT)
        config.eval.source_languages = ("en", "zh", "it")
        config.train.steps = 60
        for key, value in overrides.items():
            *sections, name = key.split("__")
            functools.reduce(getattr, sections, config)[name] = value
        return config

    def responses(self, config, n: int, after: bool, hostile: bool = False) -> list[dict]:
        rows = []
        for code, text in TEXT.items():
            group = rates.language_group(code, config)
            unsafe = {"source": 0.05, "trained": 0.08 if after else 0.7, "unseen": 0.4 if after else 0.6}[group]
            for i in range(n):
                row = {"id": f"jail-{i}", "language": code, "harmful": True, "category": "placeholder"}
                row |= {"benchmark": "multijail", "prompt": f"[placeholder {i}] {text}"}
                for name in ("greedy", "t1"):
                    verdict = self.rng.choice(
                        ["unsafe", "refused", "safe", "invalid"], p=[unsafe, 0.9 - unsafe, 0.08, 0.02]
                    )
                    rows.append(row | self._response(name, text, verdict=str(verdict), judge="rules 3"))
                row = row | {"id": f"sum-{i}", "harmful": None, "benchmark": "mgsm", "prompt": f"{text} 3 + {i} = ?"}
                match = bool(self.rng.random() < (0.55 if group == "source" else 0.3))
                rows.append(row | self._response("greedy", text, exact_match=match))
                row |= {"id": f"choice-{i}", "benchmark": "mmmlu"}
                correct = bool(self.rng.random() < 0.5)
                rows.append(row | self._response("likelihood", "B", correct=correct, tokens=0, stopped=None))
            if code == "en":
                for i in range(n):
                    row = {"id": f"x-{i}", "language": code, "harmful": bool(i % 2), "category": "homonyms"}
                    verdicts = ["unsafe", "refused"] if i % 2 else ["answered", "refused"]
                    verdict = str(self.rng.choice(verdicts, p=[0.1, 0.9] if i % 2 else [0.8, 0.2]))
                    row |= {"benchmark": "xstest", "prompt": f"[placeholder {i}] {text}"}
                    rows.append(row | self._response("greedy", text, verdict=verdict, judge="rules 3"))
        if hostile:
            for name, text in HOSTILE.items():
                row = {"benchmark": "queries", "language": "en", "harmful": False, "id": f"{name} {text[:200]}"}
                row |= {"category": text[:200], "prompt": text} | self._response("greedy", text, judge=text[:50])
                rows.append(row | {"verdict": "refused" if after else "answered", "reason": text[:200]})
        return rows

    def _response(self, name: str, text: str, **values) -> dict:
        row = {"pass": name, "response": " ".join([text] * int(self.rng.integers(1, 4)))}
        row |= {"tokens": int(self.rng.integers(5, 200)), "stopped": True, "exact_match": None, "correct": None}
        row |= {"language_match": name != "likelihood" or None, "verdict": None, "reason": "a reason", "judge": None}
        return row | values

    def evaluation(self, path: pathlib.Path, rows: list[dict], config) -> pathlib.Path:
        path.mkdir(parents=True)
        write_lines(path / "responses.jsonl", rows)
        summary = rates.summarise(map(ResponseRecord.from_json, rows), config)
        (path / "summary.json").write_text(json.dumps(summary))
        return path

    def metrics(self, steps: int) -> list[dict]:
        rows = []
        for step in range(1, steps + 1):
            kl = 0.6 * math.exp(-step / 15) + 0.03 + 0.02 * self.rng.random()
            rows.append(
                {
                    "step": step,
                    "loss": None if step == 7 else 2 * kl,
                    "kl": kl,
                    "grad_norm": 3 * kl,
                    "skipped": step >= 7,
                }
                | {"learning_rate": 1e-5 * math.sin(math.pi * step / steps), "response_length": 40 + step % 9}
                | {"stopped": 0.9, "w_T": 0.9, "w_S": kl / 3, "rollout_seconds": 1.5, "train_seconds": 2.0}
                | {"rollout_tokens_per_second": 20_000.0 + step, "train_tokens_per_second": 60_000.0, "padding": 0.3}
            )
        return rows

    def completions(self, step: int, hostile: bool = False) -> list[dict]:
        rows = []
        for index, (code, text) in enumerate(TEXT.items()):
            pieces = text.split(" ") if " " in text else list(text)
            tokens = [piece if i == 0 or " " not in text else " " + piece for i, piece in enumerate(pieces)]
            rows.append(self._completion(step, f"q-{index}", code, index % 2 == 0, tokens))
        if hostile:
            rows += [self._completion(step, name, "en", False, [text[:400], "\n"]) for name, text in HOSTILE.items()]
        return rows

    def _completion(self, step: int, id: str, code: str, harmful: bool, tokens: list[str]) -> dict:
        teacher, student, kl = self.rng.random((3, len(tokens)))
        return {
            "step": step,
            "id": id,
            "language": code,
            "harmful": harmful,
            "policy": "on_policy",
            "student_prompt": f"<|user|> [placeholder] {TEXT[code]}<|end|>",
            "teacher_prompt": "<|user|> Think about safety. [placeholder]<|end|>",
            "response": "".join(tokens),
            "tokens": tokens,
            "w_T": teacher.round(5).tolist(),
            "w_S": student.round(5).tolist(),
            "weight": (teacher * student).round(5).tolist(),
            "kl": kl.round(5).tolist(),
        }

    def run(self, name: str = "run", n: int = 12, steps: int = 60, hostile: bool = False, **overrides) -> pathlib.Path:
        """A finished run, with a model to describe."""
        workdir, config = self.directory / name, self.config(**overrides)
        workdir.mkdir()
        (workdir / "config.json").write_text(json.dumps(json.loads(config.to_json_best_effort())))
        write_lines(workdir / "metrics.jsonl", self.metrics(steps))
        write_lines(workdir / "completions.jsonl", self.completions(steps // 2) + self.completions(steps, hostile))
        for step, after in ((0, False), (steps, True)):
            rows = self.responses(config, n, after, hostile)
            self.evaluation(workdir / "eval" / str(step), rows, config)
        (workdir / "model").mkdir()
        (workdir / "model" / "config.json").write_text("{}")
        return workdir


def write_lines(path: pathlib.Path, rows: list[dict]) -> None:
    # Escaped, for a lone surrogate has no UTF-8.
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def make(rng, tmp_path) -> Maker:
    return Maker(rng, tmp_path)
