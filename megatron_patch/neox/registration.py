"""MetaLA in GPT-NeoX without editing it: everything that is replaced there, and why.

`register()` is called by one line at the end of GPT-NeoX's `megatron/__init__.py`, which
`scripts/link_neox.py` adds; from then on the stock `deepy.py`, `train.py`, `eval.py` and
`generate.py` know the layer type `metala`, the settings under `metala:` and the norm
`simplermsnorm`.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.cpu_mode import activate_cpu_mode
from megatron_patch.neox.damage import comparing_files
from megatron_patch.neox.endings import (
    end_run,
    end_with_launcher,
    fail_where_it_failed,
    fail_where_the_launched_was_killed,
)
from megatron_patch.neox.flops import flops_per_second
from megatron_patch.neox.gradient_norm import repair_gradient_norm
from megatron_patch.neox.index_maps import name_index_maps_after_data
from megatron_patch.neox.launchers import check_launcher, name_rank
from megatron_patch.neox.limits import check_limits
from megatron_patch.neox.loss import fuse_loss
from megatron_patch.neox.norm import SimpleRMSNorm
from megatron_patch.neox.ranks import check_running_ranks, count_ranks
from megatron_patch.neox.replicas import check_replicas, share_random_state
from megatron_patch.neox.resume import check_load, go_on_from_save
from megatron_patch.neox.run_checks import check_backend, check_run, program
from megatron_patch.neox.save_lock import check_holder, check_save, hold_save
from megatron_patch.neox.saving import check_saving, delete_old_checkpoints
from megatron_patch.neox.settings import check_settings, export_warning
from megatron_patch.neox.tokenizer import repair_gpt2_tokenizer
from megatron_patch.neox.training_step import (
    fuse_norm_and_clipping,
    let_the_host_run_ahead,
    speed_up_steps,
)
from megatron_patch.neox.value_checks import check_values
from megatron_patch.neox.watchdog import watch_ranks, watchdog_seconds
from megatron_patch.neox.yaml_config import merge_yaml_texts, read_yaml, settle

LAYER_TYPE = "metala"
_DEFAULT_PARTITION = "type:transformer|mlp"
_UNREAD = -1  # as `sliding_window_width`: no layer reads the mask


def register() -> None:
    """Makes the imported GPT-NeoX know MetaLA. Calling it again changes nothing."""
    from megatron.neox_arguments.neox_args import ATTENTION_TYPE_CHOICES

    if LAYER_TYPE in ATTENTION_TYPE_CHOICES:
        return
    ATTENTION_TYPE_CHOICES.append(LAYER_TYPE)
    _add_settings()
    _read_settings()
    _check_settings_at_start()
    _add_norm()
    _add_layer()
    _recompute_layer()
    _count_flops()
    _initialize_without_cuda()
    _find_data_sets()
    name_index_maps_after_data(_replace)
    _check_running_ranks()
    _check_saved_checkpoints()
    _check_loaded_files()
    _fix_pipeline_validation()
    _forget_earlier_prompts()
    _gather_logits_for_inference()
    _shrink_unread_attention_mask()
    _log_to_wandb()
    repair_gpt2_tokenizer()
    repair_gradient_norm(LAYER_TYPE)
    speed_up_steps(_is_metala, _replace)
    fuse_loss(_replace)
    fuse_norm_and_clipping()
    let_the_host_run_ahead(_is_metala, _replace)
    for repair in (fail_where_it_failed, watch_ranks):
        repair(lambda neox_args: LAYER_TYPE in neox_args.attention_config, _replace)


def _replace(original: Any, replacement: Any) -> None:
    """Rebinds `original` in every GPT-NeoX module that holds it, under whatever name."""
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "megatron":
            for name, value in list(vars(module).items()):
                if value is original:
                    setattr(module, name, replacement)


def _add_settings() -> None:
    """`metala:` becomes a field, `simplermsnorm` a value of `norm`, of GPT-NeoX's dataclasses,
    whose generated constructors are then generated again."""
    from megatron.neox_arguments.arguments import NeoXArgs
    from megatron.neox_arguments.neox_args import NeoXArgsModel

    norms = NeoXArgsModel.__annotations__["norm"].__args__
    NeoXArgsModel.__annotations__["norm"] = Literal[(*norms, "simplermsnorm")]
    NeoXArgsModel.__annotations__[LAYER_TYPE] = dict
    setattr(NeoXArgsModel, LAYER_TYPE, None)
    for cls in (NeoXArgsModel, NeoXArgs):
        del cls.__init__  # `dataclass` keeps one that is there
        dataclasses.dataclass(cls)


def _read_settings() -> None:
    """GPT-NeoX ends in a traceback where two YAML files give one key, or a key is unknown."""
    from megatron.neox_arguments.arguments import NeoXArgs

    def from_ymls(cls, paths_to_yml_files, overwrite_values=None):
        texts = read_yaml(paths_to_yml_files)
        settings = merge_yaml_texts(texts)
        names = [os.path.basename(path) for path in texts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise SettingsError(
                f"{twice[0]}: found two files of this name, wanted different ones: a checkpoint "
                "keeps all in one folder"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(settings) - known):
            close = difflib.get_close_matches(unknown[0], known, 1)
            raise SettingsError(
                f"{unknown[0]}: found in the YAML files, wanted a setting that GPT-NeoX knows"
                + (f", {close[0]} say" if close else "")
            )
        settings["config_files"] = dict(zip(names, settle(texts).values(), strict=True))
        neox_args = cls(**{**settings, **(overwrite_values or {})})
        if _is_metala(neox_args):
            fail_where_the_launched_was_killed()
            go_on_from_save(neox_args)
        check_load(neox_args)  # before GPT-NeoX prints all settings
        if _is_metala(neox_args):
            watchdog_seconds()
            hold_save(neox_args)
        return neox_args

    NeoXArgs.from_ymls = classmethod(from_ymls)


def _is_metala(neox_args: Any) -> bool:
    """Whether a run concerns this plugin, in settings that have not been checked."""
    return neox_args.metala is not None or f"'{LAYER_TYPE}'" in str(neox_args.attention_config)


def _check_settings_at_start() -> None:
    """Checks run in the launcher, before any rank exists, and again in each rank. A mistake ends
    the program with one line, printed once."""
    from megatron.neox_arguments.arguments import ZERO_DEFAULTS, NeoXArgs

    post_init = NeoXArgs.__post_init__
    is_launcher = False

    @functools.wraps(post_init)
    def checked_post_init(self) -> None:
        if _is_metala(self):
            check_values(self)
        activate_cpu_mode(self)
        if self.pipe_partition_method == _DEFAULT_PARTITION:
            self.pipe_partition_method = f"{_DEFAULT_PARTITION}|{LAYER_TYPE}"
        if check_settings(self) is None:
            post_init(self)
            return
        check_run(self)
        # GPT-NeoX gives this default after it has looked for the stage of a run in bfloat16.
        if self.zero_optimization is None:
            self.zero_optimization = dict(ZERO_DEFAULTS)
        # GPT-NeoX asserts that no layer but attention stands beside grouped key heads; what they
        # need otherwise has been checked.
        check_saving(self)
        if is_launcher:
            check_launcher(self, count_ranks(self))
        key_heads, self.num_kv_heads = self.num_kv_heads, None
        try:
            post_init(self)
        except (AssertionError, ValueError) as error:
            reason = " ".join(re.sub(r"\033\[\d*m", "", str(error)).split())
            raise SettingsError(f"GPT-NeoX refuses the settings: {reason}") from error
        self.num_kv_heads = key_heads

    NeoXArgs.__post_init__ = checked_post_init

    def one_line_errors(name: str) -> None:
        consume = getattr(NeoXArgs, name).__func__

        @functools.wraps(consume)
        def consume_or_exit(cls, *args, **kwargs):
            nonlocal is_launcher
            is_launcher = name == "consume_deepy_args"
            if not is_launcher:
                name_rank()
            try:
                neox_args = consume(cls, *args, **kwargs)
                is_on_cpu = neox_args.distributed_backend == "gloo"
                if not is_launcher or (is_on_cpu and not torch.cuda.is_available()):
                    check_backend(neox_args)
                if is_launcher:
                    check_limits(neox_args)
                    _say_what_cannot_be_exported(neox_args)
                else:
                    if _is_metala(neox_args):
                        end_with_launcher()
                    check_load(neox_args)
            except SettingsError as error:
                end_run(str(error))
            return neox_args

        setattr(NeoXArgs, name, classmethod(consume_or_exit))

    one_line_errors("consume_deepy_args")
    one_line_errors("consume_neox_args")


def _say_what_cannot_be_exported(neox_args) -> None:
    """Before the first step, not after weeks."""
    if program(neox_args) == "train.py" and LAYER_TYPE in neox_args.attention_config:
        if warning := export_warning(neox_args):
            print(f"MetaLA: {warning}", flush=True)


def _add_norm() -> None:
    from megatron.model.norms import get_norm

    @functools.wraps(get_norm)
    def get_norm_with_simple(neox_args):
        if neox_args.norm == "simplermsnorm":
            return SimpleRMSNorm, neox_args.rms_norm_epsilon
        return get_norm(neox_args)

    _replace(get_norm, get_norm_with_simple)


def _add_layer() -> None:
    """`init_specs` gives every layer type that it does not know a transformer layer; those of type
    `metala` are exchanged."""
    from deepspeed.pipe import LayerSpec
    from megatron.model.gpt2_model import GPT2ModelPipe

    from megatron_patch.neox.layer import ParallelMetaLALayerPipe

    init_specs = GPT2ModelPipe.init_specs

    @functools.wraps(init_specs)
    def init_specs_with_metala(self) -> None:
        init_specs(self)
        layer_types = self.neox_args.attention_config
        for index, spec in enumerate(self.specs):
            number = spec.module_kwargs.get("layer_number") if isinstance(spec, LayerSpec) else None
            if number is not None and layer_types[number] == LAYER_TYPE:
                self.specs[index] = LayerSpec(
                    ParallelMetaLALayerPipe,
                    neox_args=self.neox_args,
                    init_method=self.init_method,
                    output_layer_init_method=self.output_layer_init_method,
                    layer_number=number,
                )

    GPT2ModelPipe.init_specs = init_specs_with_metala


def _recompute_layer() -> None:
    """Under `checkpoint_activations` DeepSpeed's pipeline and GPT-NeoX's sequential model recompute
    only classes that they know by name."""
    from megatron.model.gpt2_model import GPT2ModelPipe
    from megatron.model.utils import SequentialWrapper

    for owner in (GPT2ModelPipe, SequentialWrapper):
        _allow_recomputation(owner, owner._is_checkpointable)


def _allow_recomputation(owner: type, is_checkpointable: Callable) -> None:
    @functools.wraps(is_checkpointable)
    def knows_metala(self, funcs) -> bool:
        others = [f for f in funcs if type(f).__name__ != "ParallelMetaLALayerPipe"]
        return not others or is_checkpointable(self, others)

    owner._is_checkpointable = knows_metala


def _count_flops() -> None:
    from megatron.logging import get_actual_flops, get_forward_backward_flops

    def with_metala(original: Callable, passes: Callable) -> None:
        @functools.wraps(original)
        def count(neox_args, iter_time_s):
            if LAYER_TYPE not in neox_args.attention_config:
                return original(neox_args, iter_time_s)
            return flops_per_second(neox_args, iter_time_s, passes(neox_args))

        _replace(original, count)

    with_metala(get_actual_flops, lambda args: 4 if args.checkpoint_activations else 3)
    with_metala(get_forward_backward_flops, lambda args: 3)


def _initialize_without_cuda() -> None:
    """GPT-NeoX asserts CUDA at start unless told otherwise; in CPU mode it is told."""
    from megatron import initialize, training  # noqa: F401  (both hold the function)

    initialize_megatron = initialize.initialize_megatron

    @functools.wraps(initialize_megatron)
    def initialize_anywhere(neox_args, allow_no_cuda=False):
        on_cpu = neox_args.distributed_backend == "gloo" and not torch.cuda.is_available()
        result = initialize_megatron(neox_args, allow_no_cuda=allow_no_cuda or on_cpu)
        if LAYER_TYPE in neox_args.attention_config:
            check_save(neox_args)
        return result

    _replace(initialize_megatron, initialize_anywhere)


def _find_data_sets() -> None:
    """`data_impl: infer`, the default, recognises a data set's format and then opens nothing."""
    from megatron.data.indexed_dataset import infer_dataset_impl, make_dataset

    @functools.wraps(make_dataset)
    def make_inferred_dataset(path, impl, skip_warmup=False):
        if impl == "infer":
            impl = infer_dataset_impl(path)
        return make_dataset(path, impl, skip_warmup)

    _replace(make_dataset, make_inferred_dataset)


