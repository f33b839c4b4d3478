"""Runs any task of EleutherAI's lm-evaluation-harness on our models: `--model msd_jax`.

    pip install -e '.[eval]'
    python -m msd_jax.lm_eval run --model msd_jax --model_args pretrained=HF_DIR,dtype=bfloat16 --tasks TASK ...

The command is the harness's own with our model added. Releases of the harness after 0.4.13 find the model by its entry
point, so that `lm_eval run --model msd_jax` does the same. In Python:

    import lm_eval
    from msd_jax.lm_eval import MsdJaxLM
    lm_eval.simple_evaluate(model=MsdJaxLM("HF_DIR"), tasks=[...])

Numbers equal those of the harness's `hf` model: its rules for special tokens, for where a context ends and for what is
too long are followed or called. To compare log-likelihoods, give `hf` softmax_dtype=float64: torch's float32 softmax
over 49,152 tokens is off by 1e-5 per token. All processes of a run (they find each other by the environment, see
distributed.py) are one model, and process 0 alone has the results.
"""

import collections
import json
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import transformers
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text, resolve_max_length

from msd_jax.data import batches
from msd_jax.errors import UserError
from msd_jax.generation import likelihood, refill, rollout
from msd_jax.io.console import progress
from msd_jax.models import pretrained as pretrained_lib
from msd_jax.models import trained
from msd_jax.parallel import sharding

_AUTO_BATCH = 32  # rows, where the harness is asked to find a batch size
_log = logging.getLogger(__name__)


