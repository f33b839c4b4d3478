import dataclasses
import hashlib
import json
import math
import operator
import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from msd_jax.data import files, parallel_queries, sources
from msd_jax.data.records import Query, describe, language_name, require_languages, usable
from tests.conftest import SHARED
from tests.data.conftest import OWNER_NAME

MULTIJAIL = SHARED / "data/multijail/MultiJail_dev.csv"


def write(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*records) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def record(**changes) -> dict:
    return {"id": "a", "texts": {"en": "How do I bake bread?", "sw": "Ninaokaje mkate?"}} | changes


def test_jsonl_fields_and_defaults(tmp_path):
    path = write(
        tmp_path / "queries.jsonl",
        "\ufeff"
        + lines(
            record(harmful=False, category="food", answers={"sw": "unga"}),
            record(id="b", harmful=True),
            record(id="c", harmful=None),
            record(id="d"),
        ).replace("\n", "\r\n")
        + "\n",
    )
    texts = record()["texts"]
    assert files.read(path) == (
        Query("a", False, "food", texts, {"sw": "unga"}),
        Query("b", True, "", texts),
        Query("c", None, "", texts),
        Query("d", None, "", texts),
    )


def test_line_separators_within_a_text_do_not_end_the_line(tmp_path):
    text = "one\u2028two\x85three\x0bfour\nfive"
    path = tmp_path / "queries.jsonl"
    files.write_jsonl(path, [Query("a", None, "", {"en": text})])
    assert "\u2028" in path.read_text(encoding="utf-8")  # not escaped, so that the reader's own splitting is tested
    assert files.read(path)[0].texts["en"] == text


def test_write_then_read_gives_the_same_records(tmp_path):
    records = (
        Query("1", True, "", {"jv": "Piye carane?", "zh-Hant": "怎麼做？"}),
        Query("2", None, "food", {"am": "እንዴት?"}, {"am": "ዳቦ"}),
        Query("3", False, "['a', \"b\"]", {"ar": 'كيف "أصنع" الخبز؟'}),
    )
    path = tmp_path / "queries.jsonl"
    files.write_jsonl(path, records)
    assert files.read(path) == records
    assert [file.name for file in tmp_path.iterdir()] == ["queries.jsonl"]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = write(tmp_path / "queries.jsonl", lines(record()))

    def broken():
        yield Query("b", None, "", {"en": "x"})
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        files.write_jsonl(path, broken())
    assert [query.id for query in files.read(path)] == ["a"]


@pytest.mark.parametrize("label, expected", [("file", (True, None)), ("true", (True, True)), ("false", (True, False))])
def test_harmful_labels_only_records_that_say_nothing(tmp_path, label, expected):
    path = write(tmp_path / "queries.jsonl", lines(record(harmful=True), record(id="b")))
    assert tuple(query.harmful for query in files.read(path, harmful=label)) == expected


def test_harmful_takes_three_values(tmp_path):
    path = write(tmp_path / "queries.jsonl", lines(record()))
    with pytest.raises(ValueError, match=r"harmful='yes'.*file, true, false"):
        files.read(path, harmful="yes")


def test_csv_in_multijails_format(tmp_path):
    path = write(
        tmp_path / "queries.csv",
        "\ufeffid,source,tags,en,sw\r\n"
        "0,somebody,\"['Theft', 'Weapons']\",\"How, then?\",Vipi?\r\n"
        '1,somebody,[],"two\r\nlines, and ""quotes""",Nini?\r\n',
    )
    assert files.read(path, harmful="true") == (
        Query("0", True, "['Theft', 'Weapons']", {"en": "How, then?", "sw": "Vipi?"}),
        Query("1", True, "[]", {"en": 'two\r\nlines, and "quotes"', "sw": "Nini?"}),
    )


def test_csv_answers_harmful_and_prefixed_languages(tmp_path):
    path = write(
        tmp_path / "queries.csv",
        "id,harmful,category,text:id,en,answer:en,answer:id\n"
        "x,FALSE,food,Apa?,What?,bread,roti\n"
        "y,1,,Siapa?,Who?,,\n"
        "z,,,Mana?,Where?, ,sana\n",
    )
    x, y, z = files.read(path)
    assert x == Query("x", False, "food", {"id": "Apa?", "en": "What?"}, {"en": "bread", "id": "roti"})
    assert y == Query("y", True, "", {"id": "Siapa?", "en": "Who?"}, {})
    assert (z.harmful, z.answers) == (None, {"id": "sana"})


