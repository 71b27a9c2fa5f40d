"""Generation from several prompts, and on several tensor-parallel ranks."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

from megatron_patch.neox.patching import has_metala_layers, repairs, replace
from megatron_patch.neox.upstream_fixes.processes import end_run


# megatron/text_generation_utils.py:198
@repairs("caches of earlier prompts", "megatron.text_generation_utils:stream_tokens")
def forget_earlier_prompts() -> None:
    """Clears the caches before and after each prompt: GPT-NeoX continues the next one, or whatever
    else the model does then, with the state of the last."""
    from megatron import mpu
    from megatron.text_generation_utils import stream_tokens

    @functools.wraps(stream_tokens)
    def stream_tokens_of_one_prompt(neox_args, model, context_tokens, *args, **kwargs):
        if has_metala_layers(neox_args):
            longest, room = max(map(len, context_tokens)), neox_args.seq_length
            # GPT-NeoX pads prompts to `seq_length`, and fails where no room is left for a token.
            if longest >= room:
                end_run(f"seq_length: found {room}, wanted more than the prompt's {longest} tokens")
        model.module.clear_cache()
        share_random_state(mpu.get_model_parallel_group(), mpu.get_model_parallel_src_rank())
        try:
            yield from stream_tokens(neox_args, model, context_tokens, *args, **kwargs)
        finally:
            model.module.clear_cache()

    replace(stream_tokens, stream_tokens_of_one_prompt)


def share_random_state(group, source: int) -> None:
    """Gives all ranks of a tensor-parallel group the random state of its first rank.

    Each rank samples for itself, and all must sample the same token. The states of a checkpoint may
    differ.
    """
    if dist.get_world_size(group) == 1:
        return
    state = torch.cuda.get_rng_state().to(torch.cuda.current_device())
    dist.broadcast(state, source, group=group)
    torch.cuda.set_rng_state(state.cpu())


# megatron/model/gpt2_model.py:345, megatron/model/utils.py:126
@repairs(
    "logits of tensor-parallel ranks",
    "megatron.model.gpt2_model:GPT2ModelPipe._set_parallel_output",
    "isinstance(final_layer, (ParallelLinearPipe, ParallelLinear))",
)
def gather_logits() -> None:
    """Lets `inference_mode` gather the logits of tied heads, and of models without a pipeline, over
    the tensor-parallel ranks. Without it each rank takes its share of the vocabulary for all."""
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

        def gather(is_wanted: bool) -> None:
            self.parallel_output = in_training and not is_wanted
            if hasattr(model.sequential[-1], "final_linear"):
                model.sequential[-1].final_linear.set_parallel_output(self.parallel_output)

        model.gather_logits = gather
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
