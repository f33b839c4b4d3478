"""Which settings the search tries, and which it takes."""

import dataclasses

from msd_jax.parallel import sharding
from msd_jax.planning import search
from msd_jax.planning.architecture import read_sizes
from msd_jax.planning.compiled import GIB
from msd_jax.planning.pod import Pod
from tests.planning.conftest import COMPILED


def test_candidate_meshes_fill_the_pod(v5e_8):
    tried = list(search.candidate_meshes(dataclasses.replace(v5e_8, slices=2)))
    assert (2, 4, 1) in tried and (2, 1, 4) in tried
    assert all(data * fsdp * tensor == 8 and data % 2 == 0 for data, fsdp, tensor in tried)


def test_between_gpu_nodes_fsdp_may_cross_too(two_h100_nodes):
    tried = list(search.candidate_meshes(two_h100_nodes))
    assert tried[:3] == [(1, 8, 1), (2, 4, 1), (8, 1, 1)]


def test_the_search_takes_the_fewest_micro_batches_that_fit_and_then_the_fastest(smoke, monkeypatch, capsys):
    """The compiler is a stand-in: each row takes 5 GiB, fewer micro-batches save time, and tensor costs it."""
    setting = {}
    original = search.run_programs

    def run_programs(config, model, mesh):
        setting.update(micro_batches=config.train.micro_batches, remat=config.model.remat, **config.mesh)
        return original(config, model, mesh)

    def compile_program(program, pod):
        if program.name != "train":
            seconds = 0.5 if program.name == "rollout" and setting["rollout_tensor"] == 2 else 1.0
            return dataclasses.replace(COMPILED, peak_hbm_bytes=GIB, resident_hbm_bytes=0, seconds={"hbm": seconds})
        rows = 64 // setting["micro_batches"] // sharding.batch_shards(pod.mesh)
        peak = (5 * rows + (20 if setting["remat"] == "none" else 0)) * GIB
        seconds = setting["micro_batches"] + pod.mesh.shape["tensor"] + (setting["remat"] == "full")
        fits = peak <= pod.device.hbm_bytes
        return dataclasses.replace(COMPILED, peak_hbm_bytes=peak, fits=fits, seconds={"compute": seconds})

    monkeypatch.setattr(search, "run_programs", run_programs)
    monkeypatch.setattr(search, "compile_program", compile_program)
    config = smoke(**{"data.batch_size": 64, "eval.path": ""})
    sizes, _ = read_sizes(config.model.path)
    best = search.search(config, sizes, Pod("v5e:2x4", 1, sharding.make_mesh(1, 8, 1)))
    # 64 rows over 8 chips: 8, then 4, then 2 rows at once, 10 GiB; remat none does not fit, dots is faster than full.
    # Generation gains by two devices for each head, no more.
    assert best.flags == (
        "--mesh 1,8,1 --config.train.micro_batches=4 --config.model.remat=dots --config.mesh.rollout_tensor=2 "
        "--config.mesh.rollout_ffw=2"
    )
    assert best.fits and best.seconds == 4 + 1 + 2.5
    assert "does not fit" in capsys.readouterr().out
