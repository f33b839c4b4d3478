"""Plans from 16 to 1024 chips with the same batch per chip: what each chip holds, computes and receives.

    python benchmarks/scaling.py [--config NAME] [--rows 4] [--json FILE] [--pods v5e:4x4 v5e:8x8 v5e:16x16 4*v5e:16x16]

Weak scaling is free where the bytes that a chip receives stay the same. Needs XLA's TPU compiler but no TPU:
pip install 'msd-jax[plan]'. A few minutes per pod.
"""

import argparse
import importlib
import json
import pathlib
from typing import Any

import jax
import ml_collections

jax.config.update("jax_platforms", "cpu")  # a TPU of this machine stays free

from msd_jax.parallel import sharding  # noqa: E402
from msd_jax.planning import table  # noqa: E402
from msd_jax.planning.architecture import abstract_model, read_sizes  # noqa: E402
from msd_jax.planning.compiled import compile_program  # noqa: E402
from msd_jax.planning.pod import Pod, compile_only_devices  # noqa: E402
from msd_jax.planning.programs import run_programs  # noqa: E402

PODS = ("v5e:4x4", "v5e:8x8", "v5e:16x16", "4*v5e:16x16")


def plan_pod(name: str, recipe: str, rows: int) -> dict[str, Any]:
    """The plan of a pod: the recipe's tensor axis, `data` over slices, the rest under fsdp.

    Args:
      name: a topology, with "SLICES*" before one of several slices.
      recipe: name of a config.
      rows: queries per chip and step.
    """
    slices, _, topology = name.rpartition("*")
    slices = int(slices or 1)
    devices = compile_only_devices(topology, slices)
    config = importlib.import_module(f"msd_jax.configs.{recipe}").get_config()
    config.data.batch_size = rows * len(devices)
    config.mesh.data, config.mesh.fsdp = slices, -1
    config = ml_collections.FrozenConfigDict(config)
    pod = Pod(topology, slices, sharding.train_mesh(config.mesh, devices=devices))
    sizes, source = read_sizes(config.model.path)
    model = abstract_model(config, sizes, pod.mesh)
    compiled = {program.name: compile_program(program, pod) for program in run_programs(config, model, pod.mesh)}
    return table.as_json(config, pod, compiled, source)


def received(row: dict[str, Any], program: str) -> int:
    return sum(row["programs"][program]["collective_bytes"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="qwen2_5_7b", help="name of a recipe")
    parser.add_argument("--rows", type=int, default=4, help="queries per chip and step")
    parser.add_argument("--pods", nargs="+", default=PODS, help="topologies, with SLICES* before one of several slices")
    parser.add_argument("--json", type=pathlib.Path, help="write the plans here")
    arguments = parser.parse_args()
    print(f"{arguments.config}, {arguments.rows} queries per chip; figures are per chip")
    columns = ("pod", "chips", "mesh", "HBM", "fits", "FLOPs", "received: train", "rollout", "slices", "seconds")
    print("{:<12}{:>6}{:>10}{:>12}{:>6}{:>8}{:>17}{:>10}{:>10}{:>10}".format(*columns), flush=True)
    rows = []
    for name in arguments.pods:
        row = plan_pod(name, arguments.config, arguments.rows)
        rows.append(row)
        programs = row["programs"].values()
        print(
            f"{name:<12}{row['devices']:>6}{'x'.join(map(str, row['mesh'].values())):>10}"
            f"{table.gib(max(program['total_hbm_bytes'] for program in programs)):>12}"
            f"{'yes' if row['fits'] else 'no':>6}"
            f"{table.si(sum(program['flops'] for program in programs), ''):>8}"
            f"{table.si(received(row, 'train'), 'B'):>17}{table.si(received(row, 'rollout'), 'B'):>10}"
            f"{table.si(sum(program['dcn_bytes'] for program in programs), 'B'):>10}"
            f"{table.si(row['seconds_estimate'], 's'):>10}",
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    by_devices = {row["devices"]: row for row in rows}
    if {64, 256} <= set(by_devices):
        total = {n: sum(received(by_devices[n], name) for name in by_devices[n]["programs"]) for n in (64, 256)}
        print(f"received by each chip, all programs, from 64 to 256 chips: {total[256] / total[64] - 1:+.1%}")


if __name__ == "__main__":
    main()