def test_a_blank_cell_leaves_its_language_out_of_the_record(tmp_path):
    table = "id,en,sw,answer:sw\na,x,y,z\nb,x, ,z\nc,,y,\n,,,\n"
    assert files.read(write(tmp_path / "queries.csv", table)) == (
        Query("a", None, "", {"en": "x", "sw": "y"}, {"sw": "z"}),
        Query("b", None, "", {"en": "x"}),
        Query("c", None, "", {"sw": "y"}),
    )


PLAIN = 'id,harmful,en,sw\n7,1,"How, then?",Vipi; sasa?\n8,0,Who?,Nani?\n'


@pytest.mark.parametrize(
    "table",
    [
        pytest.param(PLAIN, id="commas"),
        pytest.param('id;harmful;en;sw\n7;1;How, then?;"Vipi; sasa?"\n8;0;Who?;Nani?\n', id="semicolons"),
        pytest.param("id\tharmful\ten\tsw\n7\t1\tHow, then?\tVipi; sasa?\n8\t0\tWho?\tNani?\n", id="tabs"),
        pytest.param(',id,harmful,en,sw\n0,7,1.0,"How, then?",Vipi; sasa?\n1,8,0.0,Who?,Nani?\n', id="pandas"),
        pytest.param('Unnamed: 0,harmful,en,sw\n7,1,"How, then?",Vipi; sasa?\n8,0,Who?,Nani?\n', id="pandas, no id"),
        pytest.param(PLAIN.replace("\n", ",\n"), id="a comma at the end of each line"),
        pytest.param(PLAIN.replace("?\n", "?,\n"), id="a comma at the end of each row"),
        pytest.param(PLAIN.replace(",sw\n", ",sw,,\n"), id="commas at the end of the header"),
        pytest.param(PLAIN.replace(",", ", ", 3), id="blanks in the header"),
        pytest.param(PLAIN.replace("\n", "\r\n") + ",,,\r\n\r\n", id="blank rows at the end"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with its mark"])
def test_tables_as_people_have_them(tmp_path, table, encoding):
    name, _, mark = encoding.partition(" ")
    content = (("\ufeff" if mark else "") + table).encode(name)
    assert files.read(write(tmp_path / "queries.csv", content)) == (
        Query("7", True, "", {"en": "How, then?", "sw": "Vipi; sasa?"}),
        Query("8", False, "", {"en": "Who?", "sw": "Nani?"}),
    )


def test_the_real_multijail_file(tmp_path):
    if not MULTIJAIL.is_file():
        pytest.skip("MultiJail_dev.csv is not beside this repository")
    records = files.read(MULTIJAIL, harmful="true")
    assert len(records) == 210
    assert all(query.harmful and query.category.startswith("[") for query in records)
    assert {tuple(query.texts) for query in records} == {("en", "zh", "it", "vi", "ar", "ko", "th", "bn", "sw", "jv")}
    files.write_jsonl(tmp_path / "multijail.jsonl", records)
    assert files.read(tmp_path / "multijail.jsonl") == records


RAGGED = (
    Query("a", True, "", {"en": "x", "sw": "x", "it": "x"}),
    Query("b", False, "", {"en": "x", "sw": "x"}),
    Query("c", None, "", {"en": "x", "jv": "x"}),
    Query("d", True, "", {"jv": "x", "sw": "x"}),
)


def test_a_language_that_no_record_has_is_named_with_those_that_there_are():
    require_languages(RAGGED, ["en", "sw", "it", "jv"], "f.jsonl")
    with pytest.raises(
        ValueError, match=r"^f\.jsonl: no record has a text in yo, zu; there are texts in en, sw, it, jv;"
    ):
        require_languages(RAGGED, ["en", "yo", "zu"], "f.jsonl")


@pytest.mark.parametrize(
    ("source", "targets", "left"),
    [("en", ("sw",), "ab"), ("en", ("jv",), "c"), ("en", ("sw", "jv"), "abc"), ("sw", ("jv", "it"), "ad")],
)
def test_a_record_needs_the_source_language_and_one_target(source, targets, left):
    assert [query.id for query in usable(RAGGED, source, targets, "f.jsonl")] == list(left)


def test_a_target_that_is_never_with_the_source_is_named():
    with pytest.raises(ValueError, match=r"^f\.jsonl: no record has a text in yo;"):
        usable(RAGGED, "yo", ("sw",), "f.jsonl")
    with pytest.raises(
        ValueError, match=r"^f\.jsonl: no record has texts both in jv, which the teacher reads, and in it;"
    ):
        usable(RAGGED, "jv", ("sw", "it"), "f.jsonl")


def test_counts_by_language_and_label():
    assert describe(RAGGED[:2], ("en", "sw")) == "1 harmful, 1 harmless in en, sw"
    assert describe(RAGGED, ("en", "jv", "it")) == (
        "1 harmful, 1 harmless, 1 unlabelled in en (absent in 1 of 4 records, first: id 'd'); "
        "1 harmful, 1 unlabelled in jv; 1 harmful in it"
    )


TEXTS = record()["texts"]
BAD_JSONL = {
    "duplicate id": (lines(record(), record(id="b"), record()), r"line 3: id 'a' is already on line 1"),
    "empty text": (lines(record(texts=TEXTS | {"sw": " \t"})), r"line 1 \(id 'a'\): the text in 'sw' is empty"),
    "empty answer": (lines(record(answers={"en": ""})), r"line 1 \(id 'a'\): the answer in 'en' is empty"),
    "answer to nothing": (
        lines(record(answers={"jv": "x"})),
        r"line 1 \(id 'a'\): the answer in 'jv' belongs to no text",
    ),
    "no rows": ("\n \n", r"there are no records"),
    "malformed": (lines(record()) + '{"id": "b",}\n', r"line 2, column 12: malformed JSON"),
    "cut short": (lines(record())[:-20], r"line 1, column \d+: malformed JSON"),
    "not an object": ("[1]\n", r"line 1: a record is an object .*not \[1\]"),
    "no texts": (lines({"id": "a"}), r"line 1: 'texts' is missing or empty"),
    "empty texts": (lines(record(texts={})), r"line 1: 'texts' is missing or empty"),
    "no id": (lines({"texts": TEXTS}), r"line 1: 'id' is missing or empty"),
    "id of a wrong type": (lines(record(id=0)), r"line 1: 'id' must be a string, not 0"),
    "harmful of a wrong type": (
        lines(record(harmful="yes")),
        r"line 1: 'harmful' must be true, false or null, not 'yes'",
    ),
    "texts of a wrong type": (lines(record(texts=["x"])), r"line 1: 'texts' must be an object .*not \['x'\]"),
    "text of a wrong type": (
        lines(record(texts={"en": 3})),
        r"line 1 \(id 'a'\): the text in 'en' must be a string, not 3",
    ),
    "unknown key": (lines(record(text="x")), r"line 1: unknown key 'text'; a record has id, texts"),
    "unknown language": (lines(record(texts={"english": "x"})), r"line 1 \(id 'a'\): the text's language: 'english'"),
    "a key twice": ('{"id": "a", "texts": {"en": "x", "en": "y"}}\n', r"line 1: key 'en' is there twice"),
    "half a surrogate pair": (
        '{"id": "a", "texts": {"en": "x\\ud83d"}}\n',
        r"line 1 \(id 'a'\): .*surrogate pair at character 1",
    ),
}
BAD_CSV = {
    "duplicate id": ("id,en\na,x\nb,y\na,z\n", r"line 4: id 'a' is already on line 2"),
    "no text at all": ("id,en,sw\na,x,y\nb, ,\n", r"line 3: 'texts' is missing or empty"),
    "no rows": ("id,en\n", r"there are no records"),
    "empty file": ("", r"there are no records"),
    "unknown column": ("id,en,notes\na,x,y\n", r"column 'notes' is neither"),
    "unknown language": ("id,en,xx\na,x,y\n", r"column 'xx' is neither"),
    "undetermined language": ("id,en,und\na,x,y\n", r"column 'und' is neither"),
    "unknown prefix": ("id,en,reply:sw\na,x,y\n", r"column 'reply:sw' is neither"),
    "semicolons in the header alone": ("id;en;sw\na,x,y\n", r"line 2: 1 cells under 3 columns; quote .* ';'"),
    "a column without a name": ("id,,en\na,y,x\n", r"column '' is neither"),
    "a first column of texts without a name": (",id,en\nx y,a,z\n", r"line 2: the first .* 'x y' is not a row number"),
    "no id column": ("en,sw\nx,y\n", r"there is no column 'id'; it has en, sw"),
    "no language": ("id,tags\na,x\n", r"no column is a language; it has id, tags"),
    "column twice": ("id,en,en\na,x,y\n", r"column 'en' says the same as 'en'"),
    "category twice": ("id,tags,category,en\na,x,y,z\n", r"column 'category' says the same as 'tags'"),
    "empty id": ("id,en\n,x\n", r"line 2: 'id' is missing or empty"),
    "short row": ('id,en,sw\na,"x\n\ny",z\nb,x\n', r"line 5: 2 cells under 3 columns"),
    "row over many lines": ('id,en,sw\na,"x\n\ny",z\na,x,y\n', r"line 5: id 'a' is already on line 2"),
    "long row": ("id,en\na,x,y\n", r"line 2: 3 cells under 2 columns"),
    "open quote": ('id,en\na,x\nb,"x\n', r"line 3: malformed CSV"),
    "harmful of a wrong type": ("id,harmful,en\na,maybe,x\n", r"line 2: harmful='maybe' must be true, false"),
    "answer to nothing": ("id,en,answer:sw\na,x,y\n", r"line 2 \(id 'a'\): the answer in 'sw' belongs to no text"),
}


@pytest.mark.parametrize(
    "suffix, content, message",
    [pytest.param(".jsonl", *case, id=f"jsonl {name}") for name, case in BAD_JSONL.items()]
    + [pytest.param(".csv", *case, id=f"csv {name}") for name, case in BAD_CSV.items()]
    + [
        pytest.param(".jsonl", b'{}\n{"caf\xe9": 1}\n', r"line 2: byte 0xe9 at offset 8 is not UTF-8"),
        pytest.param(".csv", b"\xef\xbb\xbfid,en\na,caf\xe9\n", r"line 2: byte 0xe9 at offset 14 is not UTF-8"),
        pytest.param(".csv", "id,en\na,x\n".encode("utf-16-le"), r"there is no column 'id'|column .* is neither"),
        pytest.param(".csv", "id,en\na,x\n".encode("utf-16")[:-1], r"line 2: byte 0x0a at offset 20 is not UTF-16"),
    ],
)
def test_bad_input_is_one_line_that_names_file_and_place(tmp_path, suffix, content, message):
    path = write(tmp_path / f"queries{suffix}", content)
    with pytest.raises(ValueError, match=message) as caught:
        files.read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.data\.path=.*absent\.csv: there is no such query file"):
        files.read(tmp_path / "absent.csv")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder\.jsonl"):
        files.read(tmp_path / "folder.jsonl")
    with pytest.raises(ValueError, match=r"queries\.tsv: .*\.jsonl, \.csv or \.parquet, not in '\.tsv'"):
        files.read(write(tmp_path / "queries.tsv", "id\ten\n"))
    with pytest.raises(ValueError, match=r"config\.data\.path is empty"):
        files.read("")


@pytest.mark.parametrize("code, name", [("sw", "Swahili"), ("jv", "Javanese"), ("zh", "Chinese"), ("id", "Indonesian")])
def test_language_name(code, name):
    assert language_name(code) == name


@pytest.mark.parametrize("code", ["", "xx", "und", "swahili", "sw;", "en2"])
def test_language_name_refuses_what_is_no_language(code):
    with pytest.raises(ValueError, match="is not the code of a known language"):
        language_name(code)


# Tables in Parquet, several files, and other places.

RECORDS = (
    Query("1", True, "", {"en": "What?", "id": "Apa?"}, {"en": "bread"}),
    Query("2", None, "food", {"en": "Who?", "id": "Siapa?"}),
    Query("3", False, "food", {"en": "Where?", "id": "Di mana?"}, {"id": "sana"}),
)


def wide(records=RECORDS) -> pyarrow.Table:
    """As `datasets` writes a table with one column a language: numbers as ids, nulls for what is missing."""
    columns = {
        "id": [int(query.id) for query in records],
        "harmful": [query.harmful for query in records],
        "tags": [query.category or None for query in records],
        "source": ["somebody" for _ in records],
        "en": [query.texts["en"] for query in records],
        "text:id": [query.texts["id"] for query in records],
        "answer:en": [query.answers.get("en") for query in records],
        "answer:id": [query.answers.get("id") for query in records],
    }
    return pyarrow.table(columns)


def test_parquet_with_a_column_a_language(tmp_path):
    pyarrow.parquet.write_table(wide(), tmp_path / "queries.parquet")
    assert files.read(tmp_path / "queries.parquet") == RECORDS


@pytest.mark.parametrize("kind", ["struct", "map"])
def test_parquet_with_the_fields_of_jsonl(tmp_path, kind):
    records = [*RECORDS, Query("4", None, "", {"en": "No Indonesian"})]
    rows = [dataclasses.asdict(query) for query in records]
    schema = None
    if kind == "map":
        texts = pyarrow.map_(pyarrow.string(), pyarrow.string())
        schema = pyarrow.schema(
            {"id": pyarrow.string(), "harmful": pyarrow.bool_(), "category": pyarrow.string()}
            | {"texts": texts, "answers": texts}
        )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "queries.parquet")
    assert files.read(tmp_path / "queries.parquet") == tuple(records)


def test_parquet_faults(tmp_path):
    path = write(tmp_path / "queries.parquet", b"PAR1 no")
    with pytest.raises(ValueError, match=r"queries\.parquet: not readable as Parquet"):
        files.read(path)
    pyarrow.parquet.write_table(pyarrow.table({"id": ["1", "2"], "en": ["x", None]}), path)
    with pytest.raises(ValueError, match=r"queries\.parquet, line 2: 'texts' is missing or empty"):
        files.read(path)


def test_parquet_as_pandas_writes_it(tmp_path):
    columns = {"harmful": [1.0, math.nan], "en": ["x", "y"], "sw": ["z", None], "__index_level_0__": [4, 9]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "queries.parquet")
    assert files.read(tmp_path / "queries.parquet") == (
        Query("4", True, "", {"en": "x", "sw": "z"}),
        Query("9", None, "", {"en": "y"}),
    )
    pyarrow.parquet.write_table(pyarrow.table({"id": ["a", "b"]} | columns), tmp_path / "queries.parquet")
    assert [query.id for query in files.read(tmp_path / "queries.parquet")] == ["a", "b"]


def test_a_folder_holds_one_file_or_the_parts_of_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no query file \(\.jsonl, \.csv or \.parquet\) in this directory"):
        files.read(tmp_path)
    (tmp_path / "README.md").write_text("x")
    folder = tmp_path / "data"
    folder.mkdir()
    for i in (1, 0, 2):
        suffix = "-0123456789abcdef" if i == 1 else ""
        pyarrow.parquet.write_table(wide(RECORDS[i : i + 1]), folder / f"train-0000{i}-of-00003{suffix}.parquet")
    assert files.read(tmp_path) == RECORDS
    pyarrow.parquet.write_table(wide(RECORDS[:1]), folder / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"4 query files are in this directory \(data/test-.*\); name one, or use \*"):
        files.read(tmp_path)
    assert files.read(folder / "train-*.parquet") == RECORDS
    with pytest.raises(ValueError, match=r"train.*: id '1' is already on line 1 of .*test-00000.*; ids must be unique"):
        files.read(folder / "*.parquet")
    with pytest.raises(FileNotFoundError, match="no such query file"):
        files.read(folder / "dev-*.parquet")


def test_a_set_of_the_hub(tmp_path, hub):
    files.write_jsonl(tmp_path / "queries.jsonl", RECORDS)
    hub.files = {"data/queries.jsonl": (tmp_path / "queries.jsonl").read_bytes(), "README.md": b"", "big.xlsx": b"x"}
    assert files.read(f"hf://{OWNER_NAME}") == RECORDS
    assert not any("big.xlsx" in path for path in hub.requests)  # nothing to read a table of queries from
    assert files.read(f"hf://{OWNER_NAME}/data/*.jsonl") == RECORDS


def test_the_real_multijail_file_comes_the_same_by_every_way(tmp_path, hub):
    if not MULTIJAIL.is_file():
        pytest.skip("MultiJail_dev.csv is not beside this repository")
    records = files.read(MULTIJAIL, harmful="true")
    hub.files = {"MultiJail.csv": MULTIJAIL.read_bytes(), "README.md": b"#"}
    assert files.read(f"hf://{OWNER_NAME}", harmful="true") == records
    for version, source in (("1.0.0", str(MULTIJAIL)), ("1.0.1", f"hf://{OWNER_NAME}")):
        built = parallel_queries.build(source, f"parallel_queries:{version}", str(tmp_path), harmful="true")
        assert built.metadata["sha256"] == hashlib.sha256(MULTIJAIL.read_bytes()).hexdigest()
        uri = f"tfds://parallel_queries:{version}/train+test?data_dir={tmp_path}"
        assert sorted(sources.read(uri), key=operator.attrgetter("id")) == sorted(
            records, key=operator.attrgetter("id")
        )
