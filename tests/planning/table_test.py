"""Numbers for people, and remedies for what does not fit."""

import dataclasses

from msd_jax.planning import table
from msd_jax.planning.architecture import abstract_model, read_sizes
from msd_jax.planning.compiled import GIB
from tests.planning.conftest import COMPILED, recipe


def test_numbers_with_their_units():
    assert [table.si(x, "B") for x in (0, 1.834e12, 999, 42e3)] == ["0 B", "1.83 TB", "999 B", "42 kB"]
    assert table.si(0.0241, "s") == "24.1 ms" and table.si(5, "") == "5"
    assert table.gib(GIB * 3 // 2) == "1.50 GiB" and table.gib(2**20) == "1.00 MiB"


def test_remedies_depend_on_what_does_not_fit(v5e_8):
    values = {"data.batch_size": 64, "model.remat": "dots", "mesh.rollout_ffw": 0}
    config = recipe("qwen2_5_7b", **values)
    model = abstract_model(config, read_sizes(config.model.path)[0], v5e_8.mesh)
    too_big = dataclasses.replace(COMPILED, fits=False, peak_hbm_bytes=68 * GIB)

    lines = list(table.remedies(config, v5e_8, {"train": too_big, "rollout": COMPILED}, model))
    # 7.6 B parameters x 3 copies x 4 bytes and the teacher, but for 0.5 B in bfloat16, leave 3.21 of 15.75 GiB.
    assert any("the train state alone is 12.54 GiB" in line and "lora.rank=16" in line for line in lines)
    # 16 rows per chip take 55.46 GiB beside the state, one takes 3.47.
    assert not any("micro_batches" in line for line in lines)
    assert any("remat=full" in line for line in lines)
    assert not any("--mesh 1,-1,4" in line for line in lines)

    smaller = dataclasses.replace(too_big, peak_hbm_bytes=60 * GIB)  # 47.46 and 2.97 GiB
    lines = list(table.remedies(config, v5e_8, {"train": smaller, "rollout": COMPILED}, model))
    assert any("micro_batches=16: the rows per chip and micro-batch fall from 16 to 1" in line for line in lines)

    lines = list(table.remedies(config, v5e_8, {"train": COMPILED, "rollout": too_big}, model))
    assert any("--config.mesh.rollout_ffw=8: during generation each chip holds 3.55 GiB" in line for line in lines)
    assert not any("micro_batches" in line for line in lines)


def test_a_table_for_gpus_speaks_of_nodes(two_h100_nodes, capsys):
    program = dataclasses.replace(COMPILED, dcn_bytes=10**8, seconds={"hbm": 1.2, "network": 0.1})
    table.show({"train": program}, two_h100_nodes)
    shown = " ".join(capsys.readouterr().out.split())
    assert "figures are per GPU" in shown and "100 MB of it between nodes" in shown
    assert (
        "assumed per GPU: 989 TFLOP/s, HBM 3350 GB/s, a collective receives 450 GB/s within a node (NVLink), " in shown
    )
    assert "50.0 GB/s between nodes" in shown and "torus" not in shown


def test_remedies_for_gpus_let_fsdp_cross_nodes(two_h100_nodes):
    config = recipe("qwen2_5_7b", **{"data.batch_size": 64})
    model = abstract_model(config, read_sizes(config.model.path)[0], two_h100_nodes.mesh)
    too_big = dataclasses.replace(COMPILED, fits=False, peak_hbm_bytes=90 * GIB)
    assert any("--mesh 1,-1,1:" in line for line in table.remedies(config, two_h100_nodes, {"train": too_big}, model))
