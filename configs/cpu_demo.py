"""SafeGRPO end to end on two CPU cores: no network, no weights, no TPU.

A small Qwen3-VL is trained from nothing on drawn scenes (data/pictograms.py): pretraining on plain questions gives it
eyes and words; the cold start teaches the five-step format with a systematic fault (the combined tag mostly judged from
each modality alone); GRPO with the rule-governed reward then repairs the judgement on the true labels. The vision tower
is frozen in GRPO, and replayed plain questions keep the capability.

    python -m safegrpo_jax.main --config=configs/cpu_demo.py

Arguments: `:full` longer stages on more drawings (about a quarter of an hour), `:tag_only` and `:behavior_only` the
ablations of the reward, `:smoke` a minute of everything that shows nothing but that it runs.
"""

from ml_collections import ConfigDict

from configs import base

LENGTHS = {"": 80, "full": 250, "tag_only": 80, "behavior_only": 80, "smoke": 4}  # GRPO steps


def get_config(arg: str = "") -> ConfigDict:
    if arg not in LENGTHS:
        raise ValueError(f"configs/cpu_demo.py:{arg}: no such argument; one of {', '.join(filter(None, LENGTHS))}")
    config = base.get_config()
    config.mesh.platform = "cpu"
    config.mesh.cpu_devices = 2
    config.mesh.data = 2

    config.model.compute_dtype = "float32"
    config.model.freeze_vision = True
    config.model.remat = False
    config.model.scan_layers = False
    config.model.logits_chunk = 0
    config.model.small = ConfigDict()
    config.model.small.text_width = 128
    config.model.small.text_layers = 3
    config.model.small.text_heads = 4
    config.model.small.text_kv_heads = 2
    config.model.small.text_head_dim = 32
    config.model.small.text_mlp_width = 256
    config.model.small.vision_width = 64
    config.model.small.vision_layers = 3
    config.model.small.vision_heads = 4
    config.model.small.vision_mlp_width = 256
    config.model.small.deepstack_layers = (0, 1)

    config.data.image_size = 64
    config.data.num_pretrain = 10_000
    config.data.num_cold_start = 10_000
    config.data.question_share = 0.2
    config.data.num_train = 2_400
    config.data.num_evaluation = 480
    config.data.or_rule_probability = 0.6  # the cold start's fault, see pictograms.FaultConfig
    # Verdicts turned round at random only hide the fault: with 15% instead of 5% the cold start cannot tell the pairs
    # of an unsafe-looking image apart, and GRPO ends in refusing all of them.
    config.data.combined_flip = 0.05
    config.data.modality_flip = 0.05
    config.data.contradicting_answer = 0.10
    config.data.alarming_word = 0.4

    config.processor.patch_size = 8  # 64 x 64 pixels: 8 x 8 patches, 16 visual tokens
    config.processor.position_table_side = 8
    config.processor.min_pixels = 4_096
    config.processor.max_pixels = 4_096
    config.processor.prompt_buckets = (40, 48)
    config.processor.completion_buckets = (8, 20, 64)
    config.processor.patch_buckets = (64,)  # one image a packing row
    config.processor.instruction = "Think in five steps."

    config.pretrain.num_steps = 900
    config.pretrain.batch_size = 32
    _schedule(config.pretrain.optimizer, 2.5e-3, config.pretrain)
    # Long enough to tell the pairs apart by how often they were marked unsafe: without that GRPO finds no difference to
    # strengthen and settles on "unsafe text or nothing".
    config.cold_start.num_steps = 1_200
    config.cold_start.batch_size = 16
    config.cold_start.checkpoint_every = 300
    _schedule(config.cold_start.optimizer, 2e-3, config.cold_start)
    for stage in (config.pretrain, config.cold_start):  # from nothing, in a thousand steps
        stage.optimizer.beta2, stage.optimizer.weight_decay = 0.98, 0.05

    config.train.num_steps = LENGTHS[arg]
    # Many prompts with few samples each: the balance of safe and unsafe prompts in a step then moves the policy less.
    config.train.prompts_per_step = 48
    config.sampling.group_size = 4
    config.train.replay_batch = 16
    config.train.dump_rollouts_every = 40
    config.loss.replay_weight = 0.3
    config.policy_update.num_minibatches = 2
    _schedule(config.optimizer, 3e-4, config.train)
    config.optimizer.updates_per_step = 2
    config.sampling.max_new_tokens = 64

    config.evaluation.splits = ("test", "compositional", "alarming_benign", "questions")
    config.evaluation.validation_split = "validation"
    config.evaluation.batch_size = 240
    config.evaluation.sampled_records = 240
    config.evaluation.save_rows = 48
    config.evaluation.validate_every = 40
    config.checkpoint.save_every = 20

    match arg:
        case "full":
            config.data.num_pretrain, config.data.num_cold_start, config.data.num_train = 20_000, 12_000, 4_000
            config.pretrain.num_steps, config.cold_start.num_steps = 1_800, 1_500
        case "smoke":
            config.data.num_pretrain = config.data.num_cold_start = config.data.num_train = 200
            config.data.num_evaluation = 48
            config.pretrain.num_steps, config.cold_start.num_steps = 12, 6
            config.evaluation.batch_size, config.evaluation.sampled_records = 48, 48
            config.evaluation.validate_every, config.train.dump_rollouts_every = 2, 2
        case "tag_only":
            config.rewards.tag_weight, config.rewards.behavior_weight = 1.0, 0.0
        case "behavior_only":
            config.rewards.tag_weight, config.rewards.behavior_weight = 0.0, 1.0
    return config


def _schedule(optimizer: ConfigDict, learning_rate: float, stage: ConfigDict) -> None:
    """Warm-up, then a cosine to a tenth: evaluations of the last steps are noisy otherwise.

    References, so that --config.train.num_steps=... moves the schedule too.
    """
    optimizer.learning_rate = learning_rate
    optimizer.schedule = "cosine"
    optimizer.warmup_steps = stage.get_ref("num_steps") // 20
    optimizer.total_steps = stage.get_ref("num_steps")
    optimizer.final_ratio = 0.1
