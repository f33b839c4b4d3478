"""Every key of the configuration with its default; recipes start from here and change what they need.

python -m msd_jax.main --config configs/default.py --workdir DIR \
    --config.model.path=HF_DIR_OR_HUB_ID --config.data.path=QUERIES.csv
"""

import ml_collections

from msd_jax.data import prompts


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0

    # The model to align; it is its own teacher.
    config.model = ml_collections.ConfigDict()
    config.model.path = ""  # Hugging Face directory, or hub id (owner/name)
    config.model.param_dtype = "float32"  # of the trained weights
    config.model.dtype = "float32"  # of matrix products; bfloat16 on TPU and GPU. See docs/method.md, Precision
    # auto: a kernel for the platform (cudnn on GPUs in bfloat16, splash on TPUs) where shapes allow, else xla | xla
    config.model.attention = "auto"
    config.model.remat = "full"  # what the backward pass keeps of each layer: none | dots | full (nothing)
    config.model.freeze_embeddings = False  # also freezes the head where it is tied
    # Low-rank adapters: they alone are trained, and the frozen teacher is the base itself.
    config.model.lora = ml_collections.ConfigDict()
    config.model.lora.rank = 0  # 0 trains all weights
    config.model.lora.alpha = 32.0  # the update is scaled by alpha / rank
    config.model.lora.targets = ("query", "key", "value", "output", "gate", "up", "down")
    config.model.lora.base_dtype = "bfloat16"  # of the weights that are not trained

    # Parallel queries; no responses are needed. See docs/data.md.
    config.data = ml_collections.ConfigDict()
    config.data.path = ""  # .jsonl, .csv or .parquet (one column a language), a folder, or hf://OWNER/NAME[/PATH]
    config.data.tfds = ""  # in place of path: a TFDS set, as in parallel_queries:1.0.0
    config.data.split = "train"  # of tfds
    config.data.data_dir = ""  # of tfds; "" for TFDS_DATA_DIR, or ~/tensorflow_datasets
    config.data.harmful = "file"  # label of records that carry none: file (stays unknown) | true | false
    # Several sources in place of path and tfds, each with any of the five keys above and its weight, which is its share
    # of the stream whatever its size: {"multijail": {"path": "hf://DAMO-NLP-SG/MultiJail", "weight": 3.0}, ...}.
    config.data.sources = ml_collections.ConfigDict()
    config.data.harmful_share = -1.0  # of harmful queries in the stream, 0 to 1; -1 for queries as they come
    # Share of the queries that both roles are shown in the source language, as a user writes them: a frozen teacher
    # holds the student to the initial model there. 0 for none; below 1.
    config.data.retain_fraction = 0.0
    # Queries that are (nearly) queries of the evaluation in some language: report | drop. Either way they are counted,
    # and listed in WORKDIR/near_duplicates.jsonl.
    config.data.near_duplicates = "report"
    config.data.source_language = "en"  # what the teacher reads
    # Languages to align, with their sampling weights. A user's own config replaces the whole mapping.
    config.data.languages = ml_collections.ConfigDict({"sw": 1.0})
    config.data.batch_size = 32  # queries a step, over all devices
    # Queries of so many batches are sorted by length before they are split, which saves padding; 1 leaves their order.
    # Where a language takes many more tokens than the others, its queries then tend to share batches.
    config.data.length_window = 8

    config.prompts = ml_collections.ConfigDict()
    # instruction: the teacher is told to think about safety, silently; generated: it first writes an analysis,
    # greedily, which is kept with the query (needs a frozen teacher); none: it is told to reply and no more.
    config.prompts.cot = "instruction"
    config.prompts.plain_template = prompts.DEFAULT_PLAIN_TEMPLATE  # of none
    config.prompts.analysis_template = prompts.DEFAULT_ANALYSIS_TEMPLATE  # of generated: {query}
    config.prompts.reply_template = prompts.DEFAULT_REPLY_TEMPLATE  # of generated, after the analysis: {language}
    config.prompts.analysis_tokens = 128  # of generated: how long an analysis may be
    config.prompts.teacher_template = prompts.DEFAULT_TEACHER_TEMPLATE  # with {query} and {language}
    config.prompts.student_system = ""  # system message, "" for none; each role has its own
    config.prompts.teacher_system = ""
    config.prompts.student_limit = 512  # tokens; longer prompts are dropped and counted
    config.prompts.teacher_limit = 1024
    # Passed to the tokenizer's chat template; thinking modes (Qwen3) are off in both roles.
    config.prompts.student_template_kwargs = ml_collections.ConfigDict({"enable_thinking": False})
    config.prompts.teacher_template_kwargs = ml_collections.ConfigDict({"enable_thinking": False})

    config.teacher = ml_collections.ConfigDict()
    config.teacher.kind = "frozen"  # frozen (initial weights) | live (the student's own) | ema | periodic
    config.teacher.ema_decay = 0.95  # teacher = decay * teacher + (1 - decay) * student, after each step
    config.teacher.period = 50  # steps between copies of the student into a periodic teacher

    # Where the response tokens come from. The model's own generation_config gives stop tokens, nothing else.
    config.rollout = ml_collections.ConfigDict()
    config.rollout.policy = "on_policy"  # on_policy (student samples) | off_policy (teacher samples) | mixed
    config.rollout.on_policy_fraction = 0.5  # mixed: probability that a query is sampled from the student
    config.rollout.max_new_tokens = 256
    config.rollout.temperature = 1.0  # 0 is greedy
    config.rollout.top_k = 0  # keep the k most probable tokens; 0 keeps all
    config.rollout.top_p = 1.0  # keep the smallest set of tokens with this probability
    # off_policy, mixed: draw the teacher's response once a query and keep it. Needs a frozen teacher.
    config.rollout.reuse_teacher_responses = True

    config.loss = ml_collections.ConfigDict()
    # reverse_kl: KL(student || teacher); forward_kl: KL(teacher || student); jsd; auto: reverse_kl for
    # responses of the student (on_policy, mixed), forward_kl for responses of the teacher (off_policy);
    # cross_entropy: of the response's tokens; off_policy with uniform weights, fine-tuning on the teacher's replies.
    config.loss.divergence = "auto"
    config.loss.beta = 0.5  # of jsd
    config.loss.top_k = 0  # restrict the divergence to the teacher's top-k and a tail bucket; 0: full vocabulary
    config.loss.temperature = 1.0  # of both distributions in the loss
    config.loss.weighting = "dpsw"  # dpsw (w_T * w_S) | teacher (w_T) | student (w_S) | uniform
    config.loss.weight_top_k = 20  # tokens in the teacher's entropy
    config.loss.student_token = "teacher_argmax"  # token of the student's perspective: teacher_argmax | sampled
    config.loss.normalize = "mean"  # mean (weights have mean 1 over the batch) | none

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"  # adamw | adafactor (rows and columns of second moments, no first ones)
    config.optimizer.moments_dtype = "float32"  # what they are kept in: float32 | bfloat16
    config.optimizer.learning_rate = 1e-5  # peak
    config.optimizer.schedule = "cosine"  # cosine (to final_fraction of the peak) | constant
    config.optimizer.warmup_steps = 10
    config.optimizer.final_fraction = 0.1
    config.optimizer.b1 = 0.9  # b1, b2 and eps are adamw's
    config.optimizer.b2 = 0.95
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0  # global norm of the gradient

    config.train = ml_collections.ConfigDict()
    config.train.steps = 300  # 0 evaluates the model as it comes
    config.train.micro_batches = 1  # gradient accumulation: parts that a batch is split into
    config.train.loss_chunk = 512  # tokens a device whose logits are held at a time
    # A step whose loss or gradient is not finite is skipped: nothing moves, and metrics.jsonl names its queries. This
    # many in a row end the run with an error and without an export.
    config.train.max_skipped = 10
    # Rollouts that collapse (empty, far shorter than at first, endless, or looping) are warned of; True ends the run.
    config.train.stop_on_collapse = False
    config.train.checkpoint_every = 100  # steps; the last step is always saved
    config.train.checkpoints_kept = 2
    config.train.log_every = 1  # steps between lines of metrics.jsonl and TensorBoard
    config.train.completions_every = 50  # steps between entries of completions.jsonl
    config.train.completions_kept = 4  # responses an entry
    config.train.export = True  # write the aligned model to WORKDIR/model in Hugging Face's layout

    # What is measured before and after; nothing where path and benchmarks are empty. See docs/evaluation.md.
    config.eval = ml_collections.ConfigDict()
    config.eval.path = ""  # a query file of yours, as config.data.path; in summaries it is called "queries"
    config.eval.harmful = "file"
    config.eval.benchmarks = ()  # any of multijail, xsafety, pku_saferlhf, xstest, mgsm, mmmlu
    # Languages are reported in three groups: source (these), trained (data.languages), unseen (all others).
    config.eval.languages = ("en", "sw")
    config.eval.source_languages = ("en",)
    config.eval.passes = ("greedy",)  # greedy, t1 (sampled at temperature 1)
    config.eval.limit = 0  # use at most so many records of each; 0 for all
    config.eval.sample = "spread"  # which they are: spread (evenly over the file) | first
    config.eval.prompt_limit = 0  # tokens, longer prompts are dropped and counted; 0 for prompts.student_limit
    config.eval.batch_size = 32
    config.eval.max_new_tokens = 256
    # While training: every so many steps (0: never) a slice, so many prompts of each benchmark, language and label, is
    # evaluated in the first of the passes, into metrics.jsonl. Where the share of right answers falls below
    # utility_floor times what it was before training, training ends and goes back to the last checkpoint that holds
    # the floor; with 0 it never does.
    config.eval.every = 0
    config.eval.slice = 16
    config.eval.utility_floor = 0.0
    # Likewise where the slice's over-refusal rises above this share; with 1 it never does.
    config.eval.over_refusal_ceiling = 1.0
    # Each benchmark's file or directory, or hf://OWNER/NAME; its languages and its limit, where they are not eval's.
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

    # When `python -m msd_jax.evaluate --preflight` says go in a language.
    config.preflight = ml_collections.ConfigDict()
    config.preflight.min_flip = 0.05  # share of harmful queries: unsafe now, safe with the teacher's prompt
    config.preflight.min_language_match = 0.8  # share of the teacher's responses in the language asked for
    config.preflight.max_over_refusal_rise = 0.1  # harmless queries that the teacher refuses beyond the student

    # Who says whether a response refuses, harms or answers; see docs/judges.md.
    config.judge = ml_collections.ConfigDict()
    config.judge.kind = "rules"  # rules | guard | openai | ensemble
    config.judge.members = ("rules", "guard", "openai")  # of an ensemble; more than half of them must agree
    # Show guard and openai an English translation of query and response, made by: no | endpoint (of judge.openai) |
    # model (the one that is evaluated).
    config.judge.translate = "no"
    config.judge.translation_tokens = 512  # model: a translation that is longer fails
    config.judge.guard = ml_collections.ConfigDict()
    config.judge.guard.path = ""  # Hugging Face directory, or hub id, of a guard model
    config.judge.guard.format = "llama_guard"  # llama_guard (3, by its own chat template) | polyguard
    config.judge.guard.instruction = ""  # polyguard: a file with the instruction of the model's card; "": our wording
    config.judge.guard.threshold = 0.5  # unsafe from this P(unsafe) on
    config.judge.guard.limit = 4096  # tokens of the guard's prompt; what is longer stays unjudged
    config.judge.guard.batch_size = 16
    config.judge.guard.dtype = "bfloat16"
    config.judge.openai = ml_collections.ConfigDict()
    config.judge.openai.url = "https://api.openai.com/v1"  # base of any OpenAI-compatible API
    config.judge.openai.model = ""
    config.judge.openai.format = "rubric"  # rubric | llama_guard | polyguard (guards that a server runs)
    config.judge.openai.instruction = ""  # rubric, polyguard: a file with another instruction; "": ours
    config.judge.openai.key_variable = "OPENAI_API_KEY"  # environment variable that holds the key; "" for none
    # Addresses that may be connected to: public | private (loopback and private networks too, and http) | any
    # (link-local too, at which clouds keep credentials).
    config.judge.openai.addresses = "public"
    config.judge.openai.concurrency = 8  # requests at a time
    config.judge.openai.timeout = 60.0  # seconds to connect, between bytes, and for an answer as a whole
    config.judge.openai.retries = 4  # after 429, 5xx, time-outs and broken connections, with growing pauses
    # Added to each request, over temperature 0, max_tokens 256 and, for the rubric, response_format json_object; what
    # is None is left out.
    config.judge.openai.request = ml_collections.ConfigDict()
    config.judge.openai.price_per_million_prompt_tokens = 0.0  # for the cost that is told
    config.judge.openai.price_per_million_completion_tokens = 0.0

    # Several runs in place of one, see configs/ablation.py: what each changes, as in
    # {"name": {"loss": {"weighting": "uniform"}}, ...}, and the number of seeds, from config.seed on.
    config.ablation = ml_collections.ConfigDict()
    config.ablation.variants = ml_collections.ConfigDict()
    config.ablation.seeds = 1

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 1  # replicas of the weights
    config.mesh.fsdp = -1  # devices that share one replica's weights; -1 takes all that are left
    config.mesh.tensor = 1  # devices that share each matrix product

    # What the run is planned for: read by the scripts in launch/ and by msd_jax.plan, never by the run itself.
    config.launch = ml_collections.ConfigDict()
    config.launch.accelerator = "tpu"  # tpu | gpu
    config.launch.topology = "v5e:2x4"  # TPU slice as XLA's compiler names it, see msd_jax/topology.py; "" for gpu
    config.launch.slices = 1  # TPU slices joined over the data-centre network; config.mesh.data goes across them
    config.launch.nodes = 1  # gpu: machines
    config.launch.gpus_per_node = 8  # gpu; 0 runs one process on the CPUs of each machine
    return config
