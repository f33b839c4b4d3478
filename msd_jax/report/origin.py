"""Where a run's results come from, in a few words each, for the page and the card."""

import re
from collections.abc import Iterator
from typing import Any

from msd_jax.report.collect import RunFiles

# An absolute path of any system, anywhere in a text; not what stands in a URL or between words.
_PATH = re.compile(r"(?<![\w.:/\\<])(?:~?/|[A-Za-z]:\\)(?:[^\s'\",;:()?]*[/\\])?([^\s'\",;:()/\\?]+)/?")


def facts(run: RunFiles) -> dict[str, str]:
    """What provenance.jsonl says of the last start; {} where a run has none."""
    return dict(_facts(run)) if run.provenance else {}


def without_paths(text: str) -> str:
    """The text with the last part alone of each absolute path: directories of a machine are nobody's business."""
    return _PATH.sub(r"\1", text)


def _facts(run: RunFiles) -> Iterator[tuple[str, str]]:
    first, last = run.provenance[0], run.provenance[-1]
    yield "begun", first["begun"]
    if len(run.provenance) > 1:
        yield "resumed", f"{_times(len(run.provenance) - 1)}, last on {last['begun']}" + _what_changed(first, last)
    if last["command"]:
        yield "command", last["command"]
    yield "code", _commit(last["commit"])
    devices = last["devices"]
    count = f"{devices['count']} x {devices['kind']}" + (
        f" over {devices['processes']} processes" if devices["processes"] > 1 else ""
    )
    yield "devices", f"{count}, {devices['system']}"
    yield "seed", str(last["seed"])
    yield "versions", ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    if devices["platform"] != "cpu":
        yield "platform", devices["platform"]
    yield from last["hashes"].items()


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _what_changed(first: dict[str, Any], last: dict[str, Any]) -> str:
    changed = [key for key in ("versions", "commit", "devices") if first[key] != last[key]]
    return f", with other {', '.join(changed)} than at first" if changed else ""


def _commit(commit: dict[str, Any] | None) -> str:
    if commit is None:
        return "not in a git checkout"
    return f"commit {commit['id']}" + (", with changes that are not committed" if commit["dirty"] else "")
