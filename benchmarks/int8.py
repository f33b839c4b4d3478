"""What int8 weights change in generation: next-token distributions, greedy replies, and tokens per second here.

    python benchmarks/int8.py --model HF_DIR --queries QUERIES.csv [--languages sw bn en] [--json FILE]

Float32 weights and products write greedy replies of at most --tokens tokens, and the same prompts are answered with

- bfloat16: products in bfloat16, as a yardstick;
- int8: config.rollout.weights="int8", with products in float32;
- int8 and head: the same for a model whose head is tied to its embeddings, with a head of its own, which is quantised.

Over the tokens of the float32 replies: the mean absolute difference of their log-probabilities, and the mean KL
divergence from the float32 distribution, in nats per token. Of the replies: how many begin with the same token, and how
many are the same to the end. Tokens per second are those of a second run of all prompts on this machine, which reads
the prompts too.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from msd_jax.configs import default

from msd_jax.data import files, prompts
from msd_jax.generation import rollout
from msd_jax.models import forward, pretrained
from msd_jax.parallel import padding, sharding

ROWS, SCORED = 16, 4  # prompts that are answered, and scored, at a time


class Variant(NamedTuple):
    """A model, how generation holds its weights, and whether it has a head of its own."""

    dtype: str
    weights: str
    own_head: bool = False


REFERENCE = "float32"
VARIANTS = {
    REFERENCE: Variant("float32", "float"),
    "bfloat16": Variant("bfloat16", "float"),
    "int8": Variant("float32", "int8"),
    "int8 and head": Variant("float32", "int8", own_head=True),
}


class Weights:
    """A variant's decoder and weights, and its greedy replies."""

    def __init__(self, directory: str, variant: Variant, tokens: int, limit: int):
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        options: dict[str, Any] = {"dtype": variant.dtype, "param_dtype": "float32", "remat": "none", "mesh": mesh}
        loaded = pretrained.load(directory, **options)
        model: pretrained.Architecture = loaded
        params = loaded.params(mesh)
        if variant.own_head and "head" not in params:
            model = pretrained.architecture(dataclasses.replace(loaded.config, tied_embeddings=False), **options)
            params = jax.device_put(
                params | {"head": params["embedding"].T}, jax.tree.map(lambda leaf: leaf.sharding, model.target(mesh))
            )
        layout = rollout.layout(model, mesh, variant.weights)
        self.graphdef, self.params = model.graphdef, rollout.reshard(params, model.dtype, layout)
        sampling = rollout.Sampling(tokens, temperature=0.0)
        self.generator = rollout.Generator(self.graphdef, mesh, sampling, loaded.stop_ids, loaded.pad_id)
        self.limit = limit

    def replies(self, prompts_ids: list[np.ndarray]) -> list[list[int]]:
        given: list[list[int]] = []
        for first in range(0, len(prompts_ids), ROWS):
            batch = prompts_ids[first : first + ROWS]
            written = self.generator.write(self.params, batch, ROWS, self.limit)
            given += [written.row(i)[0] for i in range(len(batch))]
        return given


def encoded(arguments: argparse.Namespace, tokenizer: Any) -> list[tuple[str, np.ndarray]]:
    """(language, prompt) of the first queries in each language, the shortest first."""
    config, records = default.get_config(), files.read(arguments.queries)[: arguments.limit]
    pairs = [
        (language, prompts.student_ids(record, language, tokenizer, config.prompts))
        for language in arguments.languages
        for record in records
    ]
    return sorted((pair for pair in pairs if len(pair[1]) <= arguments.longest), key=lambda p: len(p[1]))


