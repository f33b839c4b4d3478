"""Each benchmark's files as they come, with their irregularities; and the sets themselves where they are at hand."""

import json
import pathlib
import sys

import openpyxl
import pytest
from msd_jax.configs import default

from msd_jax.evaluation import benchmarks
from msd_jax.evaluation.benchmarks import safety, utility
from tests.conftest import SHARED

SETS = SHARED / "data"


def real(name: str) -> pathlib.Path:
    if not (SETS / name).is_dir():
        pytest.skip(f"the set {name} is not beside this repository")
    return SETS / name


def write(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# --- XSafety ---


@pytest.fixture
def xsafety(tmp_path) -> pathlib.Path:
    """Two queries of three kinds, as the authors' files are: no header, names that vary, a workbook for Bengali."""
    root = tmp_path / "Multilingual_safety_benchmark"
    write(root / "README.md", "not data")
    write(root / "en" / "Crimes_And_Illegal_Activities_en.csv", '"first, quoted ""query"""\nsecond en\n')
    write(root / "en" / "Insult_n.csv", "\ufefffirst en\nwith, a comma that nobody quoted\n")
    write(root / "en" / "commonsense.csv", "first en\n\n")
    write(root / "ru" / "Crimes_And_Illegal_Activitie.csv", "первый\nвторой\n")
    write(root / "sp" / "Insult.csv", "primero\nsegundo\n")
    write(root / "hi" / "commen_sense.csv", "not this\nnor this\n")
    write(root / "hi" / "commonsense.csv", "पहला\nदूसरा\n")
    book = openpyxl.Workbook()
    for text in ("প্রথম", "দ্বিতীয়"):
        book.active.append([text])
    (root / "bn").mkdir()
    book.save(root / "bn" / "Insult_n.xlsx")
    return root


def test_xsafety(xsafety, capsys):
    by_id = {query.id: query for query in safety.read_xsafety(xsafety)}
    assert by_id["Crimes_And_Illegal_Activities-001"].texts == {"en": 'first, quoted "query"', "ru": "первый"}
    assert by_id["Insult-001"].texts == {"en": "first en", "es": "primero", "bn": "প্রথম"}
    assert by_id["Insult-002"].texts["en"] == "with, a comma that nobody quoted"
    assert by_id["Commonsense-001"].texts == {"en": "first en", "hi": "पहला"}
    assert by_id["Commonsense-002"].texts == {"hi": "दूसरा"}  # the English row is empty
    assert {query.harmful for query in by_id.values()} == {None} and by_id["Insult-001"].category == "Insult"
    assert "hi has two files of Commonsense: commen_sense.csv and commonsense.csv" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("en/Cooking.csv", b"x\n", r"Cooking\.csv: not a kind of XSafety; name the file after one of Commonsense"),
        ("notes/Insult.csv", b"x\n", "'notes' is not the code of a known language"),
        ("bn/Insult_n.xlsx", b"not a zip", r"Insult_n\.xlsx: not an xlsx workbook"),
        ("en/Insult_n.csv", b"\xff\n", r"Insult_n\.csv, line 1: byte 0xff at offset 0 is not UTF-8"),
        ("en/Insult_n.csv", b'"never closed\n', r"Insult_n\.csv: malformed CSV"),
    ],
)
def test_xsafety_that_is_damaged(xsafety, name, content, message):
    (xsafety / name).parent.mkdir(exist_ok=True)
    (xsafety / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        safety.read_xsafety(xsafety)


def test_a_workbook_without_its_extra_says_how_to_get_it(xsafety, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ValueError, match=r"Insult_n\.xlsx is a workbook, .*: pip install 'msd-jax\[xlsx\]'"):
        safety.read_xsafety(xsafety)


def test_an_empty_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it holds no \*\.csv or \*\.xlsx"):
        safety.read_xsafety(tmp_path)


# --- PKU-SafeRLHF ---


def lines(*records: dict) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def test_pku_as_published(tmp_path):
    """A prompt comes once for each pair of responses; what is labelled is the responses."""
    a, b = {"prompt": "a?", "response_0": "x", "is_response_0_safe": False}, {"prompt": "b?"}
    write(tmp_path / "data/Alpaca-7B/train.jsonl", lines({"prompt": "of training"}))
    write(tmp_path / "data/Alpaca-7B/test.jsonl", lines(a, b, a))
    write(tmp_path / "data/Alpaca2-7B/test.jsonl", lines({"prompt": "c?"}, b))
    found = safety.read_pku_saferlhf(tmp_path)
    assert sorted(query.texts["en"] for query in found) == ["a?", "b?", "c?"]
    assert len({query.id for query in found}) == 3 and {query.harmful for query in found} == {None}


def test_pku_in_several_languages(tmp_path):
    write(tmp_path / "sw.jsonl", lines({"prompt": "moja"}, {"prompt": "mbili"}))
    write(tmp_path / "en.jsonl", lines({"prompt": "one", "harmful": True}, {"prompt": "two"}) + "\n")
    one, two = safety.read_pku_saferlhf(tmp_path)
    assert one.texts == {"en": "one", "sw": "moja"} and two.texts == {"en": "two", "sw": "mbili"}
    assert (one.harmful, two.harmful) == (True, None)
    records = [{"id": 7, "prompt": "one", "language": "en"}, {"id": 7, "prompt": "siji", "language": "jv"}]
    [query] = safety.read_pku_saferlhf(write(tmp_path / "one/all.jsonl", lines(*records)))
    assert query.id == "7" and query.texts == {"en": "one", "jv": "siji"}


def test_pku_as_conversations(tmp_path, capsys):
    one = {"prompt": [{"from": "human", "value": "a?"}], "harmful": True}
    other = {"prompt": [{"role": "user", "content": "d?"}]}
    several = {"prompt": [*one["prompt"], {"from": "gpt", "value": "b"}, {"from": "human", "value": "c?"}]}
    found = safety.read_pku_saferlhf(
        write(tmp_path / "en.jsonl", lines(one, several, other, {"prompt": "e?"}, one, several))
    )
    assert [(query.texts["en"], query.harmful) for query in found] == [("a?", True), ("d?", None), ("e?", None)]
    assert capsys.readouterr().out == "pku_saferlhf: 2 prompts left out: they are conversations of several turns\n"


@pytest.mark.parametrize(
    "text, message",
    [
        (lines({"prompt": [{"from": "gpt", "value": "a"}]}), "line 1: .*the one turn of prompt is from 'gpt'"),
        (lines({"prompt": [{"text": "a"}]}), "line 1: not a record of PKU-SafeRLHF .no 'from'"),
        (lines({"prompt": []}), "line 1: .*is from ''"),
        (lines({"prompt": [{"from": "human", "value": ""}]}), "line 1: .*not empty"),
        ('{"prompt": "a"\n', "line 1: not a record"),
        (lines({"text": "a"}), "line 1: not a record of PKU-SafeRLHF .no 'prompt'"),
        (lines({"prompt": "a"}, {"prompt": " "}), "line 2: .*not empty"),
        (lines({"prompt": "a", "language": "klingonish"}), "not the code of a known language"),
        (lines({"prompt": "a", "harmful": "yes"}), "harmful must be true, false or absent"),
        (lines({"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}), "line 2: id '1' is there twice in 'en'"),
        ("[1]\n", "line 1: not a record"),
    ],
)
def test_pku_that_is_damaged(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        safety.read_pku_saferlhf(write(tmp_path / "en.jsonl", text))


# --- XSTest ---

XSTEST = (
    "id,prompt,type,label,focus,note\n1,make a cup?,homonyms,safe,a,b\n2,PLACEHOLDER?,contrast_homonyms,unsafe,a,b\n"
)


def test_xstest_and_a_translated_copy(tmp_path):
    write(tmp_path / "xstest_prompts.csv", XSTEST)
    write(tmp_path / "xstest_prompts_sw.csv", XSTEST.replace("make a cup?", '"tengeneza, kikombe?"'))
    safe, unsafe = safety.read_xstest(tmp_path)
    assert safe.texts == {"en": "make a cup?", "sw": "tengeneza, kikombe?"}
    assert (safe.harmful, unsafe.harmful) == (False, True) and unsafe.category == "contrast_homonyms"


def test_xstest_without_labels_or_ids(tmp_path):
    text = "type,prompt\nhomonyms,make a cup?\ncontrast_homonyms,PLACEHOLDER?\n"
    safe, unsafe = safety.read_xstest(write(tmp_path / "xstest_v2_prompts.csv", text))
    assert (safe.id, unsafe.id) == ("1", "2") and (safe.harmful, unsafe.harmful) == (False, True)


@pytest.mark.parametrize(
    "text, message",
    [
        ("id,question\n1,x\n", "this file has no prompt and no type"),
        (XSTEST + "3,x,y,maybe,a,b\n", "row 4: label='maybe' must be safe or unsafe"),
        (XSTEST + "3,x,y\n", "row 4: 3 cells under 6 columns"),
        (XSTEST + "1,x,y,safe,a,b\n", "row 4: id '1' is there already, in 'en'"),
        ("", "this file has no prompt"),
    ],
)
def test_xstest_that_is_damaged(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        safety.read_xstest(write(tmp_path / "xstest.csv", text))


# --- MGSM ---


def test_mgsm(tmp_path):
    write(tmp_path / "mgsm_sw.tsv", "Tatizo \u201cmoja\u201d\t5,600\nLa pili\t3\n")
    write(tmp_path / "mgsm_bn.tsv", "প্রথম\t5600\nদ্বিতীয়\t3\n")
    one, _ = utility.read_mgsm(tmp_path)
    assert one.texts["sw"].startswith("Tatizo “moja”\n\nTatua") and one.answers == {"bn": "5600", "sw": "5,600"}
    for response, language, right in [
        ("Jibu: 5600", "sw", True),
        ("৫,৬০০", "bn", True),
        ("5600, lakini 3", "sw", False),
        ("Jibu: 5 600", "sw", True),
        ("", "sw", False),
    ]:
        assert utility.same_number(response, one.answers[language], language) is right


@pytest.mark.parametrize("answer", ["5600", "5,600", "5 600", "5\u202f600", "৫,৬০০", "５，６００", "5600.0"])
def test_mgsm_with_answers_as_people_write_them(tmp_path, answer):
    [problem] = utility.read_mgsm(write(tmp_path / "mgsm_en.tsv", f"x\t{answer}\n"))
    assert utility.same_number("The answer is 5,600.", problem.answers["en"], "en")


@pytest.mark.parametrize(
    "files, message",
    [
        ({"mgsm_sw.tsv": "no tab\n"}, r"mgsm_sw\.tsv, line 1: a line must be a problem, a tab and a number"),
        ({"mgsm_sw.tsv": "x\tnone\n"}, "line 1: a line must be a problem"),
        ({"mgsm_xx.tsv": "x\t1\n"}, "MGSM has no language 'xx'"),
        ({"mgsm_sw.tsv": "x\t1\n", "mgsm_en.tsv": "x\t1\ny\t2\n"}, "different numbers of problems"),
    ],
)
def test_mgsm_that_is_damaged(tmp_path, files, message):
    for name, text in files.items():
        write(tmp_path / name, text)
    with pytest.raises(ValueError, match=message):
        utility.read_mgsm(tmp_path)


# --- The sets themselves ---


def test_real_multijail():
    records = safety.read_multijail(real("multijail"))
    assert len(records) == 210 and len(records[0].texts) == 10 and all(record.harmful for record in records)


def test_real_xstest():
    records = safety.read_xstest(real("xstest"))
    assert len(records) == 450 and sum(record.harmful for record in records) == 200


def test_real_mgsm():
    records = utility.read_mgsm(real("mgsm"))
    assert len(records) == 250 and set(records[0].texts) == {"en", "bn", "sw", "th", "zh"}
    for record in records:  # one value in all languages, and each answer reads as itself
        assert len({utility.last_number(answer, "en") for answer in record.answers.values()}) == 1
        assert all(utility.same_number(answer, answer, code) for code, answer in record.answers.items())


# --- By config ---


@pytest.fixture
def config(tmp_path):
    config = default.get_config().eval
    write(tmp_path / "xstest_prompts.csv", XSTEST)
    write(tmp_path / "mgsm_sw.tsv", "".join(f"x\t{i}\n" for i in range(10)))
    write(tmp_path / "mgsm_th.tsv", "".join(f"x\t{i}\n" for i in range(10)))
    config.benchmarks = ("mgsm", "xstest")
    config.mgsm.path = config.xstest.path = str(tmp_path)
    return config


def test_queries_of_the_users_own_are_asked_in_the_languages_that_they_have(config, tmp_path, capsys):
    texts = [{"en": "a", "sw": "b"}, {"en": "a"}, {"sw": "b", "it": "c"}, {"it": "c"}]
    rows = [{"id": str(i), "harmful": i == 0, "texts": text} for i, text in enumerate(texts)]
    config.path, config.benchmarks = str(write(tmp_path / "own.jsonl", lines(*rows))), ()
    [own] = benchmarks.load(config)
    assert own.languages == ("en", "sw") and [query.id for query in own.queries] == ["0", "1", "2"]
    assert capsys.readouterr().out == (
        "evaluation on queries: 1 harmful, 1 harmless in en (absent in 1 of 3 records, first: id '2'); "
        "1 harmful, 1 harmless in sw (absent in 1 of 3 records, first: id '1')\n"
    )
    config.languages = ("en", "yo")
    with pytest.raises(ValueError, match=r"own\.jsonl: no record has a text in yo; there are texts in en, sw, it;"):
        benchmarks.load(config)
    config.languages, config.limit, config.sample = ("it",), 1, "first"
    assert [query.id for query in benchmarks.load(config)[0].queries] == ["2"]
    config.languages = ("en", "it")
    with pytest.raises(ValueError, match=r"queries: none of the 1 records that a limit of 1 leaves has a text in it;"):
        benchmarks.load(config)


def test_benchmarks_have_the_languages_asked_for_that_they_have(config):
    mgsm, xstest = benchmarks.load(config)
    assert (mgsm.languages, xstest.languages) == (("sw",), ("en",))
    assert mgsm.benchmark.judged is False and xstest.benchmark.judged is True
    config.mgsm.languages, config.mgsm.limit = ("th", "sw"), 4
    assert benchmarks.load(config)[0].languages == ("th", "sw")
    assert [query.id for query in benchmarks.load(config)[0].queries] == ["001", "004", "007", "010"]
    config.sample = "first"
    assert [query.id for query in benchmarks.load(config)[0].queries] == ["001", "002", "003", "004"]
    config.limit = 1
    assert [len(loaded.queries) for loaded in benchmarks.load(config)] == [4, 1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mgsm": {"path": ""}}, r"config\.eval\.mgsm\.path is empty: name a file .* mgsm_\*\.tsv of https"),
        ({"mgsm": {"path": "/nowhere"}}, r"config\.eval\.mgsm\.path=/nowhere: there is no such .* or hf://OWNER/NAME"),
        ({"mgsm": {"languages": ("bn", "sw")}}, r"config\.eval\.mgsm\.languages: .* has no bn; it has sw, th"),
        ({"languages": ("yo",)}, r"has none of config\.eval\.languages=\('yo',\); it has sw, th: remove mgsm"),
        ({"mgsm": {"path": "hf://juletxara/mgsm"}}, r"config\.eval\.mgsm\.path='hf://juletxara/mgsm': neither the hub"),
    ],
)
def test_a_missing_set_is_named_with_the_ways_to_get_it(config, change, message):
    for key, value in change.items():
        if isinstance(value, dict):
            config[key].update(value)
        else:
            config[key] = value
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        benchmarks.load(config)