def _check_running_ranks() -> None:
    from megatron.training import pretrain

    @functools.wraps(pretrain)
    def pretrain_on_counted_ranks(neox_args):
        if LAYER_TYPE in neox_args.attention_config:
            check_running_ranks(neox_args)
        return pretrain(neox_args)

    _replace(pretrain, pretrain_on_counted_ranks)


def _check_saved_checkpoints() -> None:
    from megatron import checkpointing, mpu

    save_checkpoint = checkpointing.save_checkpoint

    @functools.wraps(save_checkpoint)
    def save_equal_replicas(neox_args, iteration, model, *args, **kwargs):
        if LAYER_TYPE in neox_args.attention_config:
            group, source = mpu.get_model_parallel_group(), mpu.get_model_parallel_src_rank()
            check_replicas(model.module, group, source)
            check_holder(neox_args.save)
        save_checkpoint(neox_args, iteration, model, *args, **kwargs)

    _replace(save_checkpoint, save_equal_replicas)
    _replace(checkpointing.delete_old_checkpoints, delete_old_checkpoints)


def _check_loaded_files() -> None:
    from megatron.checkpointing import load_checkpoint

    @functools.wraps(load_checkpoint)
    def load_undamaged(neox_args, *args, **kwargs):
        if LAYER_TYPE not in neox_args.attention_config:
            return load_checkpoint(neox_args, *args, **kwargs)
        with comparing_files():
            return load_checkpoint(neox_args, *args, **kwargs)

    _replace(load_checkpoint, load_undamaged)