@functools.partial(jax.jit, static_argnums=(0, 2))
def compare(graphdef: Any, params: Any, other_graphdef: Any, other_params: Any, *sequence: jax.Array) -> Any:
    """(|difference of the tokens' log-probabilities|, KL from the first distribution), both [B, R]."""
    first, other = (
        jax.nn.log_softmax(forward.response_logits(some, weights, *sequence))
        for some, weights in ((graphdef, params), (other_graphdef, other_params))
    )
    taken_BxRx1 = sequence[2][..., None]
    difference = jnp.take_along_axis(first, taken_BxRx1, -1) - jnp.take_along_axis(other, taken_BxRx1, -1)
    return jnp.abs(difference)[..., 0], jnp.sum(jnp.exp(first) * (first - other), axis=-1)


def distances(
    reference: Weights, other: Weights, prompts_ids: list[np.ndarray], replies: list[list[int]], tokens: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """`compare` of each reply's tokens."""
    limit = max(map(len, prompts_ids))
    differences: list[np.ndarray] = []
    divergences: list[np.ndarray] = []
    for first in range(0, len(replies), SCORED):
        count = len(replies[first : first + SCORED])
        rows = [min(first + i, len(replies) - 1) for i in range(SCORED)]
        prompt, prompt_length = padding.left_pad([prompts_ids[i] for i in rows], limit, 0)
        length = np.array([len(replies[i]) for i in rows], np.int32)
        response = np.array([replies[i] + [0] * (tokens - len(replies[i])) for i in rows], np.int32)
        sequence = prompt, prompt_length, response, length
        found = compare(reference.graphdef, reference.params, other.graphdef, other.params, *sequence)
        for kept, values in zip((differences, divergences), jax.device_get(found)):
            kept += [values[i, : length[i]] for i in range(count)]
    return differences, divergences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--queries", required=True, help="query file with a column for each language")
    parser.add_argument("--languages", nargs="+", default=["sw", "bn", "en"])
    parser.add_argument("--limit", type=int, default=32, help="queries of each language")
    parser.add_argument("--longest", type=int, default=256, help="tokens of a prompt; longer ones are left out")
    parser.add_argument("--tokens", type=int, default=32, help="the most tokens of a reply")
    parser.add_argument("--without", nargs="*", choices=[*VARIANTS][1:], default=[], help="what is left out")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()

    asked = encoded(
        arguments, pretrained.load(arguments.model, dtype="float32", param_dtype="float32", remat="none").tokenizer
    )
    languages, prompts_ids = [language for language, _ in asked], [ids for _, ids in asked]
    rows: list[dict[str, Any]] = []
    reference, expected = None, []
    print(f"{'':<15}{'':<5}{'|d log p|':>10}{'KL':>10}{'first token':>13}{'whole reply':>13}{'tokens/s':>10}")
    for name, variant in VARIANTS.items():
        if name in arguments.without:
            continue
        weights = Weights(arguments.model, variant, arguments.tokens, max(map(len, prompts_ids)))
        weights.replies(prompts_ids)  # compiles
        start = time.perf_counter()
        replies = weights.replies(prompts_ids)
        speed = sum(map(len, replies)) / (time.perf_counter() - start)
        if reference is None:
            reference, expected = weights, replies
            print(f"{name:<15}{'all':<51}{speed:>10.0f}")
            continue
        found = distances(reference, weights, prompts_ids, expected, arguments.tokens)
        for language in [*arguments.languages, "all"]:
            of_it = [i for i, other in enumerate(languages) if language in (other, "all")]
            difference, divergence = (np.concatenate([values[i] for i in of_it]).mean() for values in found)
            first = np.mean([replies[i][0] == expected[i][0] for i in of_it])
            whole = np.mean([replies[i] == expected[i] for i in of_it])
            rows.append({"variant": name, "language": language, "difference": float(difference)})
            rows[-1] |= {"kl": float(divergence), "first": first, "whole": whole, "tokens_per_second": speed}
            shown = f"{difference:>10.4f}{divergence:>10.5f}{first:>13.0%}{whole:>13.0%}"
            print(f"{name:<15}{language:<5}{shown}" + (f"{speed:>10.0f}" if language == "all" else ""))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
