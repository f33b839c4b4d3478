"""Judgements that survive an interruption: nothing is judged twice by the same judge."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence

from msd_jax.evaluation.judges.interface import Judge, Judgement, Keep, Response, Verdict, ignore
from msd_jax.io import jsonl
from msd_jax.parallel import distributed


class CachedJudge:
    """Another judge, with its judgements kept in an append-only JSONL file.

    The key is a hash of the judge's name and version and of the whole response (prompt, text, language, labels), since
    a verdict may depend on each. UNJUDGED ones are not kept: the next attempt may succeed.
    """

    def __init__(self, judge: Judge, path: pathlib.Path):
        # A version may depend on files that another machine sees differently; all must miss the same judgements.
        self.name, self.version = judge.name, distributed.from_first(lambda: judge.version)
        self._judge, self.endpoints = judge, judge.endpoints
        self._log = jsonl.JsonLines(path)
        self._known = {row["key"]: self._judgement(row) for row in self._log.read() if self._is_mine(row)}

    def judge(self, responses: Sequence[Response], keep: Keep = ignore) -> list[Judgement]:
        keys = [self.key(response) for response in responses]
        missing = {key: i for i, key in reversed([*enumerate(keys)]) if key not in self._known}  # each once
        missing_keys = sorted(missing, key=missing.__getitem__)

        def remember(index: int, judgement: Judgement) -> None:
            if judgement.verdict != Verdict.UNJUDGED:
                row = {"key": missing_keys[index], "judge": self.name, "version": self.version}
                self._log.append([row | {"verdict": judgement.verdict.value, "reason": judgement.reason}])
            keep(missing[missing_keys[index]], judgement)

        judged = self._judge.judge([responses[missing[key]] for key in missing_keys], remember) if missing else []
        now = self._known | dict(zip(missing_keys, judged))
        self._known |= {key: judgement for key, judgement in now.items() if judgement.verdict != Verdict.UNJUDGED}
        return [now[key] for key in keys]

    def key(self, response: Response) -> str:
        values = [self.name, self.version, dataclasses.asdict(response)]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def _is_mine(self, row: dict[str, str]) -> bool:
        return (row["judge"], row["version"]) == (self.name, self.version)

    def _judgement(self, row: dict[str, str]) -> Judgement:
        return Judgement(Verdict(row["verdict"]), row["reason"], self.name, self.version)
