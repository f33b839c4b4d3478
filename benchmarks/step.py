"""A training step of msd_jax and of TRL's SDFTTrainer, in alternation on the CPU threads of this machine.

    pip install -e '.[parity]' trl==1.16 && python benchmarks/step.py --model HF_DIR --queries QUERIES.csv [--json FILE]

Both train the same model in float32 on the same batches of queries with the same prompts for both roles, sample 64
tokens at temperature 1, and minimise the reverse KL over the whole vocabulary to a frozen copy of the initial model
with AdamW; msd_jax adds DPSW's weights. Each round runs one process of each. The seconds are the median over the steps
of all rounds, except the first step and, for msd_jax, those that compiled a program. Peak memory is the process's
largest resident set. msd_jax is measured as if torch were not installed, since it does not need it: where torch is
installed, transformers and tensorboardX load it, which takes 0.2 GB.
"""

import argparse
import dataclasses
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

COMPARED = ("seconds_per_step", "generation_seconds", "training_seconds", "peak_bytes")


def configured(arguments: argparse.Namespace):
    """configs/smollm2.py with the model, the queries and the number of steps of the flags."""
    import ml_collections
    from msd_jax.configs import smollm2

    config = smollm2.get_config()
    config.model.path, config.data.path = arguments.model, arguments.queries
    config.data.languages = ml_collections.ConfigDict({arguments.language: 1.0})
    config.train.steps, config.train.export = arguments.steps, False
    config.train.checkpoints.every = config.train.completions.every = arguments.steps + 1
    return ml_collections.FrozenConfigDict(config)


def hide_torch() -> None:
    """Makes the two libraries that load torch wherever it is installed believe that it is not."""
    sys.modules["torch"] = None
    import tensorboardX  # noqa: F401
    import transformers

    assert not transformers.utils.is_torch_available()  # the answer is cached
    del sys.modules["torch"]


def ours(arguments: argparse.Namespace) -> list[dict[str, float]]:
    hide_torch()
    from msd_jax.io import jsonl
    from msd_jax.parallel import host_memory
    from msd_jax.training import checkpoint, loop, run

    class NothingSaved(checkpoint.Checkpoints):  # TRL is told to leave the checkpoint at the end out as well
        def save(self, *_):
            pass

    host_memory.give_back_after_compilations()
    with tempfile.TemporaryDirectory() as workdir:
        ready = run.setup(configured(arguments), pathlib.Path(workdir))
        ready = dataclasses.replace(ready, checkpoints=NothingSaved(pathlib.Path(workdir)))
        state, frozen = loop.initial_state(ready)
        loop.take_steps(ready, frozen, state, iter(ready.batches), 0)
        rows = jsonl.read(pathlib.Path(workdir) / "metrics.jsonl")
    for row in rows:
        print(f"step {row['step']}: {row['rollout_seconds']:.1f} + {row['train_seconds']:.1f} s", file=sys.stderr)
    assert "torch" not in sys.modules
    compiled = [row["rollout_compilations"] + row["train_compilations"] for row in rows]
    return [
        {
            "generation": row["rollout_seconds"],
            "training": row["train_seconds"],
            "tokens": row["response_length"],
            "kl": row["kl"],
            "counts": after == before,
        }
        for row, before, after in zip(rows, [0, *compiled], compiled)
    ]


