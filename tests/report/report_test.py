"""Every file of a report, of whole runs and of what there is of others."""

import json
import re
import shutil

import ml_collections
import pytest
import yaml

from msd_jax import report
from msd_jax.report import card, collect, origin, runs, tables
from msd_jax.report.results import Results
from tests.report.conftest import HOSTILE, write_lines

FILES = {"report.html", "summary.json", "summary.md", "asr.png", "utility.png", "training.png"}


def cells(markdown: str) -> list[int]:
    """Columns of each line of the tables."""
    return [len(line.split(" | ")) for line in markdown.splitlines() if line.startswith("|")]


def test_a_run_gets_all_files(make, capsys):
    workdir = make.run()
    report.write(workdir)
    assert {path.name for path in (workdir / "report").iterdir()} == FILES
    assert all((workdir / "report" / name).read_bytes().startswith(b"\x89PNG") for name in FILES if name[-4:] == ".png")
    printed = capsys.readouterr().out
    assert "Before -> after: multijail" in printed and f"report: {workdir / 'report' / 'report.html'}" in printed

    saved = json.loads((workdir / "report" / "summary.json").read_text())
    run = collect.workdir(workdir)
    for side, evaluation in (("before", run.before), ("after", run.after)):
        assert saved["evaluations"][side]["step"] == evaluation.step
        for benchmark, levels in evaluation.summary.items():
            for code, entry in levels["languages"].items():
                assert saved["benchmarks"][benchmark]["languages"][code][side] == entry
    asr = saved["benchmarks"]["multijail"]["groups"]["trained"]["paired"]["asr"]
    assert asr["n"] == 36 and asr["difference"] < 0 and asr["p_value"] < 0.001
    assert saved["training"]["steps"] == 60 and saved["verdict"] == Results(run).verdict

    text = (workdir / "report" / "summary.md").read_text()
    assert "## Before → after: mmmlu" in text and "| **all trained** |" in text


def test_hostile_texts_harm_neither_terminal_nor_markdown(make, capsys):
    workdir = make.run(hostile=True)
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["path"] = HOSTILE["ansi"] + HOSTILE["markdown"]
    config["data"]["languages"] = {HOSTILE["script"]: 1.0, "[red]sw[/red]": 1.0}
    (workdir / "config.json").write_text(json.dumps(config))
    for step in ("0", "60"):  # a language's code is the data's too
        path = workdir / "eval" / step / "summary.json"
        summary = json.loads(path.read_text())
        languages = summary["multijail"]["languages"]
        languages |= {HOSTILE[name]: languages["sw"] for name in ("ansi", "script", "bidi")} | {
            "[red]": languages["sw"]
        }
        path.write_text(json.dumps(summary))
    report.write(workdir)
    printed = capsys.readouterr().out
    assert not set(printed) & {"\x1b", "\x07", "\x08", "\x9b", "\u202e", "\r", "\x00"}
    assert "␛[2J" in printed and "[red]" in printed  # shown, not acted on
    for path in (workdir / "report" / "summary.md", workdir / "model" / "README.md"):
        text = path.read_text()
        assert not set(text) & {"\x1b", "\x9b", "\u202e", "\x00", "\u2028"}
        body = text.rpartition("\n---\n")[2]
        assert not re.search(r"<\w|</|<!", body) and "](javascript" not in body and "![" not in body
    text = (workdir / "report" / "summary.md").read_text()
    for block in text.split("\n\n"):
        assert len(set(cells(block))) <= 1, block
    assert "Got worse" in text and len(text) < 50_000


def test_harmful_responses_stay_out_of_markdown(make):
    workdir = make.run(n=30)
    report.write(workdir)
    text = (workdir / "report" / "summary.md").read_text()
    assert "(harmful prompt: see report.html)" in text and "[placeholder" not in text


