"""How MetaLA gets into GPT-NeoX without an edit: everything that the plugin adds, and where.

One line at the end of GPT-NeoX's `megatron/__init__.py` calls `register()`; `scripts/link_neox.py`
adds it. From then on the stock `deepy.py`, `train.py`, `eval.py` and `generate.py` know the layer
type `metala`, the settings under `metala:` and the norm `simplermsnorm`.

`register()` adds, in this order: the settings, how they are read and checked, the norm, the layer,
its recomputation, its FLOPs. Last come repairs of GPT-NeoX and DeepSpeed that a MetaLA run needs
and that have nothing to do with MetaLA; `upstream_fixes` lists them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Any, Literal

from megatron_patch.architecture import METALA, SettingsError
from megatron_patch.neox import upstream_fixes
from megatron_patch.neox.attention_mask import shrink_unread_attention_mask
from megatron_patch.neox.context_parallel import check_context_ranks, split_sequences
from megatron_patch.neox.fast_step import speed_up_steps
from megatron_patch.neox.flops import flops_per_second
from megatron_patch.neox.gpu_memory import grow_segments
from megatron_patch.neox.inference_settings import evaluates
from megatron_patch.neox.loss import fuse_loss
from megatron_patch.neox.notices import notices, say
from megatron_patch.neox.patching import (
    has_metala_layers,
    in_metala_runs,
    mentions_metala,
    overrides,
    replaces,
)
from megatron_patch.neox.pytorch_adam import take_pytorchs_adam
from megatron_patch.neox.run_settings import (
    check_backend,
    check_limits,
    check_run,
    check_values,
    program,
)
from megatron_patch.neox.sequence_parallel import split_tokens
from megatron_patch.neox.settings import check_settings
from megatron_patch.neox.token_groups import make_token_groups
from megatron_patch.neox.unread_settings import check_unread
from megatron_patch.neox.upstream_fixes.cpu_mode import activate_cpu_mode, runs_on_cpu
from megatron_patch.neox.upstream_fixes.processes import (
    check_launcher,
    count_ranks,
    end_run,
    end_with_launcher,
    name_rank,
)
from megatron_patch.neox.upstream_fixes.rendezvous import check_rank, settle_port
from megatron_patch.neox.upstream_fixes.resume import check_load, go_on_from_save
from megatron_patch.neox.upstream_fixes.saving import hold_save
from megatron_patch.neox.upstream_fixes.watchdog import watchdog_seconds
from megatron_patch.neox.yaml_config import merge_yaml_texts, read_yaml, settle

_DEFAULT_PARTITION = "type:transformer|mlp"
_is_launcher = False  # whether this process is `deepy.py`


def register() -> None:
    """Makes the imported GPT-NeoX know MetaLA. Calling it again changes nothing."""
    from megatron.neox_arguments.neox_args import ATTENTION_TYPE_CHOICES

    if METALA in ATTENTION_TYPE_CHOICES:
        return
    _add_settings()
    _read_yaml_files()
    _check_settings()
    _end_with_one_line()
    _add_norm()
    _add_layer()
    _recompute_layer()
    _count_flops()
    shrink_unread_attention_mask()
    make_token_groups()
    split_sequences()
    split_tokens()
    fuse_loss()
    take_pytorchs_adam()
    speed_up_steps()
    upstream_fixes.apply()
    ATTENTION_TYPE_CHOICES.append(METALA)  # last: half of this is no registration


# ---- Settings


def _add_settings() -> None:
    """Adds the field `metala` and the norm `simplermsnorm` to GPT-NeoX's dataclasses of settings,
    and generates their constructors again."""
    from megatron.neox_arguments.arguments import NeoXArgs
    from megatron.neox_arguments.neox_args import NeoXArgsModel

    norms = NeoXArgsModel.__annotations__["norm"].__args__
    NeoXArgsModel.__annotations__["norm"] = Literal[(*norms, "simplermsnorm")]
    NeoXArgsModel.__annotations__[METALA] = dict
    setattr(NeoXArgsModel, METALA, None)
    for cls in (NeoXArgsModel, NeoXArgs):
        del cls.__init__  # `dataclass` keeps an existing one
        dataclasses.dataclass(cls)


def _read_yaml_files() -> None:
    """Replaces the reader of YAML files in `deepy.py`. GPT-NeoX ends in a traceback where two files
    give one key, and where a key is unknown. Here the last value stands, and an unknown key is
    named."""
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
        is_metala = mentions_metala(neox_args)
        if is_metala:
            check_unread(settings, cls)
            upstream_fixes.apply(upstream_fixes.LAUNCHER_FIXES)
            go_on_from_save(neox_args)
        check_load(neox_args)  # before GPT-NeoX prints all settings
        if is_metala:
            watchdog_seconds()
            if _is_launcher:
                settle_port(neox_args, "master_port" in settings)
            hold_save(neox_args)
        return neox_args

    NeoXArgs.from_ymls = classmethod(from_ymls)


def _check_settings() -> None:
    """Checks the settings before GPT-NeoX derives others from them: in the launcher, before any
    rank exists, and again in each rank."""
    from megatron.neox_arguments.arguments import ZERO_DEFAULTS, NeoXArgs

    @overrides(NeoXArgs, "__post_init__")
    def checked_post_init(post_init, self) -> None:
        if mentions_metala(self):
            check_values(self)
        activate_cpu_mode(self)
        if self.pipe_partition_method == _DEFAULT_PARTITION:
            self.pipe_partition_method = f"{_DEFAULT_PARTITION}|{METALA}"
        if check_settings(self) is None:
            post_init(self)
            return
        check_run(self)
        # GPT-NeoX sets this default only after it has read the ZeRO stage of a bfloat16 run.
        if self.zero_optimization is None:
            self.zero_optimization = dict(ZERO_DEFAULTS)
        if _is_launcher:
            check_launcher(self, count_ranks(self))
            check_rank(self)
            check_context_ranks(self)
        # GPT-NeoX asserts that grouped key heads stand beside attention layers alone. The settings
        # have passed stricter checks, so it does not see the number.
        key_heads, self.num_kv_heads = self.num_kv_heads, None
        try:
            post_init(self)
        except SettingsError:
            raise
        except (AssertionError, ValueError) as error:
            reason = " ".join(re.sub(r"\033\[\d*m", "", str(error)).split())
            raise SettingsError(f"GPT-NeoX refuses the settings: {reason}") from error
        self.num_kv_heads = key_heads


def _end_with_one_line() -> None:
    """Wraps the two functions by which programs get their settings, `consume_deepy_args` in the
    launcher and `consume_neox_args` in the ranks: a mistake ends the program with one line."""
    from megatron.neox_arguments.arguments import NeoXArgs

    def wrap(name: str, is_launcher: bool, finish: Callable[[Any], None]) -> None:
        consume = getattr(NeoXArgs, name).__func__

        @functools.wraps(consume)
        def consume_or_exit(cls, *args, **kwargs):
            global _is_launcher
            _is_launcher = is_launcher
            if is_launcher:
                os.environ.pop("LOCAL_RANK", None)  # which would make this process a rank
            else:
                name_rank()
                _check_start(kwargs.get("input_args") or sys.argv)
            try:
                neox_args = consume(cls, *args, **kwargs)
                finish(neox_args)
            except SettingsError as error:
                if is_launcher:
                    os.environ.pop("RANK", None)  # only the first rank would print the line
                end_run(str(error))
            return neox_args

        setattr(NeoXArgs, name, classmethod(consume_or_exit))

    def in_launcher(neox_args) -> None:
        if runs_on_cpu(neox_args):
            check_backend(neox_args)
        check_limits(neox_args)
        if has_metala_layers(neox_args):
            say(upstream_fixes.summary())
            if program(neox_args) == "train.py":
                for line in notices(neox_args):
                    say(line)

    def in_rank(neox_args) -> None:
        check_backend(neox_args)
        if mentions_metala(neox_args):
            end_with_launcher()
            grow_segments()
            if evaluates(neox_args, program(neox_args)):
                upstream_fixes.apply(upstream_fixes.EVALUATION_FIXES)
        check_load(neox_args)

    wrap("consume_deepy_args", True, in_launcher)
    wrap("consume_neox_args", False, in_rank)


def _check_start(words: list[str]) -> None:
    """Ends a program that `deepy.py` has not started, which GPT-NeoX does with a TypeError."""
    if not any(word.startswith("--megatron_config") for word in words):
        name = os.path.basename(sys.argv[0])
        end_run(f"{name} was started without deepy.py, wanted: python ./deepy.py {name} FILE.yml")


# ---- The model


def _add_norm() -> None:
    from megatron.model.norms import get_norm

    @replaces(get_norm)
    def get_norm_with_simple(get_norm, neox_args):
        if neox_args.norm == "simplermsnorm":
            from megatron_patch.neox.layer import SimpleRMSNorm

            return SimpleRMSNorm, neox_args.rms_norm_epsilon
        return get_norm(neox_args)


def _add_layer() -> None:
    """Exchanges layers in `init_specs`, which builds a transformer layer for each layer type that
    it does not know."""
    from deepspeed.pipe import LayerSpec
    from megatron.model.gpt2_model import GPT2ModelPipe

    from megatron_patch.neox.layer import ParallelMetaLALayerPipe

    @overrides(GPT2ModelPipe, "init_specs")
    def init_specs_with_metala(init_specs, self) -> None:
        init_specs(self)
        layer_types = self.neox_args.attention_config
        for index, spec in enumerate(self.specs):
            number = spec.module_kwargs.get("layer_number") if isinstance(spec, LayerSpec) else None
            if number is not None and layer_types[number] == METALA:
                self.specs[index] = LayerSpec(
                    ParallelMetaLALayerPipe,
                    neox_args=self.neox_args,
                    init_method=self.init_method,
                    output_layer_init_method=self.output_layer_init_method,
                    layer_number=number,
                )


def _recompute_layer() -> None:
    """Lets `checkpoint_activations` recompute the layer. GPT-NeoX's pipeline and its sequential
    model recompute only classes that they know by name."""
    from megatron.model.gpt2_model import GPT2ModelPipe
    from megatron.model.utils import SequentialWrapper

    def knows_metala(is_checkpointable, self, funcs) -> bool:
        others = [f for f in funcs if type(f).__name__ != "ParallelMetaLALayerPipe"]
        return not others or is_checkpointable(self, others)

    for owner in (GPT2ModelPipe, SequentialWrapper):
        overrides(owner, "_is_checkpointable")(knows_metala)


def _count_flops() -> None:
    """Replaces the FLOPs that GPT-NeoX logs: those that the hardware does, with recomputation, and
    those that the model needs."""
    from megatron.logging import get_actual_flops, get_forward_backward_flops

    @in_metala_runs(get_actual_flops)
    def count_actual(_, neox_args, iter_time_s):
        passes = 4 if neox_args.checkpoint_activations else 3
        return flops_per_second(neox_args, iter_time_s, passes)

    @in_metala_runs(get_forward_backward_flops)
    def count_needed(_, neox_args, iter_time_s):
        return flops_per_second(neox_args, iter_time_s, passes=3)