def peer(arguments: argparse.Namespace) -> list[dict[str, float]]:
    import datasets
    import torch
    import transformers
    from trl.experimental import sdft

    from msd_jax.models.tokenizer import load_tokenizer
    from msd_jax.training import run

    config = configured(arguments)
    with tempfile.TemporaryDirectory() as workdir:
        batches = iter(run.read(config).batches)  # the queries that ours takes, in its order
        tokenizer = load_tokenizer(arguments.model)
        rows = [peer_row(example, tokenizer) for _ in range(arguments.steps) for example in next(batches).examples]
        options = sdft.SDFTConfig(
            output_dir=workdir,
            per_device_train_batch_size=config.data.batch_size,
            max_steps=arguments.steps,
            max_completion_length=config.rollout.max_new_tokens,
            max_prompt_length=None,
            shuffle_dataset=False,
            temperature=config.rollout.temperature,
            top_k=0,
            teacher_model_kind="base",
            distillation_mode="full_logits",
            distillation_alpha=1.0,  # reverse KL
            learning_rate=config.optimizer.learning_rate,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=not arguments.peer_keeps_activations,
            model_init_kwargs={"dtype": torch.float32},
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        trainer = sdft.SDFTTrainer(model, options, datasets.Dataset.from_list(rows), processing_class=tokenizer)
        return timed_steps(trainer)


def peer_row(example, tokenizer) -> dict[str, str]:
    """A query as TRL takes it: as texts, which must give the same tokens."""
    student, teacher = (tokenizer.decode(ids) for ids in (example.student_ids, example.teacher_ids))
    for text, ids in ((student, example.student_ids), (teacher, example.teacher_ids)):
        assert tokenizer(text)["input_ids"] == ids.tolist()
    return {"prompt": student, "privileged_context": teacher}


def timed_steps(trainer) -> list[dict[str, float]]:
    """Runs TRL's trainer; one row per step."""
    import transformers

    # Its template would join the query and the context; here the teacher sees only its own prompt.
    trainer.teacher_context_builder._compose_teacher_prompt = lambda prompt, context: context
    steps: list[dict[str, float]] = []
    generate = trainer._generate

    def timed_generate(prompt_ids):
        start = time.perf_counter()
        result = generate(prompt_ids)
        lengths = [len(ids) for ids in result[1]]
        steps.append({"generation": time.perf_counter() - start, "tokens": statistics.mean(lengths)})
        return result

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            steps[-1]["whole"] = time.perf_counter() - self.start

    trainer._generate = timed_generate
    trainer.add_callback(Clock())
    trainer.train()
    return [
        {
            "generation": step["generation"],
            "training": step["whole"] - step["generation"],
            "tokens": step["tokens"],
            "counts": number > 0,
        }
        for number, step in enumerate(steps)
    ]


def measure(which: str) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--only", which]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--queries", required=True, help="query file with columns of the language and en")
    parser.add_argument("--language", default="sw")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer-keeps-activations", action="store_true", help="TRL without gradient checkpointing")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--only", choices=("ours", "peer"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        steps = {"ours": ours, "peer": peer}[arguments.only](arguments)
        print(json.dumps({"steps": steps, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return

    runs: dict[str, list[dict]] = {"ours": [], "peer": []}
    for _ in range(arguments.rounds):
        for which, results in runs.items():
            results.append(measure(which))
    table = {which: summary(which, results) for which, results in runs.items()}
    table["ratio"] = {key: table["ours"][key] / table["peer"][key] for key in COMPARED}
    show(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def summary(which: str, results: list[dict]) -> dict[str, float]:
    steps = [step for result in results for step in result["steps"] if step["counts"]]
    if not steps:
        sys.exit(f"{which}: every step compiled a program; take more --steps")
    return {
        "seconds_per_step": statistics.median(step["generation"] + step["training"] for step in steps),
        "generation_seconds": statistics.median(step["generation"] for step in steps),
        "training_seconds": statistics.median(step["training"] for step in steps),
        "peak_bytes": max(result["peak_bytes"] for result in results),
        "response_tokens": statistics.mean(step["tokens"] for step in steps),
        "steps": len(steps),
    }


def show(table: dict[str, dict[str, float]]) -> None:
    print(f"{'':<8}{'step':>10}{'generation':>12}{'training':>10}{'memory':>10}{'tokens':>8}{'steps':>7}")
    for which in ("ours", "peer"):
        row = table[which]
        print(
            f"{which:<8}{row['seconds_per_step']:>8.1f} s{row['generation_seconds']:>10.1f} s"
            f"{row['training_seconds']:>8.1f} s{row['peak_bytes'] / 1e9:>7.2f} GB{row['response_tokens']:>8.1f}"
            f"{row['steps']:>7}"
        )
    print(f"{'ratio':<8}" + "".join(f"{table['ratio'][key]:>{w}.2f}" for key, w in zip(COMPARED, (10, 12, 10, 10))))


if __name__ == "__main__":
    main()