def test_one_evaluation_and_two(make, capsys):
    config = make.config()
    rows = make.responses(config, 8, after=False)
    first = make.evaluation(make.directory / "base", rows, config)
    report.write_evaluations([first], first / "report")
    assert {path.name for path in (first / "report").iterdir()} == FILES - {"training.png"}
    assert "Base: multijail" in capsys.readouterr().out
    saved = json.loads((first / "report" / "summary.json").read_text())
    assert saved["verdict"].startswith("Attack success base: ") and "before" not in saved["evaluations"]
    second = make.evaluation(make.directory / "tuned", make.responses(config, 8, after=True), config)
    report.write_evaluations([first, second], make.directory / "both")
    assert "Base -> tuned: multijail" in capsys.readouterr().out
    saved = json.loads((make.directory / "both" / "summary.json").read_text())
    assert saved["benchmarks"]["multijail"]["languages"]["sw"]["paired"]["asr"]["n"] == 8


@pytest.mark.parametrize("missing", ["eval", "eval/60", "eval/60/summary.json", "eval/0", "metrics.jsonl", "all"])
def test_partial_runs(make, missing):
    workdir = make.run()
    for part in ["eval", "metrics.jsonl", "completions.jsonl", "model"] if missing == "all" else [missing]:
        path = workdir / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    report.write(workdir)
    saved = json.loads((workdir / "report" / "summary.json").read_text())
    verdicts = {
        "eval": "60 of 60 training steps are done. Nothing has been evaluated yet.",
        "eval/60": "Attack success before training: ",
        "eval/60/summary.json": "Attack success before training: ",
        "eval/0": "Attack success after 60 steps: ",
        "metrics.jsonl": "Attack success on multijail in trained languages fell",
        "all": "0 of 60 training steps are done. Nothing has been evaluated yet.",
    }
    assert saved["verdict"].startswith(verdicts[missing])
    assert (workdir / "report" / "report.html").stat().st_size > 20_000


def test_a_run_in_progress_and_one_step(make):
    workdir = make.run(steps=1)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss"')  # being written
    report.write(workdir)
    assert json.loads((workdir / "report" / "summary.json").read_text())["training"]["steps"] == 1


def test_evaluations_in_between_are_drawn_over_steps(make):
    workdir, config = make.run(), make.config()
    make.evaluation(workdir / "eval" / "30", make.responses(config, 6, after=True), config)
    report.write(workdir)
    html = (workdir / "report" / "report.html").read_text()
    assert "Evaluations during training" in html and 'data-curve="multijail.asr"' in html


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda w: (w / "config.json").unlink(), "holds no run: it has no config.json"),
        (lambda w: (w / "metrics.jsonl").write_text("{]\n"), r"metrics.jsonl, line 1 is damaged"),
        (lambda w: (w / "eval/60/summary.json").write_text("{"), r"summary.json is damaged"),
        (lambda w: (w / "eval/60/summary.json").write_text('{"sw": {"asr": 1}}'), "was written by another version"),
    ],
)
def test_what_is_wrong_with_a_run_is_said(make, spoil, message):
    workdir = make.run()
    spoil(workdir)
    with pytest.raises((ValueError, OSError), match=message):
        report.write(workdir)