def _fix_pipeline_validation() -> None:
    """With `pipe_parallel_size` >= 1 `forward_step` returns the loss alone where its caller,
    `evaluate`, unpacks a loss and metrics."""
    from megatron.training import forward_step

    @functools.wraps(forward_step)
    def forward_step_with_metrics(data_iterator, model, neox_args, timers, *args, **kwargs):
        result = forward_step(data_iterator, model, neox_args, timers, *args, **kwargs)
        return result if isinstance(result, tuple) else (result, {})

    _replace(forward_step, forward_step_with_metrics)


def _forget_earlier_prompts() -> None:
    """Generation from several prompts keeps the caches of one for the next, and the last one's for
    whatever the model does then."""
    from megatron import mpu
    from megatron.text_generation_utils import stream_tokens

    @functools.wraps(stream_tokens)
    def stream_tokens_of_one_prompt(neox_args, model, context_tokens, *args, **kwargs):
        if LAYER_TYPE in neox_args.attention_config:
            _check_prompt(max(map(len, context_tokens)), neox_args.seq_length)
        model.module.clear_cache()
        share_random_state(mpu.get_model_parallel_group(), mpu.get_model_parallel_src_rank())
        try:
            yield from stream_tokens(neox_args, model, context_tokens, *args, **kwargs)
        finally:
            model.module.clear_cache()

    _replace(stream_tokens, stream_tokens_of_one_prompt)


