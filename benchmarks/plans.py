"""The plans in docs/plan.md, each by the command in a process of its own, and what planning cost.

    python benchmarks/plans.py [--only WORD] [--json FILE]

On-policy, 256 queries per step, prompts of both roles and responses of 512 tokens. Needs XLA's TPU compiler but no TPU:
pip install 'msd-jax[plan]'. One to three minutes per plan on two cores.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

QWEN, LLAMA, QWEN_72B = "qwen2_5_7b.py", "llama3_8b.py", "Qwen/Qwen2.5-72B-Instruct"
# Label, recipe, topology, data x fsdp x tensor, micro-batches, further flags.
PLANS: tuple[tuple[str, str, str, str, int, tuple[str, ...]], ...] = (
    ("Qwen2.5-7B", QWEN, "v5e:8x8", "1,32,2", 1, ()),
    ("Qwen2.5-7B", QWEN, "v5e:8x8", "1,16,4", 1, ()),
    ("Qwen2.5-7B", QWEN, "v6e:4x4", "1,4,4", 4, ()),
    ("Qwen2.5-7B", QWEN, "v5p:2x2x2", "1,8,1", 4, ()),
    ("Llama-3-8B", LLAMA, "v5e:8x8", "1,32,2", 1, ()),
    ("Llama-3-8B", LLAMA, "v6e:4x4", "1,4,4", 4, ()),
    ("Llama-3-8B", LLAMA, "v5p:2x2x2", "1,8,1", 4, ()),
    ("Qwen2.5-7B, LoRA", f"{QWEN}:lora", "v5e:2x4", "1,2,4", 16, ()),
    ("Llama-3-8B, LoRA", f"{LLAMA}:lora", "v5e:2x4", "1,2,4", 16, ()),
    ("Qwen2.5-72B, LoRA", f"{QWEN}:lora", "v5p:2x2x4", "1,2,8", 32, (f"--config.model.path={QWEN_72B}",)),
    ("Qwen2.5-7B", QWEN, "v5e:2x4", "1,2,4", 1, ()),  # too big on purpose
)
TOKENS = ("prompts.student_limit", "prompts.teacher_limit", "rollout.max_new_tokens")
REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def run(recipe: str, topology: str, mesh: str, micro_batches: int, flags: tuple[str, ...]) -> dict[str, Any]:
    """The plan's JSON, with the command's wall-clock seconds, CPU seconds and gigabytes."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "plan.json"
        command = [sys.executable, "-m", "msd_jax.plan", f"--config=configs/{recipe}"]
        command += [f"--topology={topology}", f"--mesh={mesh}", f"--json={file}", *flags]
        command += ["--config.data.batch_size=256", f"--config.train.micro_batches={micro_batches}"]
        command += [f"--config.{key}=512" for key in TOKENS]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status) not in (0, 2):
            raise SystemExit(f"failed: {' '.join(command)}")
        return json.loads(file.read_text()) | {
            "command": command[1:],
            "wall_seconds": time.perf_counter() - start,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "gigabytes": usage.ru_maxrss / 1e6,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="plans whose label or topology contains this word")
    parser.add_argument("--json", type=pathlib.Path, help="write the plans here")
    arguments = parser.parse_args()
    print(
        "| model | slice | mesh | micro-batches | train | relayout | rollout | of | fits | step at least | planned in |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for label, recipe, topology, mesh, micro_batches, flags in PLANS:
        if arguments.only not in f"{label} {topology}":
            continue
        row = run(recipe, topology, mesh, micro_batches, flags)
        rows.append(row | {"name": label})
        cells = [label, f"`{topology}`", mesh.replace(",", " x "), str(micro_batches)]
        cells += [f"{row['programs'][key]['total_hbm_bytes'] / 2**30:.2f}" for key in ("train", "relayout", "rollout")]
        cells += [f"{row['chip']['hbm_bytes'] / 2**30:.2f} GiB", "yes" if row["fits"] else "**no**"]
        cells.append(f"{row['seconds_estimate']:.1f} s" if row["fits"] else "-")
        cells.append(f"{row['wall_seconds']:.0f} s ({row['cpu_seconds']:.0f} s of CPU), {row['gigabytes']:.1f} GB")
        print("| " + " | ".join(cells) + " |", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