@register_model("msd_jax")
class MsdJaxLM(TemplateLM):
    """One of our models, as the harness drives it."""

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str | None = None,
        batch_size: int | str = _AUTO_BATCH,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        data: int = 1,
        fsdp: int = -1,
        tensor: int = 1,
        seed: int = 0,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Reads tokenizer and weights.

        Args:
          pretrained: a Hugging Face directory, a hub id, or WORKDIR/checkpoints/STEP of a run.
          dtype: of matrix products; default: float32, or what the run's config says.
          batch_size: rows at a time over all devices, or "auto".
          max_length: tokens of a context and its continuation; default: what the model's config.json says.
          max_gen_toks: for tasks that do not set it.
          data, fsdp, tensor: the mesh, as config.mesh.
          seed: for sampling.
          max_batch_size, device: ignored, though the harness passes them. The others are as its `hf` takes them.

        Raises:
          UserError: `pretrained` is none of the three, or cannot be read.
        """
        super().__init__()
        del max_batch_size, device
        mesh = sharding.make_mesh(data, fsdp, tensor)
        step, settings = _run_settings(pretrained)
        model = pretrained_lib.load(**settings | ({"dtype": dtype} if dtype else {}), mesh=mesh)
        self._mesh = sharding.rollout_mesh(mesh)
        self._model, layout = model.on(self._mesh), model.shardings(self._mesh, sharding.ROLLOUT)
        self._params = rollout.reshard(trained.load_params(step, model, mesh), model.dtype, layout)
        self.tokenizer, self._add_bos, self._prefix = self._model.tokenizer, add_bos_token, prefix_token_id
        self._template = dict(chat_template_args or {})
        if enable_thinking is not None:
            self._template["enable_thinking"] = enable_thinking
        config = transformers.AutoConfig.from_pretrained(self._model.directory, trust_remote_code=False)
        most = (self._model.config.longest or sys.maxsize) - 1
        self.max_length = int(max_length or min(resolve_max_length(config, self.tokenizer), most))
        self._model.require_length({"max_length": self.max_length + 1})
        self.max_gen_toks, self._key = int(max_gen_toks), jax.random.key(int(seed))
        rows = _AUTO_BATCH if str(batch_size).startswith("auto") else int(batch_size)
        self.batch_size = sharding.batch_rows(self._mesh, rows)
        # As the harness counts, the model reads all but the last token.
        self._scorer = likelihood.Scorer(self._model, self._mesh, self.batch_size, self.max_length + 1)
        self._pools: dict[rollout.Sampling, refill.PoolGenerator] = {}
        # For a perplexity's error bar the harness would fork, and forking a process with JAX's threads may hang.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        if jax.process_count() > 1:  # by which the harness decides which process of one model writes
            os.environ["LOCAL_RANK"] = str(jax.process_index())

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What precedes a text without a context."""
        if self._prefix is not None:
            return int(self._prefix)
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._template,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; by default special tokens are added as the tokenizer does, but never a second BOS."""
        del kwargs
        if add_special_tokens is None:
            prefix = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = False if has_bos_prefix(string, prefix) else self._add_bos
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids = self.tokenizer.encode(string, **options)
        self._model.require_embedded(ids, f"{string!r:.80}")
        return ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihoods of whole texts, in windows of max_length tokens where they are longer."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            rolling = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            windows += [(None, *utils.make_disjoint_window(window)) for window in rolling]
            owners += [owner] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[owner] += log_likelihood
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The scores of what TemplateLM.loglikelihood tokenized: (texts, context ids, continuation ids) each."""
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(f"a continuation of {longest} tokens does not fit into max_length={self.max_length}")
        for texts, context, continuation in requests:
            if not context or not continuation:
                raise UserError(f"the tokenizer gives the context or the continuation of {texts!r:.200} no token")
        pairs = [
            (context[max(0, len(context) + len(continuation) - self.max_length - 1) :], continuation)
            for _, context, continuation in requests
        ]
        cut = sum(len(context) < len(request[1]) for (context, _), request in zip(pairs, requests))
        if cut:
            _log.warning("%d of %d contexts cut from the left to %d tokens", cut, len(pairs), self.max_length)
        scores = [(x.log_likelihood, x.greedy) for x in self._scorer(self._params, pairs, "log-likelihoods")]
        for (texts, _, _), score in zip(requests, scores):
            if texts is not None:  # rolling windows have none
                self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that end before a stop token or stop string of the request, or at its limit on tokens."""
        groups: dict[str, list[int]] = collections.defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True, default=str)].append(index)
        texts: dict[int, str] = {}
        for indices in groups.values():
            texts |= self._generate([requests[index] for index in indices], indices)
        return [texts[index] for index in range(len(requests))]

    def _generate(self, requests: list[Instance], indices: list[int]) -> dict[int, str]:
        """Texts, by index, of requests with the same settings."""
        settings = dict(normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks))
        until, R = settings.pop("until"), settings.pop("max_gen_toks")
        temperature, top_k, top_p = (settings.pop(*x) for x in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0)))
        if not settings.pop("do_sample"):
            temperature = 0.0
        sampling = rollout.Sampling(R, float(temperature), int(top_k), float(top_p))
        if settings:
            raise UserError(f"msd_jax does not generate with {settings}; it supports temperature, top_k and top_p")
        room = self.max_length - R
        if room < 1:
            raise UserError(f"max_gen_toks={R} leaves no room for a prompt in max_length={self.max_length} tokens")
        rows = [self.tok_encode(request.args[0]) for request in requests]
        cut = sum(len(ids) > room for ids in rows)
        if cut:
            _log.warning("%d of %d prompts cut from the left to %d tokens", cut, len(rows), room)
        prompts_ids = [np.array(ids[-room:], np.int32) for ids in rows]
        if sampling not in self._pools:
            what = self._model.graphdef, self._mesh, sampling, self._model.stop_ids, self._model.pad_id
            self._pools[sampling] = refill.PoolGenerator(*what, rows=self.batch_size, limit=room)
        # A draw depends on the prompt and on how often it was asked before, so repeats differ.
        asked: collections.Counter[str] = collections.Counter()
        hashes = []
        for request in requests:
            hashes.append(batches.query_hash(request.args[0], str(asked[request.args[0]])))
            asked[request.args[0]] += 1
        texts: dict[int, str] = {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        asked_ids, drawn = [prompts_ids[i] for i in order], [hashes[i] for i in order]
        with progress("generating", len(rows)) as advance:
            for count, response in enumerate(self._pools[sampling](self._params, asked_ids, drawn, self._key), 1):
                i = order[response.index]
                text = self.tokenizer.decode(response.tokens, skip_special_tokens=True)
                texts[indices[i]] = postprocess_generated_text(text, until, None)
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[indices[i]])
                advance(count, "")
        return texts


def _run_settings(path: str) -> tuple[str, dict[str, Any]]:
    """(the step of a run or "", how its model is loaded), for a Hugging Face directory, a hub id or a step of a run."""
    if not (pathlib.Path(path) / "state").is_dir():
        return "", {"path": path, "dtype": "float32", "param_dtype": "float32", "remat": "none"}
    file = pathlib.Path(path).resolve().parent.parent / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return path, config["model"] | {"chat_template": config["prompts"].get("chat_template", "")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is a step of a run, but {file} is not the run's config ({error!r})") from error
