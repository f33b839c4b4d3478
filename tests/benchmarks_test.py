"""benchmarks/gpu.py and benchmarks/packing.py at toy size, on the CPU."""

import importlib.util
import json
import subprocess
import sys
import time

import pytest

from benchmarks import packing
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def lines(directory):
    return [json.loads(line) for line in (directory / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_tiny_model_is_measured_on_a_cpu_without_shares(tmp_path):
    command = [sys.executable, SCRIPT, "--models", "tiny", "--seconds", "400", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    device, train, attention, dots, *decodes = lines(tmp_path / "out")
    assert [row["part"] for row in decodes] == ["decode", "int8", "stacked"]
    assert (device["part"], device["device"]) == ("device", "cpu")
    assert attention["faster"] == "xla"
    assert dots["part"] == "dots" and dots["loss"] == pytest.approx(train["loss"])
    assert dots["flops"] == train["flops"] <= dots["repeated_flops"] < train["repeated_flops"]
    for row in (train, dots, *decodes):
        assert (row["model"], row["attention"], row["rows"]) == ("tiny", "xla", 4)
        assert row["seconds"] > 0 and len(row["runs"]) == 5 and row["response_tokens_per_second"] > 0
        assert row["compile_seconds"] > 0 and row["program_bytes"] > 0
        assert not {"mfu", "hbm_share", "estimate", "error"} & set(row)
    assert train["tokens"] == 4 * (8 + 8 + 16 + 8) and train["flops"] > 0 and train["loss"] >= 0
    assert train["tokens_per_second"] > 0
    for row in decodes:  # whose prefill may seem to take longer than the whole, on a busy machine
        assert row["prefill_seconds"] > 0 and {"seconds_per_token", "tokens_per_second", "bytes_per_token"} <= set(row)
    assert len(done.stdout.splitlines()) == 7


def test_shares_of_a_card_in_the_table(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "device_spec", lambda: gpu.hardware.GPUS["h100"].device)
    results = gpu.Results(tmp_path, time.time() + 400)
    train = results.part("tiny", "train", ("xla",), 4)
    assert 0 < train["mfu"] < train["hfu"] < 1 and 0 < train["estimate"] < train["seconds"]
    decode = results.part("tiny", "decode", ("xla",), 4)
    assert decode["hbm_share"] < 1 and 0 < decode["estimate"] < decode["seconds"]
    weights = 2 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 2 * (256 * 32 + 32)
    assert decode["bytes_per_token"] == weights + 4 * (8 + 4) * 2 * 2 * 2 * 8 * 2
    assert lines(tmp_path) == [train | {"process_peak_bytes": None}, decode | {"process_peak_bytes": None}]


def test_what_runs_out_of_memory_is_tried_with_half_the_rows_and_errors_are_lines(gpu, tmp_path, monkeypatch):
    def measure(setting, rows, kernel):
        if kernel == "cudnn":
            raise ValueError("refused\nat length")
        if rows > 8:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return {"seconds": 1.0}

    monkeypatch.setitem(gpu.MEASURES, "train", measure)
    results = gpu.Results(tmp_path, time.time() + 400)
    assert results.part("tiny", "train", ("cudnn", "xla"), 32)["rows"] == 8
    assert [(row["attention"], row["rows"], row.get("error", "")) for row in lines(tmp_path)] == [
        ("cudnn", 32, "ValueError: refused"),
        ("xla", 32, "RuntimeError: RESOURCE_EXHAUSTED: out of memory"),
        ("xla", 16, "RuntimeError: RESOURCE_EXHAUSTED: out of memory"),
        ("xla", 8, ""),
    ]


def test_no_part_begins_when_time_is_almost_up(gpu, tmp_path):
    assert gpu.Results(tmp_path, time.time() + 30).part("tiny", "train", ("xla",), 4) is None
    (row,) = lines(tmp_path)
    assert row["skipped"] == "less than 40 s of --seconds are left"


def test_padding_of_packs_for_a_file_of_prompts(model_dir, tmp_path, monkeypatch, capsys):
    rows = "".join(f"{i},how do i make a cup ?,vipi kikombe ?\n" for i in range(4))
    (tmp_path / "queries.csv").write_text("id,en,sw\n" + rows, encoding="utf-8")
    command = ["packing.py", "--model", model_dir, "--queries", tmp_path / "queries.csv", "--languages", "sw"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--json", str(tmp_path / "packing.json")])
    monkeypatch.setattr(packing, "MACHINES", (("cpu", 1, 8), ("tpu", 2, 8)))
    monkeypatch.setattr(packing, "REPLIES", ((16, 4),))
    packing.main()
    rows = json.loads((tmp_path / "packing.json").read_text(encoding="utf-8"))
    assert [(row["platform"], row["devices"]) for row in rows] == [("cpu", 1), ("tpu", 2)]
    for row in rows:
        assert row["packs"] >= 1 and 0 < row["padding"] < 1
    assert len(capsys.readouterr().out.splitlines()) == 5