def _check_prompt(tokens: int, seq_length: int) -> None:
    """GPT-NeoX pads prompts to `seq_length`, and fails where one leaves no room for a token."""
    if tokens >= seq_length:
        end_run(f"seq_length: found {seq_length}, wanted more than the prompt's {tokens} tokens")


def _gather_logits_for_inference() -> None:
    """`inference_mode` means the logits to be gathered over the tensor-parallel ranks, and leaves
    out models without a pipeline and tied heads: each rank would take its own share of the
    vocabulary for the whole."""
    from megatron.model.gpt2_model import GPT2ModelPipe
    from megatron.model.utils import SequentialWrapper

    to_sequential = GPT2ModelPipe.to_sequential
    set_parallel_output = GPT2ModelPipe._set_parallel_output
    inference_mode, train_mode = SequentialWrapper.inference_mode, SequentialWrapper.train_mode

    @functools.wraps(set_parallel_output)
    def set_parallel_output_of_any_head(self, value):
        set_parallel_output(self, value)
        self.parallel_output = value  # a tied head looks here at each call

    @functools.wraps(to_sequential)
    def to_sequential_with_head(self):
        model, in_training = to_sequential(self), self.parallel_output

        def gather_logits(is_wanted: bool) -> None:
            self.parallel_output = in_training and not is_wanted
            if hasattr(model.sequential[-1], "final_linear"):
                model.sequential[-1].final_linear.set_parallel_output(self.parallel_output)

        model.gather_logits = gather_logits
        return model

    @functools.wraps(inference_mode)
    def gathering_inference_mode(self, use_cache=True):
        inference_mode(self, use_cache)
        self.gather_logits(True)

    @functools.wraps(train_mode)
    def parallel_train_mode(self):
        train_mode(self)
        self.gather_logits(False)

    GPT2ModelPipe.to_sequential = to_sequential_with_head
    GPT2ModelPipe._set_parallel_output = set_parallel_output_of_any_head
    SequentialWrapper.inference_mode = gathering_inference_mode
    SequentialWrapper.train_mode = parallel_train_mode


