"""MMMLU's files as they come: names, numbering, cells over lines, English from elsewhere, and what is broken."""

import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from msd_jax.evaluation.benchmarks import mmmlu

HEADER = ",Question,A,B,C,D,Answer,Subject\n"
SW = HEADER + (
    '0,"Mji mkuu wa Kenya,\nni upi?",Mombasa,Nairobi,Kisumu,Dodoma,B,geography\n'
    "\n"
    '2,"Alisema ""ndiyo""?",Ndiyo,,"La, hapana",Sijui,c ,logic\n'
)


def write(directory: pathlib.Path, **files: str) -> pathlib.Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / f"{name}.csv").write_text(content, encoding="utf-8")
    return directory


def test_languages_are_merged_by_number(tmp_path):
    english = (
        "\ufeffUnnamed: 0,question,a,b,c,d,answer,subject\n"
        "2.0,Did he say yes?,Yes,,No,Unknown,C,logic\n"
        "0,The capital of Kenya?,Mombasa,Nairobi,Kisumu,Dodoma,B,geography\n"
    )
    write(tmp_path / "test", **{"mmlu_SW-KE": SW})
    write(tmp_path, **{"mmlu_EN-US": english, "readme": "not,a,set\n"})
    queries = {query.id: query for query in mmmlu.read_mmmlu(tmp_path)}
    assert sorted(queries) == ["0", "2"]
    assert [set(query.texts) for query in queries.values()] == [{"en", "sw"}] * 2
    assert queries["0"].answers == {"en": "B", "sw": "B"} and queries["2"].answers == {"en": "C", "sw": "C"}
    assert queries["0"].category == "geography" and queries["0"].harmful is False
    ending = "\n\nMji mkuu wa Kenya,\nni upi?\n\nA. Mombasa\nB. Nairobi\nC. Kisumu\nD. Dodoma"
    assert queries["0"].texts["sw"].endswith(ending)
    assert queries["2"].texts["sw"].endswith('"ndiyo"?\n\nA. Ndiyo\nB. \nC. La, hapana\nD. Sijui')


@pytest.mark.parametrize(
    "name, language", [("mmlu_YO_NG", "yo"), ("mmlu_zh-cn", "zh"), ("mmlu_DE", "de"), ("mmlu", "en")]
)
def test_one_file_and_its_language(tmp_path, name, language):
    write(tmp_path, **{name: SW})
    for path in (tmp_path, tmp_path / f"{name}.csv"):
        assert [set(query.texts) for query in mmmlu.read_mmmlu(path)] == [{language}] * 2


def test_rows_without_numbers_count_themselves(tmp_path):
    content = "Question,A,B,C,D,Answer,Subject\n" + "".join(f"Q{i}?,1,2,3,4,A,x\n" for i in range(3))
    assert [q.id for q in mmmlu.read_mmmlu(write(tmp_path, mmlu_FR=content))] == ["0", "1", "2"]


def test_the_original_in_english(tmp_path):
    rows = [
        {"question": f"Question {i}? ", "choices": ["1", "2", "3", str(i)], "answer": i, "subject": "arithmetic"}
        for i in range(4)
    ]
    (tmp_path / "all").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "all" / "test-00000-of-00001.parquet")
    write(tmp_path, **{"mmlu_SW-KE": SW})
    queries = {query.id: query for query in mmmlu.read_mmmlu(tmp_path)}
    assert [queries[str(i)].answers["en"] for i in range(4)] == list("ABCD")
    assert set(queries["2"].texts) == {"en", "sw"} and set(queries["1"].texts) == {"en"}
    (tmp_path / "all" / "test-00000-of-00001.parquet").write_bytes(b"none")
    with pytest.raises(ValueError, match="not a table of MMLU"):
        mmmlu.read_mmmlu(tmp_path)


def test_questions_without_text_are_counted(tmp_path, capsys):
    content = SW + "3,,1,2,3,4,A,x\n4,Nini?,,,,,A,x\n"
    assert len(mmmlu.read_mmmlu(write(tmp_path, **{"mmlu_SW-KE": content}))) == 2
    assert "2 of 4 questions in sw skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("mmlu_SW-KE", SW + "5,Q,1,2,3,4,E,x\n", r"row 5: the answer is 'E'"),
        ("mmlu_SW-KE", SW + "5,Q,1,2,3,4,,x\n", r"row 5: the answer is ''"),
        ("mmlu_SW-KE", SW + "0,Q,1,2,3,4,A,x\n", r"row 5: question 0 occurs twice"),
        ("mmlu_SW-KE", SW + "5,Q,1,2,3,A,x\n", r"row 5: 7 cells under 8 columns"),
        ("mmlu_SW-KE", SW + '5,"Q,1,2,3,4,A,x\n', "malformed CSV"),
        ("mmlu_SW-KE", SW.replace("Answer", "Solution"), "it has no column answer"),
        ("mmlu_SW-KE", "", "it has no column question"),
        ("mmlu_SW-KE", HEADER, "no questions"),
        ("mmlu_TH-TH", SW, "MMMLU has no language 'th'"),
        ("mmlu_swahili", SW, "must end in a language and region"),
        ("other", SW, "it holds no mmlu_"),
    ],
)
def test_what_is_broken_is_named(tmp_path, name, content, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        mmmlu.read_mmmlu(write(tmp_path, **{name: content}))


def test_two_files_of_a_language(tmp_path):
    with pytest.raises(ValueError, match="another file in 'sw'"):
        mmmlu.read_mmmlu(write(tmp_path, **{"mmlu_SW-KE": SW, "mmlu_SW_KE": SW}))
