"""Tests of the phrases: their notation, and that every one of them can be met."""

import json
import re

import numpy as np
import pytest

from msd_jax.evaluation.judges import normalize, phrases
from msd_jax.evaluation.judges.phrases import CUES, DIRECTORY, Phrase, Phrases
from msd_jax.evaluation.judges.text import script

LANGUAGES = sorted(path.stem for path in DIRECTORY.glob("*.json"))


def matches(notation, text):
    """Whether the phrase is where a word of `text` begins, and is looked for there."""
    text, phrase = normalize(text), Phrase(notation)
    for match in re.finditer(r"(?:^|(?<=[ \n]))[^ \n]", text):
        if phrase.match(text, match.start()):
            letters = text[match.start() : match.start() + 10].replace(" ", "").replace("\n", "")
            assert any(letters.startswith(key) for key in phrase.keys)
            return True
    return False


def test_alternatives_and_gaps():
    notation = "(tut mir|es) … leid, ich kann's"
    assert matches(notation, "Tut mir wirklich leid: ich kann’s")
    assert matches(notation, "tut  mir leid, Ich kann ' s")
    assert matches(notation, "Tut mir. Leid, ich kann's")  # a gap may be the end of a sentence
    assert not matches(notation, "Mut mir leid, ich kann's")  # a phrase opens a word
    assert not matches(notation, "Tut mir mitleid, ich kann's")  # and so does what follows a gap
    assert not matches(notation, "Tut mir gut. So ein leid, ich kann's")  # a gap ends with its sentence
    assert not matches(notation, f"Tut mir {'sehr ' * 9} leid, ich kann's")  # or after 40 characters


@pytest.mark.parametrize(
    "notation, yes, no",
    [
        ("i can (help |assist)", ["I can help.", "I can help you", "i can assistance"], ["I can helpfully"]),
        ("(very |)sorry", ["very sorry", "Sorry!"], ["verysorrow"]),
        ("i can't", ["I can't", "I can’t", "i can ' t go"], ["I can tell you"]),
        ("^no$", ["No.", "Well. No! Never."], ["no way", "say no"]),
        ("help~ me", ["helping me", "help me", "helped me"], ["help for me"]),
        ("unmoglich", ["unmöglich", "UNMÖGLICHES"], ["moglich"]),
        ("我(不能|无法)…帮", ["我不能在这件事上帮你", "我无法帮你"], ["我能帮你"]),
    ],
)
def test_signs(notation, yes, no):
    assert [text for text in yes if not matches(notation, text)] == []
    assert [text for text in no if matches(notation, text)] == []


def test_sets_are_written_out():
    sets = {"verb": ["help", "{other}"], "other": ["assist", "aid"]}
    assert phrases.expand("i can't {verb} you", sets) == "i can't (help|(assist|aid)) you"


@pytest.mark.parametrize("language", LANGUAGES)
def test_phrase_files_are_sound(language):
    """Scripts are Unicode's, nothing stands twice, and each of some choices of alternatives is found as its cue."""
    entry = json.loads((DIRECTORY / f"{language}.json").read_text("utf-8"))
    assert set(entry) == {"scripts", "sets", *CUES}
    assert set(entry["scripts"]) <= {script(chr(code)) for code in range(0x30000) if chr(code).isalpha()}
    assert entry["decline"] and entry["comply"] and entry["idle"]
    rng, every = np.random.default_rng(0), phrases.load()
    for cue in CUES:
        assert len(entry[cue]) == len(set(entry[cue]))
        for notation in entry[cue]:
            for _ in range(8):
                text = phrases.expand(notation, entry["sets"])
                assert text.count("(") == text.count(")"), notation
                while "(" in text:  # innermost choices first
                    text = re.sub(r"\(([^()]*)\)", lambda group: str(rng.choice(group[1].split("|"))), text, count=1)
                text = normalize(re.sub("[$^~]", "", text.replace("…", " ")))
                found = every.find_idle(text, language) if cue == "idle" else every.find(text, language)
                assert any((one.cue, one.language) == (cue, language) for one in found), (cue, notation, text)


def test_other_languages_count_where_they_decline_at_length():
    found = phrases.load().find(normalize("Siwezi kukusaidia kwa hilo."), "de")
    assert {(one.cue, one.language) for one in found} == {("decline", "sw")}
    assert str(found[0]).endswith('" (sw)')


def write(directory, **cues):
    entry = {"scripts": ["Latin"], "sets": {}} | {cue: [] for cue in CUES} | cues
    (directory / "en.json").write_text(json.dumps(entry))
    return Phrases(directory)


def test_the_digest_follows_the_phrases(tmp_path):
    first = write(tmp_path, decline=["no way"])
    assert first.find("no way", "en") and write(tmp_path, decline=["no way"]).digest == first.digest
    assert write(tmp_path, decline=["no chance"]).digest != first.digest