def _shrink_unread_attention_mask() -> None:
    """Every batch carries an s x s mask (1 GiB at 32k tokens) that only attention layers read. What
    makes a batch is given the settings of the model that it is for; from those of MetaLA layers
    alone it takes a mask of one element, asked for by a window that no settings can have."""
    from megatron import text_generation_utils, training
    from megatron.utils import get_attn_mask

    make_batch, make_prompt = training._get_batch, text_generation_utils.get_batch
    make_inputs = training.get_batch_sequential

    def is_read(neox_args) -> bool:
        return set(neox_args.attention_config) != {LAYER_TYPE}

    def unread_mask(device: torch.device) -> torch.Tensor:
        return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)

    @functools.wraps(get_attn_mask)
    def get_mask_if_read(seq_length, device, sliding_window_width):
        if sliding_window_width == _UNREAD:
            return unread_mask(device)
        return get_attn_mask(seq_length, device, sliding_window_width)

    @functools.wraps(make_batch)
    def make_batch_with_mask_if_read(neox_args, *args, **kwargs):
        if not is_read(neox_args):
            neox_args = copy.copy(neox_args)
            neox_args.sliding_window_width = _UNREAD
        return make_batch(neox_args, *args, **kwargs)

    @functools.wraps(make_inputs)
    def make_inputs_with_mask_if_read(forward_input, neox_args):
        if is_read(neox_args):
            return make_inputs(forward_input, neox_args)
        return forward_input[0], forward_input[1], unread_mask(forward_input[0].device)

    @functools.wraps(make_prompt)
    def make_prompt_with_mask_if_read(neox_args, context_tokens):
        if is_read(neox_args):
            return make_prompt(neox_args, context_tokens)
        tokens = context_tokens.contiguous().cuda()
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return tokens, unread_mask(tokens.device), positions.expand_as(tokens)

    _replace(get_attn_mask, get_mask_if_read)
    _replace(make_batch, make_batch_with_mask_if_read)
    _replace(make_inputs, make_inputs_with_mask_if_read)
    _replace(make_prompt, make_prompt_with_mask_if_read)


def _log_to_wandb() -> None:
    """GPT-NeoX switches wandb off where it finds no API key, which an offline run does not need,
    and calls a function that wandb has moved."""
    from megatron.utils import get_wandb_api_key

    wandb = sys.modules.get("wandb")  # GPT-NeoX has imported it where it is installed
    util = getattr(wandb, "util", None)  # another module of this name has none
    if util is not None and not hasattr(util, "generate_id"):
        util.generate_id = wandb.sdk.lib.runid.generate_id

    @functools.wraps(get_wandb_api_key)
    def key_unless_offline(neox_args):
        if os.environ.get("WANDB_MODE") == "offline":
            return "LOCAL"  # what GPT-NeoX itself answers for a local wandb server
        return get_wandb_api_key(neox_args)

    _replace(get_wandb_api_key, key_unless_offline)
