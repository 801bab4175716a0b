"""Every key of a run with its default: the published SafeGRPO recipe (arXiv 2511.12982).

256 prompts x 8 samples a step at temperature 1, mini-batches of 64 prompts, clip 0.2 with dual clip 3, token mean,
KL coefficient 0.01 with the clamped k3 estimator, AdamW at 1e-6 constant, gradient norm 1. No supervised stage.
The other configs import this one and set only what differs. Sizes here want a TPU slice.
"""

from ml_collections import ConfigDict

from safegrpo_jax.rewards.machines import REFUSAL_KEYWORDS, REFUSAL_PHRASES


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"configs/base.py takes no argument, got {arg!r}")
    config = ConfigDict()
    config.seed = 0
    config.cache_folder = "~/.cache/safegrpo_jax"  # compiled programs and reward tables
    config.tensorboard = True

    config.model = ConfigDict()
    config.model.path = ""  # a Qwen-VL folder; "" is the embedded small model
    config.model.size = ""  # a published size, such as "qwen3-vl-8b", that the folder must hold
    config.model.compute_dtype = "bfloat16"
    config.model.freeze_vision = False  # GRPO trains the vision tower too, as published
    config.model.remat = True
    config.model.scan_layers = True
    config.model.logits_chunk = 512  # tokens whose logits exist at a time
    config.model.attention = "reference"  # "splash" on a TPU
    config.model.experts = "ragged_dot"  # of a mixture: "megablox" on a TPU
    config.model.lora = ConfigDict()
    config.model.lora.rank = 0  # 0 trains the weights themselves, else adapters of this rank
    config.model.lora.alpha = 16.0
    config.model.lora.projections = ("q", "k", "v", "o")  # also gate, up, down
    config.model.lora.vision_projections = ()  # also qkv, proj, fc1, fc2

    config.data = ConfigDict()
    config.data.path = ""  # parquet, JSONL or ArrayRecord of SafeTag records; "" is the embedded pictograms
    config.data.on_bad_row = "raise"  # or "skip": listed in bad_rows.jsonl
    config.data.max_image_pixels = 16_777_216  # checked in the header, before decoding
    config.data.max_image_bytes = 20_000_000

    config.processor = ConfigDict()
    config.processor.patch_size = 16
    config.processor.position_table_side = 48
    config.processor.min_pixels = 65_536
    config.processor.max_pixels = 1_048_576
    config.processor.prompt_buckets = (512, 1024, 2048)
    config.processor.completion_buckets = (512, 1024, 2048, 4096)
    config.processor.patch_buckets = (1024, 2048, 4096)
    config.processor.instruction_file = ""  # a text to use instead of the built-in five-step instruction

    # Supervised stages before GRPO; 0 steps leaves a stage out.
    for stage in ("pretrain", "cold_start"):
        config[stage] = ConfigDict()
        config[stage].num_steps = 0
        config[stage].batch_size = 32
        config[stage].num_microbatches = 1
        config[stage].checkpoint_every = 200
        config[stage].log_every = 10
        config[stage].optimizer = _optimizer(learning_rate=1e-5)

    config.train = ConfigDict()
    config.train.num_steps = 180  # about 15 epochs of SafeTag-VL-3K
    config.train.prompts_per_step = 256
    config.train.replay_batch = 0  # plain questions a step, imitated with loss.replay_weight
    config.train.replay_split = "pretrain"
    config.train.dump_rollouts_every = 10
    config.train.max_resamples = 0  # how often groups of equal rewards are sampled again
    config.train.max_skipped_steps = 3  # broken gradients in a row that stop the run

    config.sampling = ConfigDict()
    config.sampling.group_size = 8
    config.sampling.max_new_tokens = 4096
    config.sampling.temperature = 1.0
    config.sampling.top_k = 0
    config.sampling.top_p = 1.0
    # How they are drawn, in numbers of the whole mesh; changes no token. 0 lets the sampler choose.
    config.sampling.num_slots = 0  # rollouts decoded at a time, an ended one makes room for the next; 0 is all at once
    config.sampling.num_prefixes = 0  # prompts held at a time
    config.sampling.prefill_batch = 0  # prompts prefilled at a time
    config.sampling.decode_chunk = 64  # steps between two looks of the host
    config.sampling.cache_buckets = ()  # sizes that the cache of the completions grows through
    config.sampling.min_slots = 0  # slots are halved down to this once nothing waits and half are idle; 0 never

    config.rewards = ConfigDict()
    config.rewards.rule_set = "reference"  # the published rules; or "strict"
    config.rewards.gate = True
    config.rewards.tag_weight = 0.5
    config.rewards.behavior_weight = 0.5
    config.rewards.refusal_keywords = REFUSAL_KEYWORDS  # reference: one of them anywhere in the answer is a refusal
    config.rewards.refusal_phrases = REFUSAL_PHRASES  # strict: one of them at the head of the answer
    config.rewards.min_help_tokens = 0  # shorter answers are no help
    config.rewards.max_refusal_tokens = 0  # longer answers are no refusal; 0 is no limit
    config.rewards.keyword_rules = ()  # rules of your own, see rewards/rules.py KeywordRule
    config.rewards.anchor_answers = ()  # gold answers of plain questions in the batch, such as ("A", "B", "C", "D")
    config.rewards.overlong_buffer = 0  # the last tokens before max_new_tokens cost up to overlong_penalty
    config.rewards.overlong_penalty = 1.0

    config.advantages = ConfigDict()
    config.advantages.scale = "group"  # "none" is Dr. GRPO
    config.advantages.baseline = "group"  # or "leave_one_out": the mean of the others, as RLOO
    config.advantages.normalize = "total"  # "per_rule" compares each rule alone within the group, as GDPO
    config.advantages.credit = "completion"  # "span" credits the tokens of a tag, or of the answer, with its own rule

    config.loss = ConfigDict()
    config.loss.surrogate = "ppo"  # or "gspo", "cispo"
    config.loss.ratio_anchor = "behavior"  # or "proximal" (one more pass), "policy" (one update per batch)
    config.loss.correction = "none"  # or "truncate", "sequence_mask": weights for a sampler that is not the policy
    config.loss.correction_cap = 2.0
    config.loss.clip_low = 0.2
    config.loss.clip_high = 0.2
    config.loss.clip_dual = 3.0
    config.loss.mask_truncated = False  # True: completions cut off by length train nothing
    config.loss.kl_estimator = "k3"
    config.loss.kl_coefficient = 0.01
    config.loss.kl_in_reward = False
    config.loss.kl_target = 0.0  # > 0: the coefficient adapts to this KL
    config.loss.kl_horizon = 10_000  # in rollouts; how slowly it adapts
    config.loss.entropy_coefficient = 0.0
    config.loss.aggregation = "token_mean"
    config.loss.normalizer = "global"  # "micro" reproduces the published run's normaliser
    config.loss.replay_weight = 0.0

    config.policy_update = ConfigDict()
    config.policy_update.num_minibatches = 4
    config.policy_update.num_epochs = 1
    config.policy_update.num_microbatches = 1

    config.packing = ConfigDict()
    config.packing.row_len = 0  # tokens of a row of several rollouts in score and update; 0 pads each to its own row
    config.packing.rows = 16  # rows of a microbatch, over the whole mesh
    config.packing.share_prompts = False  # True: a prompt is computed once for its responses, in a row or all

    config.optimizer = _optimizer(learning_rate=1e-6)

    config.mesh = ConfigDict()
    config.mesh.platform = ""
    config.mesh.cpu_devices = 0
    config.mesh.data = 1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    config.mesh.expert = 1
    config.mesh.peak_flops = 0.0  # of one device, such as 275e12 (v4); 0 logs no estimate of its use
    config.mesh.sampling_tensor = 0  # parts of heads and mlp while sampling; 0 is `tensor`
    config.sharding = ConfigDict()  # the mesh axis that each logical axis of the parameters is spread over
    config.sharding.vocab = "tensor"
    config.sharding.width = "fsdp"
    config.sharding.heads = "tensor"
    config.sharding.kv_heads = "tensor"
    config.sharding.mlp = "tensor"
    config.sharding.experts = "expert"
    config.sharding.vision_width = "fsdp"
    config.sharding.vision_heads = "tensor"

    config.evaluation = ConfigDict()
    config.evaluation.splits = ("test",)
    config.evaluation.batch_size = 64
    config.evaluation.sampled_records = 64
    config.evaluation.save_rows = 64
    config.evaluation.validate_every = 10
    config.evaluation.validation_split = "test"

    config.checkpoint = ConfigDict()
    config.checkpoint.save_every = 10
    config.checkpoint.keep_last = 2
    return config


def _optimizer(learning_rate: float) -> ConfigDict:
    optimizer = ConfigDict()
    optimizer.method = "adamw"  # or "adafactor": no momentum, second moments of rows and columns alone
    optimizer.learning_rate = learning_rate
    optimizer.schedule = "constant"  # or "linear", "cosine" down to final_ratio at total_steps
    optimizer.warmup_steps = 0
    optimizer.total_steps = 0
    optimizer.final_ratio = 0.0
    optimizer.updates_per_step = 1  # optimizer updates per schedule step
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.999
    optimizer.weight_decay = 0.01
    optimizer.clip_norm = 1.0
    return optimizer
