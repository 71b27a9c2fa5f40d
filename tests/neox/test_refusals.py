"""Runs that GPT-NeoX cannot do are refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.neox.training import settings

TRAIN = {"user_script": "train.py"}
ADAM = {"type": "Adam", "params": {"lr": 1e-3}}
BFLOAT16 = {"precision": "bfloat16"}
FP16 = {"precision": None, "distributed_backend": "nccl"}
ZERO_2 = {"zero_optimization": {"stage": 2}}
HYBRID = ["metala", "global"]
DOCUMENTS = {"reset_at_document": True}
UNCONDITIONAL = {"user_script": "generate.py", "text_gen_type": "unconditional"}
CONTEXT = {"context_parallel_size": 2}
SEQUENCE = {"sequence_parallel": True, "model_parallel_size": 2, "global_num_gpus": 2}


def optimizer(kind: str) -> dict:
    return {"optimizer": {**ADAM, "type": kind}}


def extra(**settings) -> dict:
    return {"deepspeed_extra_args": settings}


def paths(*kinds: tuple[str, str]) -> dict:
    """Data sets of each part, whose files need not exist here."""
    return {f"{sign}{p}{kind}_data_paths": ["x"] for sign, kind in kinds for p in PARTS}


PARTS = ("train", "valid", "test")
BLEND = {"data_path": None, **paths(("", ""))}
UNPACKED = {"data_path": None, "pack_impl": "unpacked", "load": "x", "finetune": True}
DATA = {"data_path": None, **paths(("", ""), ("", "_label"))}
PAIRS = {
    **UNPACKED,
    "train_impl": "dpo",
    "dataset_impl": "pairwise",
    **paths(("pos_", ""), ("pos_", "_label"), ("neg_", ""), ("neg_", "_label")),
}
REWARDS = {**PAIRS, "train_impl": "rm"}
KTO = {**DATA, **UNPACKED, "train_impl": "kto", **paths(("", "_reward"))}
NO_LABELS = {"pos_test_label_data_paths": None}
REFUSED = [
    # a choice in another case, which GPT-NeoX accepts and then does not know
    ({"precision": "bf16"}, "precision: found 'bf16', wanted 'fp16' or 'fp32' or 'bfloat16'"),
    ({"lr_decay_style": "Cosine"}, "lr_decay_style: found 'Cosine'"),
    ({"pos_emb": "Rotary"}, "pos_emb: found 'Rotary'"),
    ({"checkpoint_scale": "Log"}, "checkpoint_scale: found 'Log'"),
    # a type
    ({"rms_norm_epsilon": "1e-6"}, "rms_norm_epsilon: found '1e-6', wanted a number ("),
    ({"num_layers": 2.0}, "num_layers: found 2.0, wanted a whole number"),
    ({"num_layers": None}, "num_layers: found None, wanted a whole number"),
    ({"hidden_size": None}, "hidden_size: found None, wanted a whole number"),
    ({"num_workers": True}, "num_workers: found True, wanted a whole number"),
    ({"use_wandb": "yes"}, "use_wandb: found 'yes', wanted true or false"),
    ({"attention_config": "metala"}, "attention_config: found 'metala', wanted a list"),
    ({"checkpoint_factor": "5"}, "checkpoint_factor: found '5', wanted a whole number or a number"),
    (
        {"optimizer": {"type": "Adam", "params": {"lr": "6e-4"}}},
        "optimizer.params.lr: found '6e-4', wanted a number (",
    ),
    (
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": "5e8"}},
        "zero_optimization.reduce_bucket_size: found '5e8', wanted a number",
    ),
    ({"weight_decay": float("nan")}, "weight_decay: found nan, wanted a finite number"),
    # a range
    ({"rms_norm_epsilon": -1e-6}, "rms_norm_epsilon: found -1e-06, wanted above 0"),
    ({"seq_length": 0}, "seq_length: found 0, wanted at least 1"),
    ({"seq_length": None}, "seq_length: found None, wanted"),
    ({"train_iters": -1}, "train_iters: found -1, wanted at least 1"),
    ({"train_iters": None}, "train_iters: found None, wanted the number of steps"),
    ({"eval_interval": 0}, "eval_interval: found 0, wanted at least 1"),
    ({"log_interval": None}, "log_interval: found None, wanted at least 1"),
    ({"hidden_dropout": 1.0}, "hidden_dropout: found 1.0, wanted from 0 to below 1"),
    (
        {"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1.0]}}},
        "optimizer.params.betas: found [0.9, 1.0]",
    ),
    # no optimizer, or none that GPT-NeoX knows
    ({"optimizer": None}, "optimizer: found None, wanted a mapping of type and params"),
    ({"optimizer": {"type": "Adam"}}, "optimizer.params: found None, wanted a mapping"),
    ({"optimizer": {**ADAM, "type": "AdamW"}}, "optimizer.type: found 'AdamW', wanted adam or"),
    # what GPT-NeoX ends with a printed line and exit code 0
    (
        {"zero_optimization": {"stage": 2}, "pipe_parallel_size": 1},
        "zero_optimization.stage: found 2, wanted 0 or 1 with pipe_parallel_size = 1",
    ),
    (
        {"zero_optimization": {"stage": 3}, "pipe_parallel_size": 2, "global_num_gpus": 2},
        "zero_optimization.stage: found 3, wanted 0 or 1 with pipe_parallel_size = 2",
    ),
    (
        {"zero_optimization": {"stage": 3}, "model_parallel_size": 2, "global_num_gpus": 2},
        "zero_optimization.stage: found 3, wanted 0 or 1 with model_parallel_size = 2",
    ),
    # tracebacks on the ranks
    ({"zero_optimization": {}}, "zero_optimization.stage: found None, wanted 0, 1, 2 or 3"),
    (
        {"precision": "bfloat16", "data_types": {"grad_accum_dtype": "fp32"}},
        "data_types.grad_accum_dtype: found 'fp32', wanted bf16",
    ),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype: found 'bf16'"),
    ({"data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype: found 'bf16', wanted fp32"),
    (
        {**BFLOAT16, **ZERO_2, "data_types": {"grad_accum_dtype": "fp16"}},
        "data_types.grad_accum_dtype: found 'fp16', wanted bf16 or fp32",
    ),
    # weights in 16 bits, or another precision than the settings say
    ({**BFLOAT16, "bf16": {"enabled": False}}, "bf16.enabled: found False, wanted true with prec"),
    ({**BFLOAT16, "bf16": {"immediate_grad_update": True}}, "bf16.enabled: found None, wanted"),
    (
        {**BFLOAT16, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        "bf16.bf16_master_weights_and_grads: found True, wanted false: weights in 16 bits lose",
    ),
    ({"amp": {"enabled": False}}, "amp: found {'enabled': False}, wanted none, but precision"),
    (extra(bf16={"enabled": True}), "deepspeed_extra_args.bf16: found {'enabled': True}, wanted"),
    ({"flops_profiler": {"enable": True}}, "flops_profiler.enable: found a key that nothing reads"),
    ({"csv_monitor": {"path": "x"}}, "csv_monitor.path: found a key that nothing reads, wanted"),
    ({"wandb": {"projekt": "x"}}, "wandb.projekt: found a key that nothing reads, wanted project"),
    (extra(flops_profiller={}), "deepspeed_extra_args.flops_profiller: found a key that nothing"),
    (extra(torch_autocast={}), "deepspeed_extra_args.torch_autocast: found {}, wanted none, but"),
    (extra(zero_optimization={}), "deepspeed_extra_args.zero_optimization: found {}, wanted none"),
    (
        {**extra(communication_data_type="bf16"), "fp32_allreduce": True},
        "deepspeed_extra_args.communication_data_type: found 'bf16', wanted fp32 with fp32_",
    ),
    ({"communication_data_type": True}, "communication_data_type: found True, wanted none"),
    # DeepSpeed's optimizers of 16 bits and ZeRO
    ({**FP16, "precision": "fp16"}, "zero_optimization.stage: found 0, wanted 1, 2 or 3 with prec"),
    ({**FP16, "fp16": {"enabled": True}}, "zero_optimization.stage: found 0, wanted 1, 2 or 3"),
    (optimizer("OneBitAdam"), "optimizer.type: found 'OneBitAdam', wanted another: DeepSpeed no"),
    ({**optimizer("madgrad_wd"), **ZERO_2}, "optimizer.type: found 'madgrad_wd', wanted adam or"),
    (
        {**optimizer("sm3"), **BFLOAT16, "pipe_parallel_size": 1},
        "optimizer.type: found 'sm3', wanted another in bfloat16 with pipe_parallel_size = 1",
    ),
    ({**optimizer("lion"), **ZERO_2}, "optimizer.type: found 'lion', wanted adam on the CPU"),
    (
        {"optimizer": {**ADAM, "params": {"weight_decay": 0.0}}},
        "optimizer.params.weight_decay: found 0.0, wanted none, but weight_decay outside optimizer",
    ),
    ({"optimizer": {**ADAM, "params": {}}}, "optimizer.params.lr: found None, wanted a number"),
    (
        {"optimizer": {**ADAM, "params": {"lr": 1e-3, "betas": [0.9]}}},
        "optimizer.params.betas: found [0.9], wanted two numbers",
    ),
    # keys inside mappings
    (
        {"optimizer": {**ADAM, "learning_rate": 1e-3}},
        "optimizer.learning_rate: found a key that nothing reads, wanted none, or one of params, t",
    ),
    (
        {"optimizer": {**ADAM, "params": {"lr": 1e-3, "beta": [0.9, 0.95]}}},
        "optimizer.params.beta: found a key that nothing reads, wanted betas",
    ),
    (
        {"zero_optimization": {"stage": 1, "reduce_bukket_size": 1}},
        "zero_optimization.reduce_bukket_size: found a key that nothing reads, wanted reduce_",
    ),
    (
        {**BFLOAT16, "data_types": {"grad_acum_dtype": "fp32"}},
        "data_types.grad_acum_dtype: found a key that nothing reads, wanted grad_accum_dtype",
    ),
    (
        {"fp16": {"loss_scal": 1}},
        "fp16.loss_scal: found a key that nothing reads, wanted loss_scal",
    ),
    # data
    ({**TRAIN, "split": "1,-1,1"}, "split: found '1,-1,1', wanted three numbers of at least 0"),
    ({**TRAIN, "split": "90 5 5"}, "split: found '90 5 5', wanted three numbers of at least 0"),
    ({**TRAIN, "split": None}, "split: found None, wanted three numbers of at least 0"),
    ({**TRAIN, "data_impl": None}, "data_impl: found None, wanted infer, mmap or cached"),
    ({**TRAIN, "data_path": None}, "data_path: found None, wanted a data set to train on"),
    ({"train_epochs": 1}, "train_epochs: found 1, wanted none beside train_iters = 20"),
    ({"z_loss": 0.1}, "z_loss: found 0.1, wanted 0 without train_impl: rm"),
    ({"log_dir": "/proc/none"}, "log_dir: found /proc/none, wanted a folder that can be written"),
    # paths that a shell would replace, and weights that are ignored or wrong
    ({"save": "~/run", "checkpoint_factor": 1}, "save: found '~/run', wanted a path in full: GPT"),
    ({"log_dir": "$HOME/logs"}, "log_dir: found '$HOME/logs', wanted a path in full: GPT-NeoX"),
    (
        {"data_path": None, **paths(("", "")), "test_data_paths": ["a", "${SCRATCH}/b"]},
        "test_data_paths: found '${SCRATCH}/b', wanted a path in full: GPT-NeoX takes",
    ),
    (
        {"weight_by_num_documents": True},
        "weight_by_num_documents: found True, wanted false, and tr",
    ),
    ({"train_data_weights": [1.0]}, "train_data_weights: found [1.0], wanted none without train_d"),
    (
        {**BLEND, "valid_data_weights": [1.0, 1.0]},
        "valid_data_weights: found [1.0, 1.0], wante",
    ),
    (
        {
            **BLEND,
            "train_data_paths": ["a", "b"],
            "train_data_weights": [1.0, 2.0],
            "train_iters": None,
            "train_epochs": 1,
        },
        "train_data_weights: found [1.0, 2.0], wanted none with train_epochs",
    ),
    ({**BLEND, "test_data_weights": [-1.0]}, "test_data_weights: found [-1.0], wanted weights of"),
    # numbers of a part of the model, or of a rank that reads nothing
    (
        {"log_param_norm": True, "model_parallel_size": 2},
        "log_param_norm: found True, wanted fals",
    ),
    (
        {"log_param_norm": True, "zero_optimization": {"stage": 3}},
        "log_param_norm: found True, wanted false with tensor parallelism or ZeRO 3",
    ),
    (
        {"char_level_ppl": True, "model_parallel_size": 2},
        "char_level_ppl: found True, wanted fals",
    ),
    ({"train_impl": "reinforce"}, "train_impl: found 'reinforce', wanted normal, dpo, kto or rm"),
    ({"curriculum_learning": {"enabled": True}}, "curriculum_learning: found"),
    ({"soft_prompt_tuning": {"enabled": True}}, "soft_prompt_tuning: found"),
    ({"log_gradient_noise_scale": True}, "log_gradient_noise_scale: found True, wanted false"),
    ({"log_grad_norm": True}, "log_grad_norm: found True, wanted false"),
    ({"log_optimizer_states": True}, "log_optimizer_states: found True, wanted false"),
    (
        {**UNCONDITIONAL, "return_logits": True, "optimizer": None},
        "return_logits: found True, wanted false",
    ),
    (
        {"user_script": "generate.py", "text_gen_type": "input_file"},
        "text_gen_type: found 'input_file', wanted unconditional or input-file or interactive",
    ),
    (
        {"user_script": "generate.py", "text_gen_type": "precompute"},
        "text_gen_type: found 'precompute', wanted unconditional or input-file or interactive",
    ),
    (
        {"user_script": "generate.py", "text_gen_type": "input-file"},
        "sample_input_file: found None, wanted a file with prompts",
    ),
    (
        {**UNCONDITIONAL, "seq_length": 128, "maximum_tokens": 129},
        "maximum_tokens: found 129, wanted at most seq_length, which is 128: GPT-NeoX ends a text",
    ),
    (
        {**UNCONDITIONAL, "sample_output_file": "/nowhere/samples.txt"},
        "sample_output_file: found '/nowhere/samples.txt', wanted a file in a folder that exists",
    ),
    # wrong texts: GPT-NeoX has no cache there, or one without positions
    (
        {**UNCONDITIONAL, "attention_config": [[["metala", "gmlp"], 1]]},
        "recompute: found False, wanted true: GPT-NeoX caches nothing in layers of type gmlp",
    ),
    (
        {**UNCONDITIONAL, "attention_config": HYBRID, "pos_emb": "sinusoidal"},
        "recompute: found False, wanted true with pos_emb: sinusoidal: GPT-NeoX's cache loses",
    ),
    (
        {
            **UNCONDITIONAL,
            "attention_config": HYBRID,
            "pos_emb": "learned",
            "pipe_parallel_size": 1,
        },
        "recompute: found False, wanted true with pos_emb: learned and pipe_parallel_size above 0",
    ),
    ({"user_script": "eval.py"}, "eval_tasks: found None, wanted names of tasks of lm_eval"),
    ({"eval_tasks": ["a.yaml"]}, "eval_tasks: found 'a.yaml', wanted a file that exists"),
    (
        {"user_script": "train.py", "tokenizer_type": "GPT2BPETokenizer"},
        "merge_file: found None, wanted",
    ),
    ({**TRAIN, "tokenizer_type": None}, "tokenizer_type: found None, wanted"),
    ({"user_script": "train.py", "vocab_file": None}, "vocab_file: found None, wanted"),
    ({"profile": True}, "profile: found True, wanted false on the CPU"),
    ({"memory_profiling": True}, "memory_profiling: found True, wanted false on the CPU"),
    (
        {"profile": True, "distributed_backend": "nccl"},
        "tensorboard_dir: found None, wanted a folder for the traces of profile: true",
    ),
    # layers that cannot run
    (
        {"attention_config": ["metala", "gmlp"]},
        "attention_config: found 'gmlp', wanted another type: GPT-NeoX's own ends in an error",
    ),
    (
        {"attention_config": ["bigbird", "metala"]},
        "attention_config: found 'bigbird', wanted another type, or the package deepspeed.ops",
    ),
    # honoured in some layouts alone
    (
        {"attention_config": HYBRID, "sliding_window_width": 8},
        "sliding_window_width: found 8, wanted none with layers of type global",
    ),
    (
        {"attention_config": ["metala", "flash"], "metala": DOCUMENTS},
        "metala.reset_at_document: found True, wanted false with layers of type flash",
    ),
    (
        {
            "attention_config": HYBRID,
            "metala": DOCUMENTS,
            "scaled_upper_triang_masked_softmax_fusion": True,
        },
        "metala.reset_at_document: found True, wanted false with scaled_upper_triang",
    ),
    ({"metala": {"reset_at_document": 1}}, "metala.reset_at_document: found 1, wanted true or"),
    # sequences that cannot be split over ranks
    (
        {"metala": {"context_parallel_size": 3}},
        "metala.context_parallel_size: found 3, wanted a divisor of seq_length = 64 that leaves",
    ),
    (
        {"metala": {"context_parallel_size": 32}},
        "metala.context_parallel_size: found 32, wanted a divisor of seq_length = 64 that leaves",
    ),
    (
        {"metala": CONTEXT, "attention_config": HYBRID},
        "metala.context_parallel_size: found 2, wanted 1 with layers of type global",
    ),
    (
        {"metala": CONTEXT, "user_script": "generate.py", "optimizer": None},
        "metala.context_parallel_size: found 2, wanted 1 in generate.py",
    ),
    (
        {"metala": CONTEXT, "model_parallel_size": 2, "global_num_gpus": 6},
        "metala.context_parallel_size: found 2, wanted a divisor of the 3 data-parallel ranks",
    ),
    (
        {"metala": CONTEXT, "eval_tasks": ["piqa"]},
        "eval_tasks: found ['piqa'], wanted none with metala.context_parallel_size = 2",
    ),
    (
        {**SEQUENCE, "user_script": "generate.py", "optimizer": None},
        "sequence_parallel: found True, wanted false in generate.py: GPT-NeoX cannot gather",
    ),
    (
        {**SEQUENCE, "eval_tasks": ["piqa"]},
        "sequence_parallel: found True, wanted false with eval_tasks",
    ),
    (
        {**SEQUENCE, "attention_config": ["metala", "mamba"]},
        "sequence_parallel: found True, wanted false with layers of type mamba",
    ),
    (
        {**SEQUENCE, "partition_activations": True},
        "sequence_parallel: found True, wanted false with partition_activations",
    ),
    (
        {**SEQUENCE, "attention_config": HYBRID, "use_qk_layernorm": True},
        "sequence_parallel: found True, wanted false with use_qk_layernorm",
    ),
    (
        {**SEQUENCE, "seq_length": 63},
        "sequence_parallel: found True, wanted false with seq_length = 63: 2 ranks cannot",
    ),
    # preferences and padded documents
    (
        {"train_impl": "rm", "user_script": "generate.py", "optimizer": None},
        "train_impl: found 'rm', wanted normal in generate.py",
    ),
    ({"train_impl": "dpo"}, "dataset_impl: found 'gpt2', wanted pairwise with train_impl: dpo"),
    ({"dataset_impl": "online"}, "dataset_impl: found 'online', wanted gpt2 with train_impl"),
    ({"precompute_model_name": "x"}, "precompute_model_name: found 'x', wanted none"),
    ({**PAIRS, "data_path": "x"}, "data_path: found 'x', wanted none with train_impl: dpo"),
    ({"pos_train_data_paths": ["x"]}, "pos_train_data_paths: found ['x'], wanted none with"),
    ({**PAIRS, "pipe_parallel_size": 1}, "pipe_parallel_size: found 1, wanted 0 with train_impl"),
    ({**PAIRS, "metala": CONTEXT}, "metala.context_parallel_size: found 2, wanted 1 with train"),
    ({**PAIRS, **SEQUENCE}, "sequence_parallel: found True, wanted false with train_impl: dpo"),
    (
        {**PAIRS, "zero_optimization": {"stage": 3}},
        "zero_optimization.stage: found 3, wanted 0, 1 or 2 with train_impl: dpo",
    ),
    ({**REWARDS, "eval_tasks": ["piqa"]}, "eval_tasks: found ['piqa'], wanted none with train"),
    ({**REWARDS, "no_weight_tying": False}, "no_weight_tying: found False, wanted true with"),
    ({**REWARDS, "eod_mask_loss": True}, "eod_mask_loss: found True, wanted false with train"),
    ({**PAIRS, "finetune": False}, "finetune: found False, wanted true, and in load the"),
    ({**PAIRS, "load": None}, "finetune: found True, wanted true, and in load the checkpoint"),
    ({**PAIRS, "save": "./x/"}, "save: found './x/', wanted another folder than load"),
    ({**KTO, "kto_desirable_weight": 2.0}, "kto_undesirable_weight: found 1.0, wanted kto_desir"),
    ({**PAIRS, "pack_impl": "packed"}, "pack_impl: found 'packed', wanted unpacked with train"),
    ({**PAIRS, "neg_valid_data_paths": None}, "neg_valid_data_paths: found None, wanted data sets"),
    ({**PAIRS, **NO_LABELS}, "pos_test_label_data_paths: found None, wanted as many as pos_test"),
    ({**KTO, "valid_reward_data_paths": None}, "valid_reward_data_paths: found None, wanted as m"),
    ({"pack_impl": "unpacked"}, "train_label_data_paths: found None, wanted as many as train_data"),
    ({"pack_impl": "pack_until_overflow"}, "train_label_data_paths: found None, wanted as many as"),
    ({"valid_label_data_paths": ["x"]}, "valid_label_data_paths: found ['x'], wanted none without"),
    ({"test_reward_data_paths": ["x"]}, "test_reward_data_paths: found ['x'], wanted none without"),
    (
        {**DATA, "pack_impl": "unpacked", "train_iters": None, "train_epochs": 1},
        "train_epochs: found 1, wanted none with pack_impl: unpacked",
    ),
    # what GPT-NeoX itself refuses
    ({"min_lr": 1.0}, "GPT-NeoX refuses the settings: "),
    # what DeepSpeed ends in a traceback, ignores, or computes wrongly
    (
        {"partition_activations": True},
        "partition_activations: found True, wanted false without checkpoint_activations",
    ),
    (
        {"checkpoint_activations": True, "partition_activations": True},
        "partition_activations: found True, wanted false with model_parallel_size = 1",
    ),
    (
        {"checkpoint_activations": True, "contiguous_checkpointing": True},
        "contiguous_checkpointing: found True, wanted false: DeepSpeed",
    ),
    (
        {"checkpoint_activations": True, "checkpoint_in_cpu": True, "pipe_parallel_size": 1},
        "checkpoint_in_cpu: found True, wanted false, or partition_activations: true",
    ),
    (
        {"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}},
        "zero_optimization.offload_param: found {'device': 'cpu'}, wanted none without ZeRO stage",
    ),
    (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        "zero_optimization.offload_optimizer: found {'device': 'cpu'}, wanted none without ZeRO",
    ),
    (
        {"zero_optimization": {"stage": 2, "cpu_offload": True}},
        "zero_optimization.cpu_offload: found True, wanted none on the CPU",
    ),
    (
        {
            "zero_optimization": {"stage": 2, "cpu_offload": True},
            "distributed_backend": "nccl",
            "optimizer": ADAM,
        },
        "optimizer.type: found 'Adam', wanted cpu_adam with zero_optimization.cpu_offload",
    ),
    # no checkpoint would be written
    ({"save": "checkpoints"}, "checkpoint_factor: found none, wanted the number of steps"),
]

TRAINING = (Path(__file__).resolve().parents[2] / "docs/training.md").read_text(encoding="utf-8")
CHAPTER = re.search(r"\n## Fine-tuning and preference.*?\n## ", TRAINING, re.DOTALL)[0]
ACCEPTED = [
    *map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", CHAPTER, re.DOTALL)),
    PAIRS,
    REWARDS,
    {**PAIRS, "load": None, "finetune": False, "dpo_reference_free": True},
    {**KTO, "user_script": "generate.py", "optimizer": None, "pipe_parallel_size": 1},
    {**KTO, "zero_optimization": {"stage": 2}},
    {**DATA, "pack_impl": "pack_until_overflow"},
    {"pack_impl": "pack_until_overflow", "eod_mask_loss": True},
    {"optimizer": ADAM, "gradient_accumulation_steps": None},
    {"zero_optimization": {"stage": 2}},
    {"zero_optimization": {"stage": 1}, "pipe_parallel_size": 2, "global_num_gpus": 2},
    {
        "zero_optimization": {"stage": 3},
        "attention_config": HYBRID,
        "tokenizer_type": "hftokenizer",
    },
    {"attention_config": HYBRID, "metala": DOCUMENTS, "pipe_parallel_size": 1},
    {"precision": "bfloat16", "zero_optimization": None},  # as generate.py and eval.py have it
    {
        "precision": "bfloat16",
        "zero_optimization": {"stage": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    {"precision": None, "bf16": {"enabled": True}, "log_optimizer_states": True},
    {**BFLOAT16, **extra(bf16={"enabled": True}, comms_logger={})},
    {
        **BFLOAT16,
        "optimizer": {"type": "sm3", "params": {"lr": 1e-3, "momentum": 0.9, "beta": 0.1}},
    },
    {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 1, "overlap_comm": True}},
    {
        "use_bnb_optimizer": True,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "percentile_clipping": 5}},
    },
    {**BFLOAT16, **optimizer("lion"), "pipe_parallel_size": 1},
    {"user_script": "generate.py", "optimizer": None, "train_iters": None},
    {**UNCONDITIONAL, "attention_config": HYBRID, "pos_emb": "learned"},
    {**UNCONDITIONAL, "attention_config": HYBRID, "pos_emb": "sinusoidal", "recompute": True},
    {"metala": CONTEXT, "pipe_parallel_size": 2, "global_num_gpus": 4},
    {**SEQUENCE, "metala": CONTEXT, "global_num_gpus": 4, "zero_optimization": {"stage": 1}},
    {**SEQUENCE, "attention_config": HYBRID},
    {**BLEND, "train_data_weights": [2.0], "log_param_norm": True, "char_level_ppl": True},
    {"save": "a~b/c$", "checkpoint_factor": 1},
    {"weight_decay": 0, "checkpoint_factor": 1.5, "checkpoint_scale": "log", "save": "x"},
    # GPT-NeoX's own runs are left alone
    {"attention_config": None, "norm": "layernorm", "metala": None, "lr_decay_style": "Cosine"},
]


@pytest.fixture(scope="module")
def answers(in_neox, token_data, tokenizer_file) -> list[str]:
    """The lines printed about each of REFUSED and ACCEPTED."""
    code = """
    from megatron_patch.architecture import SettingsError
    answers = []
    for changes in json.loads(%r):
        try:
            NeoXArgs.from_dict({**settings, **changes})
            answers.append("")
        except SettingsError as error:
            answers.append(str(error))
    answer(answers)
    """
    changes = [changes for changes, _ in REFUSED] + ACCEPTED
    return in_neox(settings(token_data, tokenizer_file), code % json.dumps(changes))


@pytest.mark.parametrize("index", range(len(REFUSED)), ids=lambda i: REFUSED[i][1][:40])
def test_is_refused_in_one_line(answers, index):
    assert answers[index].startswith(REFUSED[index][1])
    assert "\n" not in answers[index] and "\033" not in answers[index]


def test_is_accepted(answers):
    assert answers[len(REFUSED) :] == [""] * len(ACCEPTED)


def test_any_value_of_any_setting_is_accepted_or_refused_in_one_line(in_neox, config):
    code = """
    import contextlib, dataclasses, io
    from megatron_patch.architecture import SettingsError
    junk = ["abc", "", -1, 0, 1.5, [], [[]], {"a": 1}, True, None, float("nan"), 10**30, "1e-6"]
    wrong = []
    for field in dataclasses.fields(NeoXArgs):
        for value in junk:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    NeoXArgs.from_dict({**settings, field.name: value})
            except SettingsError as error:
                if "\\n" in str(error):
                    wrong.append([field.name, repr(value), str(error)])
            except Exception as error:
                wrong.append([field.name, repr(value), repr(error)])
    answer(wrong)
    """
    assert in_neox(config, code) == []