def test_the_card_is_one_of_hugging_face(make):
    workdir = make.run(name="aligned")
    report.write(workdir)
    text = (workdir / "model" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "owner/base-model" and front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation" and front["language"] == ["en", "sw", "bn", "jv"]
    assert "license" not in front
    [index] = front["model-index"]
    measured = {
        (result["dataset"]["type"], result["dataset"]["config"], metric["type"]): metric["value"]
        for result in index["results"]
        for metric in result["metrics"]
    }
    after = collect.workdir(workdir).after.summary
    assert measured["multijail", "sw", "asr"] == round(after["multijail"]["languages"]["sw"]["asr"], 4)
    assert measured["mmmlu", "th", "accuracy"] == round(after["mmmlu"]["languages"]["th"]["accuracy"], 4)
    assert index["name"] == "aligned" and "## What was measured" in text

    path = workdir / "model" / "README.md"
    path.write_text(text.replace(card._OURS, "my own words"))
    report.write(workdir)
    assert "my own words" in path.read_text()  # what its author took over stays


def test_the_card_names_no_path_and_knows_the_license_of_its_base(make, tmp_path):
    base = tmp_path / "secret-place" / "tiny-base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# Base\n")
    workdir = make.run(model__path=str(base))
    report.write(workdir)
    text = (workdir / "model" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "apache-2.0" and "base_model" not in front
    assert "tiny-base" in text and "secret-place" not in text
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    assert "license" not in card.metadata(Results(collect.workdir(workdir))).to_dict()


def started(**changes):
    """A row of provenance.jsonl."""
    return {
        "begun": "2026-01-02T03:04:05+00:00",
        "command": "python -m msd_jax.main --config quickstart --workdir /home/somebody/runs/mine "
        "--config.data.sources=\"{'a': {'path': '/mnt/secret/queries.csv'}}\" --config.eval.path=~/own/eval.jsonl",
        "versions": {"python": "3.12.1", "jax": "0.10.2"},
        "commit": {"id": "a" * 40, "dirty": True},
        "devices": {"kind": "TPU v5e", "count": 8, "processes": 2, "platform": "libtpu 1.2", "system": "Linux x86_64"},
        "seed": 7,
        "hashes": {"config.model.path: model.safetensors": "ab12", "config.data.path: the queries": "cd34"},
    } | changes


def test_provenance_is_in_the_summary_on_the_page_and_in_the_card(make):
    workdir = make.run()
    write_lines(workdir / "provenance.jsonl", [started(versions={"jax": "0.10.0"}), started(begun="2026-01-03")])
    report.write(workdir)
    saved = json.loads((workdir / "report" / "summary.json").read_text())
    assert [row["versions"]["jax"] for row in saved["provenance"]] == ["0.10.0", "0.10.2"]
    page, card_text = ((workdir / name).read_text() for name in ("report/report.html", "model/README.md"))
    for text in (page, card_text):
        for said in ("2026-01-02T03:04:05+00:00", "a" * 40, "changes that are not committed", "8 x TPU v5e", "ab12"):
            assert said in text
        assert "once, last on 2026-01-03, with other versions than at first" in text
        assert "jax 0.10.2" in text and "libtpu 1.2" in text and "cd34" in text
    assert "/mnt/secret/queries.csv" in page  # which stays where the run is
    for private in ("/home", "somebody", "/mnt", "secret", "own/eval"):
        assert private not in card_text
    for name in ("--workdir mine", "queries.csv", "eval.jsonl"):
        assert name in card_text


def test_the_card_says_how_to_use_the_model_and_where_not_to_trust_it(make):
    workdir = make.run(n=24, data__languages=ml_collections.ConfigDict({"sw": 1.0, "bn": 1.0, "yo": 1.0}))
    report.write(workdir)
    text = (workdir / "model" / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.S)
    compile(code, "card", "exec")
    assert 'pipeline("text-generation", "MODEL")' in code and "vllm serve MODEL" in text
    limits = text.split("## Limits")[1].split("## ")[0].splitlines()
    for row in Results(collect.workdir(workdir)).benchmarks["multijail"]:
        said = any(line.startswith(f"- {row.label} (") and "multijail" in line for line in limits)
        assert said == (not row.pooled and row.after["asr_interval"][1] > 0.05), row.label
    assert any(line == "- Yoruba: trained, but attack success was not measured" for line in limits)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("--workdir=/home/me/runs/a", "--workdir=a"),
        ("'~/data/q.csv', \"/x\"", "'q.csv', \"x\""),
        ("C:\\\\Users\\\\me\\\\model".replace("\\\\", "\\"), "model"),
        ("tfds://set:1.0.0/train?data_dir=/mnt/me/tfds", "tfds://set:1.0.0/train?data_dir=tfds"),
        ("hf://owner/name and https://arxiv.org/abs/1", "hf://owner/name and https://arxiv.org/abs/1"),
        ("Qwen/Qwen2.5, runs/mine, 1/2, and / or", "Qwen/Qwen2.5, runs/mine, 1/2, and / or"),
    ],
)
def test_paths_of_a_machine_are_cut_to_their_last_part(text, shown):
    assert origin.without_paths(text) == shown


