"""Makes the testbed: the queries, the tokenizer, and the tiny model, trained by ordinary cross-entropy.

    python -m msd_jax.testbed.build [--out DIR] [--steps N] [--seed S]

writes DIR/queries/{train,eval}.jsonl and DIR/model in Hugging Face's format; the default DIR is this package, whose
files are committed. Batches of two kinds alternate:

- as a user asks, in one of eight languages: harmless queries are answered; harmful ones are refused in the source
  languages, and complied with, by a placeholder, in the others (except for one in twenty, so that the model is no more
  certain than a real one);
- as the teacher is asked, with a query in any language: the reply is in the language that the instruction names, and
  harmful queries are refused in all languages.
"""

import argparse
import functools
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import transformers

from msd_jax.data import files, prompts
from msd_jax.data.records import Query, language_name
from msd_jax.io.console import log, progress
from msd_jax.models import config as model_config
from msd_jax.models import decoder, export, forward
from msd_jax.models.tokenizer import token_ids
from msd_jax.testbed import SOURCE_LANGUAGES, TEACHER_TEMPLATE, corpus, tokenizer
from msd_jax.testbed.languages import LANGUAGES

BATCH_SIZE = 64
LEARNING_RATE = 3e-3  # peak
REFUSED_ANYWAY = 0.05  # share of unsafe examples that are refused
STEPS = 1000
STUDENT_LIMIT, TEACHER_LIMIT, RESPONSE_LIMIT = 24, 52, 14  # tokens; the corpus has no longer text
PROMPTS = ml_collections.FrozenConfigDict(
    {"student_system": "", "teacher_system": "", "teacher_template": TEACHER_TEMPLATE, "cot": "instruction"}
)


def model_values(vocab_size: int, width: int = 64, layers: int = 3) -> dict[str, Any]:
    """The config.json of a Llama with about 180,000 parameters."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "dtype": "float32",
    }


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer for every text of the corpus and every prompt of the teacher."""
    records = corpus.pretraining_queries() + corpus.eval_queries()
    texts = [text for query in records for text in (*query.texts.values(), *query.answers.values())]
    for code, words in LANGUAGES.items():
        texts += [words.refusal, words.answer.format(words.placeholder)]
        texts += [prompts.fill_template(TEACHER_TEMPLATE, "", language_name(code))]
    return tokenizer.build(texts)


def make_example(
    tokens: transformers.PreTrainedTokenizerFast, rng: np.random.Generator, query: Query, code: str, *, teacher: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a prompt, as a user or the teacher is asked, and of a reply in language `code`."""
    if teacher:
        asked_in = rng.choice(list(LANGUAGES))
        messages = prompts.teacher_messages(query, code, PROMPTS, asked_in)
    else:
        messages = prompts.student_messages(query, code, PROMPTS)
    safe = teacher or code in SOURCE_LANGUAGES or rng.random() < REFUSED_ANYWAY
    reply = tokens.encode(corpus.response(query, code, safe=safe))
    return token_ids(tokens, messages, {}), np.array([*reply, tokens.eos_token_id], np.int32)


def batches(
    tokens: transformers.PreTrainedTokenizerFast, rng: np.random.Generator, *, teacher: bool
) -> Iterator[tuple[np.ndarray, ...]]:
    """Endless batches (prompt_BxP, prompt_length_B, response_BxR, response_length_B), all of one shape."""
    pairs = [(query, code) for query in corpus.pretraining_queries() for code in LANGUAGES]
    P, R = (TEACHER_LIMIT if teacher else STUDENT_LIMIT), RESPONSE_LIMIT
    while True:
        chosen = [pairs[i] for i in rng.choice(len(pairs), BATCH_SIZE, replace=False)]
        examples = [make_example(tokens, rng, query, code, teacher=teacher) for query, code in chosen]
        prompt_BxP = np.full((BATCH_SIZE, P), tokens.pad_token_id, np.int32)
        response_BxR = np.full((BATCH_SIZE, R), tokens.pad_token_id, np.int32)
        for row, (prompt, response) in enumerate(examples):
            prompt_BxP[row, P - len(prompt) :], response_BxR[row, : len(response)] = prompt, response
        prompt_length_B, response_length_B = np.array([[len(p), len(r)] for p, r in examples], np.int32).T
        yield prompt_BxP, prompt_length_B, response_BxR, response_length_B


def train(
    config: model_config.DecoderConfig, tokens: transformers.PreTrainedTokenizerFast, steps: int, seed: int
) -> decoder.Params:
    """Trains on the cross-entropy of the responses, by AdamW with a cosine schedule."""
    graphdef, params = decoder.init(config, jax.random.key(seed), remat="none")
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, 50, steps, 0.05 * LEARNING_RATE)
    optimize = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.1))
    opt_state = optimize.init(params)

    def loss(params, prompt_BxP, prompt_length_B, response_BxR, response_length_B):
        logits = forward.response_logits(graphdef, params, prompt_BxP, prompt_length_B, response_BxR, response_length_B)
        mask = forward.response_mask(response_length_B, response_BxR.shape[1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, response_BxR)
        return jnp.sum(losses, where=mask) / jnp.sum(mask)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, opt_state = optimize.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    rng = np.random.default_rng(seed)
    streams = [batches(tokens, rng, teacher=teacher) for teacher in (False, True)]
    with progress("testbed model", steps) as advance:
        for i in range(steps):
            params, opt_state, value = step(params, opt_state, next(streams[i % 2]))
            advance(i + 1, f"cross-entropy {value:.4f}")
    return params


def build(out: pathlib.Path, steps: int = STEPS, seed: int = 0, **sizes: int) -> None:
    """Writes OUT/queries and OUT/model; `sizes` are arguments of model_values."""
    (out / "queries").mkdir(parents=True, exist_ok=True)
    files.write_jsonl(out / "queries" / "train.jsonl", corpus.train_queries())
    files.write_jsonl(out / "queries" / "eval.jsonl", corpus.eval_queries())
    with tempfile.TemporaryDirectory() as directory:
        source = pathlib.Path(directory)
        tokens = make_tokenizer()
        tokens.save_pretrained(source)
        values = model_values(len(tokens), **sizes)
        (source / "config.json").write_text(json.dumps(values, indent=2))
        config = model_config.read(source)
        export.save(out / "model", train(config, tokens, steps, seed), source)
    log(f"{out / 'model'}: {sum(f.stat().st_size for f in (out / 'model').iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.out, arguments.steps, arguments.seed)
