"""Every key of the configuration and its default; a recipe starts from here and changes what it needs.

python -m msd_jax.main --config configs/default.py --workdir DIR \
    --config.model.path=HF_DIR_OR_HUB_ID --config.data.path=QUERIES.csv
"""

import ml_collections

from msd_jax.data import prompts


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    # Compiled programs, which the next run of the same shapes takes from there: a directory of this machine, or on pods
    # one that all machines share, gs://BUCKET/... too; "" keeps none. JAX_COMPILATION_CACHE_DIR goes first.
    config.compilation_cache = "~/.cache/msd_jax/compiled"

    # The model to align; it is its own teacher.
    config.model = ml_collections.ConfigDict()
    config.model.path = ""  # Hugging Face directory, hub id (owner/name), or gs://, s3://, az://
    config.model.param_dtype = "float32"  # of the trained weights
    config.model.dtype = "float32"  # of matrix products; bfloat16 on TPU and GPU. See docs/method.md, Precision
    # auto (the platform's kernel where shapes allow: cudnn on GPUs in bfloat16, splash on TPUs; else xla) | xla
    config.model.attention = "auto"
    # Rematerialisation of each layer in the backward pass: none (keeps everything) | dots | full (keeps nothing).
    config.model.remat = "full"
    config.model.freeze_embeddings = False  # and with them a tied head
    # Low-rank adapters: they alone are trained, and the frozen teacher is the base model, in its checkpoint's dtype.
    config.model.lora = ml_collections.ConfigDict()
    config.model.lora.rank = 0  # 0 trains all weights
    config.model.lora.alpha = 32.0  # the update is scaled by alpha / rank
    config.model.lora.targets = ("query", "key", "value", "output", "gate", "up", "down")

    # Parallel queries; responses are not needed. See docs/data.md.
    config.data = ml_collections.ConfigDict()
    # .jsonl, .csv or .parquet (one column per language), a directory, hf://OWNER/NAME[/PATH], or a TFDS dataset, as in
    # tfds://parallel_queries:1.0.0/train.
    config.data.path = ""
    config.data.harmful = "file"  # label of records without one: file (stays unknown) | true | false
    # Several sources instead of path, each with a path, perhaps harmful, and a weight, its share of the stream whatever
    # its size: {"multijail": {"path": "hf://DAMO-NLP-SG/MultiJail", "weight": 3.0}, ...}.
    config.data.sources = ml_collections.ConfigDict()
    config.data.harmful_share = -1.0  # share of harmful queries in the stream, 0 to 1; -1 leaves it as in the data
    # Share of the queries, from 0 to below 1, that both roles see in the source language, as a user types them: there a
    # frozen teacher holds the student to the initial model.
    config.data.retain_fraction = 0.0
    # What becomes of training queries that nearly equal evaluation queries: report | drop. In either case they are
    # counted, and listed in WORKDIR/near_duplicates.jsonl.
    config.data.near_duplicates = "report"
    config.data.source_language = "en"  # what the teacher reads
    # Languages to align, and their sampling weights. A config of your own replaces the whole mapping.
    config.data.languages = ml_collections.ConfigDict({"sw": 1.0})
    config.data.batch_size = 32  # queries per step, over all devices
    # Number of batches among which queries are sorted by length, which saves padding; 1 keeps their order. Queries in a
    # language that takes many more tokens than the others then tend to share batches.
    config.data.length_window = 8

    config.prompts = ml_collections.ConfigDict()
    # How the teacher thinks about safety: instruction (silently, as teacher_template tells it) | generated (it first
    # writes an analysis, greedily, which is kept with the query; needs a frozen teacher) | none (it is told to reply).
    config.prompts.cot = "instruction"
    # instruction: with {query}, which is in the source language, and {language}, that of the reply. It may also have
    # {target_query}, the query in that language, as may reply_template and plain_template.
    config.prompts.teacher_template = prompts.DEFAULT_TEACHER_TEMPLATE
    config.prompts.analysis_template = prompts.DEFAULT_ANALYSIS_TEMPLATE  # generated, first turn: with {query}
    config.prompts.reply_template = prompts.DEFAULT_REPLY_TEMPLATE  # generated, second turn: with {language}
    config.prompts.analysis_tokens = 128  # generated: the most tokens of an analysis
    # generated: the analysis is what a thinking model (Qwen3) thinks of the first turn, not its reply to it.
    config.prompts.analysis_is_thinking = False
    config.prompts.plain_template = prompts.DEFAULT_PLAIN_TEMPLATE  # none: with {query} and {language}
    config.prompts.student_system = ""  # system message; "" for none
    config.prompts.teacher_system = ""
    # A file with the chat template to use instead of the tokenizer's own, which base models lack; "" for that.
    config.prompts.chat_template = ""
    # The two roles' prompts must end alike, or one role's reasoning would be the other's reply.
    config.prompts.require_same_ending = True
    config.prompts.student_limit = 512  # tokens; longer prompts are dropped and counted
    config.prompts.teacher_limit = 1024
    # Variables of the tokenizer's chat template; thinking modes (Qwen3) are off in both roles, or on in both.
    config.prompts.student_template_kwargs = ml_collections.ConfigDict({"enable_thinking": False})
    config.prompts.teacher_template_kwargs = ml_collections.ConfigDict({"enable_thinking": False})

    config.teacher = ml_collections.ConfigDict()
    config.teacher.kind = "frozen"  # frozen (initial weights) | live (the student's own) | ema | periodic
    config.teacher.ema_decay = 0.95  # ema: teacher = decay * teacher + (1 - decay) * student, after each step
    config.teacher.period = 50  # periodic: steps between copies of the student

    # Where the response tokens come from. Of the model's own generation_config only the stop tokens are used.
    config.rollout = ml_collections.ConfigDict()
    # on_policy (student samples) | off_policy (teacher samples) | mixed | reference (the records' own answers, cut at
    # max_new_tokens; nothing is sampled).
    config.rollout.policy = "on_policy"
    config.rollout.on_policy_fraction = 0.5  # mixed: probability that a query is sampled from the student
    config.rollout.max_new_tokens = 256  # the reasoning of a thinking model included
    config.rollout.temperature = 1.0  # 0 is greedy
    config.rollout.top_k = 0  # keep the k most probable tokens; 0 keeps all
    config.rollout.top_p = 1.0  # keep the smallest set of tokens with this probability
    # Responses generated at a time; 0: the whole batch. With fewer, a row that ends takes the batch's next prompt, and
    # the cache is smaller; the responses are the same.
    config.rollout.rows = 0
    # What generation reads: float (weights in config.model.dtype) | int8 (matrices rounded to int8, half the bytes of
    # bfloat16; what is trained and scored is not). See docs/performance.md.
    config.rollout.weights = "float"
    # off_policy, mixed: sample the teacher's response to a query once and keep it. Needs a frozen teacher.
    config.rollout.reuse_teacher_responses = True

    config.loss = ml_collections.ConfigDict()
    # reverse_kl, KL(student || teacher) | forward_kl, KL(teacher || student) | jsd | blend (of the two KLs) | auto
    # (forward_kl, whoever writes the responses: docs/method.md) | cross_entropy (of the response's tokens; with uniform
    # weights, off_policy is fine-tuning on the teacher's replies, and reference is fine-tuning on the records').
    config.loss.divergence = "auto"
    config.loss.beta = 0.5  # jsd: the teacher's share of the mixture; blend: the share of reverse_kl
    # blend: share of the steps over which beta rises from 0 to that; 0: it is constant.
    config.loss.beta_ramp = 0.0
    config.loss.top_k = 0  # divergence over the teacher's top-k and a bucket for the rest; 0: over the full vocabulary
    # Nats of a token's divergence above which it counts by its logarithm, which bounds its gradient; 0: no cap.
    config.loss.token_cap = 0.0
    config.loss.temperature = 1.0  # of both distributions
    config.loss.weighting = "dpsw"  # dpsw (w_T * w_S) | teacher (w_T) | student (w_S) | uniform
    config.loss.weight_top_k = 20  # w_T: tokens K in the teacher's entropy H
    config.loss.entropy_scale = "linear"  # w_T: linear (1 - H / log K) | exponential (exp(-H))
    config.loss.student_token = "teacher_argmax"  # w_S: the token whose probability counts: teacher_argmax | sampled
    config.loss.normalize = "mean"  # mean (weights have mean 1 over the batch) | none

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"  # adamw | adafactor (second moments by rows and columns, no first moments)
    config.optimizer.moments_dtype = "float32"  # float32 | bfloat16
    config.optimizer.learning_rate = 1e-5  # peak
    config.optimizer.schedule = "cosine"  # cosine (to a tenth of the peak) | constant
    config.optimizer.warmup_steps = 10
    config.optimizer.adamw = ml_collections.ConfigDict({"b1": 0.9, "b2": 0.95, "eps": 1e-8})
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0  # global norm of the gradient

    config.train = ml_collections.ConfigDict()
    config.train.steps = 300  # 0 only evaluates the model
    # Gradients are added over packs of sequences, which take the memory of this part of a batch at its full length.
    config.train.micro_batches = 1
    config.train.response_tokens = 0  # mean length of a response, for which packs are shaped; 0: not known
    config.train.loss_chunk = 512  # tokens per device whose logits are held at a time
    # A step whose loss or gradient is not finite is skipped: nothing moves, and metrics.jsonl names its queries. This
    # many in a row end the run with an error and without an export.
    config.train.max_skipped = 10
    # So is one whose loss or gradient norm is this many times the median of the last 32 accepted steps; 0: none is.
    config.train.skip_spikes = 0.0
    # Rollouts that collapse (empty, far shorter than at first, endless, or looping) are warned of; True ends the run.
    config.train.stop_on_collapse = False
    # Seconds after which a run ends (exit code 42) in which no process has moved on: a device or a file system hangs.
    config.train.stall_limit = 7200.0  # 0: never
    config.train.log_every = 1  # steps between lines of metrics.jsonl and of trackers
    # Where else the run is shown, any of tensorboard (WORKDIR/tensorboard), wandb, trackio, mlflow: docs/evaluation.md.
    config.train.trackers = ("tensorboard",)
    # Steps, after the first two of a start, that JAX's profiler traces to WORKDIR/profile; 0: none.
    config.train.profile_steps = 0
    config.train.export = True  # write the aligned model to WORKDIR/model, in Hugging Face's layout
    config.train.checkpoints = ml_collections.ConfigDict()
    config.train.checkpoints.every = 100  # steps; the last step is always saved
    config.train.checkpoints.kept = 2
    config.train.completions = ml_collections.ConfigDict()
    config.train.completions.every = 50  # steps between entries of completions.jsonl
    config.train.completions.kept = 4  # responses per entry

    # What is measured before and after training; nothing if path and benchmarks are empty. See docs/evaluation.md.
    config.eval = ml_collections.ConfigDict()
    config.eval.path = ""  # queries of your own, as config.data.path; in summaries they are called "queries"
    config.eval.harmful = "file"  # their label, as config.data.harmful
    config.eval.benchmarks = ()  # any of multijail, xsafety, pku_saferlhf, xstest, mgsm, mmmlu
    config.eval.languages = ("en", "sw")
    # Languages are reported in three groups: source (these), trained (config.data.languages) and unseen (all others).
    config.eval.source_languages = ("en",)
    config.eval.passes = ("greedy",)  # greedy, t1 (sampled at temperature 1)
    config.eval.limit = 0  # the most records of each benchmark; 0 for all
    config.eval.sample = "spread"  # which records: spread (evenly over the file) | first
    config.eval.prompt_limit = 0  # tokens; longer prompts are dropped and counted; 0 for config.prompts.student_limit
    config.eval.batch_size = 32
    config.eval.max_new_tokens = 256  # the reasoning of a thinking model included
    config.eval.weights = "float"  # as config.rollout.weights; int8 measures the quantised model
    # During training, a slice of the evaluation goes into metrics.jsonl, in the first of the passes. If the share of
    # correct answers falls below utility_floor times its value before training, training stops and returns to the last
    # checkpoint at or above that floor. Likewise if the slice's over-refusal rises above over_refusal_ceiling.
    config.eval.monitor = ml_collections.ConfigDict()
    config.eval.monitor.every = 0  # steps between slices; 0 for none
    config.eval.monitor.slice = 16  # prompts of each benchmark, language and label
    config.eval.monitor.utility_floor = 0.0  # 0 never stops
    config.eval.monitor.over_refusal_ceiling = 1.0  # 1 never stops
    # Each benchmark: its file or directory, or hf://OWNER/NAME; its languages and limit if not those above.
    sources = {
        "multijail": "hf://DAMO-NLP-SG/MultiJail",
        "xsafety": "",
        "pku_saferlhf": "hf://PKU-Alignment/PKU-SafeRLHF",
        "xstest": "hf://Paul/XSTest",
        "mgsm": "hf://juletxara/mgsm",
        "mmmlu": "hf://openai/MMMLU",
    }
    for name, path in sources.items():
        config.eval[name] = ml_collections.ConfigDict({"path": path, "languages": (), "limit": 0})

    # A model behind a server, `msd-jax evaluate --server URL --model NAME`: the keys of _requests below. A key is sent
    # where there is one. `request` overrides max_tokens, temperature and top_p.
    config.eval.server = _requests("private", 600.0)

    # When `python -m msd_jax.evaluate --preflight` recommends to train a language.
    config.preflight = ml_collections.ConfigDict()
    config.preflight.min_flip = 0.05  # share of harmful queries: unsafe now, safe with the teacher's prompt
    config.preflight.min_language_match = 0.8  # share of the teacher's responses in the requested language
    config.preflight.max_over_refusal_rise = 0.1  # share of harmless queries that only the teacher refuses

    # What decides whether a response refuses, harms or answers; see docs/judges.md.
    config.judge = ml_collections.ConfigDict()
    config.judge.kind = "rules"  # rules | guard | openai | ensemble
    config.judge.members = ("rules", "guard", "openai")  # ensemble: more than half of them must agree
    # What translates query and response into English for guard and openai: no (nothing) | endpoint (that of
    # config.judge.openai) | model (the one under evaluation).
    config.judge.translate = "no"
    config.judge.translation_tokens = 512  # model: a longer translation fails
    config.judge.guard = ml_collections.ConfigDict()
    config.judge.guard.path = ""  # Hugging Face directory, or hub id, of a guard model
    config.judge.guard.format = "llama_guard"  # llama_guard (3, by its own chat template) | polyguard
    config.judge.guard.instruction = ""  # polyguard: a file with the instruction of the model's card; "" for ours
    config.judge.guard.threshold = 0.5  # the least P(unsafe) that counts as unsafe
    config.judge.guard.limit = 4096  # tokens of the guard's prompt; a longer one stays unjudged
    config.judge.guard.batch_size = 16
    config.judge.guard.dtype = "bfloat16"
    config.judge.openai = ml_collections.ConfigDict()
    config.judge.openai.url = "https://api.openai.com/v1"  # base URL of an OpenAI-compatible API
    config.judge.openai.model = ""
    config.judge.openai.format = "rubric"  # rubric | llama_guard | polyguard (guards that a server runs)
    config.judge.openai.instruction = ""  # rubric, polyguard: a file with another instruction; "" for ours
    # And the keys of _requests below. `request` overrides temperature 0, max_tokens 256 and, for the rubric,
    # response_format json_object.
    config.judge.openai.update(_requests("public", 60.0))

    # Several runs instead of one, see configs/ablation.py: what each variant changes, as in
    # {"name": {"loss": {"weighting": "uniform"}}, ...}, and the number of seeds, starting at config.seed.
    config.ablation = ml_collections.ConfigDict()
    config.ablation.variants = ml_collections.ConfigDict()
    config.ablation.seeds = 1

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 1  # replicas of the weights
    config.mesh.fsdp = -1  # devices that share the weights of a replica; -1 for all that are left
    config.mesh.tensor = 1  # devices that share each matrix product
    # Generation reads every weight for every token: there so many of the devices share attention's heads and the cache,
    # and so many each feed-forward layer and the vocabulary, or all of a slice or machine that has fewer. 0: as tensor,
    # and as rollout_tensor.
    config.mesh.rollout_tensor = 0
    config.mesh.rollout_ffw = 0

    # The hardware that the run is planned for: read by the scripts in launch/ and by msd_jax.plan, not by the run.
    config.launch = ml_collections.ConfigDict()
    config.launch.accelerator = "tpu"  # tpu | gpu
    config.launch.topology = "v5e:2x4"  # TPU slice, as GENERATION:SHAPE
    config.launch.slices = 1  # TPU slices, connected by the data-centre network, which config.mesh.data goes across
    config.launch.nodes = 1  # gpu: machines, joined by a network, which config.mesh.data and then fsdp go across
    config.launch.gpus_per_node = 8  # gpu; 0 for one process per machine on its CPUs
    return config


def _requests(addresses: str, timeout: float) -> ml_collections.ConfigDict:
    """How an OpenAI-compatible server is asked, a judge's or that of a model under evaluation."""
    config = ml_collections.ConfigDict()
    config.key_variable = "OPENAI_API_KEY"  # environment variable that holds the key; "" for none
    # Addresses that may be connected to: public | private (also loopback and private networks, and http) | any (also
    # link-local, where clouds keep credentials).
    config.addresses = addresses
    config.concurrency = 8  # simultaneous requests
    config.timeout = timeout  # seconds to connect, between bytes, and for an answer as a whole
    config.retries = 4  # after 429, 5xx, time-outs and broken connections, with growing pauses
    config.request = ml_collections.ConfigDict()  # added to each request; None removes a key
    config.price_per_million_prompt_tokens = 0.0  # for the reported cost
    config.price_per_million_completion_tokens = 0.0
    return config