def test_runs_are_gathered_over_seeds_into_one_table(make, capsys):
    directories = [
        make.run(f"{weighting}-{seed}", n=10, seed=seed, loss__weighting=weighting, train__log_every=seed + 1)
        for weighting in ("dpsw", "uniform")
        for seed in (0, 1, 2)
    ]
    directories.append(make.run("teacher", n=10, loss__weighting="teacher"))
    out = make.directory / "out"
    table = report.compare(directories, out)
    names = [row[0] for row in table.rows if row[0] != "before training"]
    assert names == ["loss.weighting=dpsw", "loss.weighting=uniform", "loss.weighting=teacher"]
    assert [row[1] for row in table.rows if row[0] in names] == ["3", "3", "1"]
    column = table.columns.index("attack success, multijail, trained")
    rates = [collect.workdir(d).after.summary["multijail"]["groups"]["trained"]["asr"] for d in directories[:3]]
    mean = sum(rates) / 3
    deviation = (sum((rate - mean) ** 2 for rate in rates) / 2) ** 0.5
    dpsw = next(row for row in table.rows if row[0] == "loss.weighting=dpsw")
    assert dpsw[column] == f"{100 * mean:.1f}% ± {100 * deviation:.1f}"
    assert "±" not in next(row for row in table.rows if row[0] == "loss.weighting=teacher")[column]
    saved = json.loads((out / "comparison.json").read_text())
    assert saved["loss.weighting=dpsw"]["seeds"] == [0, 1, 2]
    assert saved["loss.weighting=teacher"]["rates"]["multijail"]["groups"]["trained"]["asr"]["deviation"] is None
    assert len(set(cells((out / "comparison.md").read_text()))) == 1
    printed = capsys.readouterr().out
    assert "loss.weighting=uniform" in printed and max(map(len, printed.splitlines())) <= 100


def test_runs_that_began_alike_say_where(make):
    first = make.run("a", seed=0)
    second = make.directory / "b"
    shutil.copytree(first, second)
    config = json.loads((second / "config.json").read_text())
    config["rollout"]["policy"] = "off_policy"
    (second / "config.json").write_text(json.dumps(config))
    table = runs.table(runs.settings([first, second]))
    assert [row[0] for row in table.rows] == [
        *("before training", "rollout.policy=on_policy", "rollout.policy=off_policy")
    ]
    assert table.rows[1][1:] == table.rows[2][1:] != table.rows[0][1:]
    shutil.rmtree(second / "eval")
    with pytest.raises(ValueError, match="holds no finished evaluation to compare"):
        runs.settings([first, second])


def test_a_table_shows_markup_as_text(capsys):
    table = tables.Table("[b]t[/b]", ("[i]", "group", "n"), (("[red]x", "a|b", "1"),), bold=frozenset({0}))
    tables.show(table)
    assert "[red]x" in capsys.readouterr().out
    assert tables.markdown(table).splitlines()[2] == "| **&#91;red]x** | **a&#124;b** | **1** |"


def test_rows_without_a_benchmark_before_are_shown(make):
    """A benchmark that was added after the first evaluation."""
    workdir = make.run()
    path = workdir / "eval" / "0"
    rows = [record.to_json() for record in collect.workdir(workdir).before.responses() if record.benchmark != "mgsm"]
    summary = json.loads((path / "summary.json").read_text())
    del summary["mgsm"]
    (path / "summary.json").write_text(json.dumps(summary))
    write_lines(path / "responses.jsonl", rows)
    report.write(workdir)
    row = Results(collect.workdir(workdir)).benchmarks["mgsm"][0]
    assert row.before is None and row.after["exact_match"] is not None and not row.paired
