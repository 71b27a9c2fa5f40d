"""Generation from several prompts, and on several ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_patch.neox.patching import (
    in_metala_runs,
    overrides,
    repairs,
    swapped,
)
from megatron_patch.neox.upstream_fixes.processes import end_run


# megatron/text_generation_utils.py:198
@repairs("caches of earlier prompts", "megatron.text_generation_utils:stream_tokens")
def forget_earlier_prompts() -> None:
    """Clears the caches before and after each prompt: GPT-NeoX continues the next one, or whatever
    else the model does then, with the state of the last."""
    from megatron import mpu
    from megatron.text_generation_utils import stream_tokens

    @in_metala_runs(stream_tokens)
    def stream_tokens_of_one_prompt(
        stream_tokens, neox_args, model, context_tokens, *args, **kwargs
    ):
        longest, room = max(map(len, context_tokens)), neox_args.seq_length
        # GPT-NeoX pads prompts to `seq_length`, and fails where no room is left for a token.
        if longest >= room:
            end_run(f"seq_length: found {room}, wanted more than the prompt's {longest} tokens")
        model.module.clear_cache()
        group, source = mpu.get_model_parallel_group(), mpu.get_model_parallel_src_rank()
        if neox_args.is_pipe_parallel:  # data-parallel ranks wait for each other at each token
            group, source = dist.group.WORLD, 0
        share_random_state(group, source)
        try:
            yield from stream_tokens(neox_args, model, context_tokens, *args, **kwargs)
        finally:
            model.module.clear_cache()


def share_random_state(group, source: int) -> None:
    """Gives all ranks of a group the random state of the rank `source`.

    Each tensor-parallel rank samples for itself, and all must sample the same token. The states of
    a checkpoint may differ.
    """
    if dist.get_world_size(group) == 1:
        return
    state = torch.cuda.get_rng_state().to(torch.cuda.current_device())
    dist.broadcast(state, source, group=group)
    torch.cuda.set_rng_state(state.cpu())


# megatron/text_generation_utils.py:180
@repairs(
    "stop tokens and padding tokens",
    "megatron.text_generation_utils:stream_tokens",
    "stop_tokens[i] = torch.cuda.LongTensor(stop_tokens[i])",
)
def stop_in_completions() -> None:
    """Looks for stop tokens in completions alone, and generates no padding row of the vocabulary.

    GPT-NeoX also finds stop tokens in a prompt that is longer than another one of its batch, makes
    one sequence of several stop tokens from the second prompt on, and samples rows of the
    vocabulary for which there is no token.
    """
    from megatron import mpu, text_generation_utils
    from megatron.text_generation_utils import stop_tokens_in_completion, stream_tokens

    @in_metala_runs(stream_tokens)
    def stream_known_tokens(
        stream_tokens, neox_args, model, context_tokens, *args, stop_tokens=None, **kwargs
    ):
        source, group = mpu.get_model_parallel_src_rank(), mpu.get_model_parallel_group()
        prompts = share(context_tokens, source, group)  # GPT-NeoX reads them on `source` alone
        vocabulary = neox_args.tokenizer.vocab_size
        if (top_k := kwargs.get("top_k", 0)) > vocabulary:
            end_run(f"top_k: found {top_k}, wanted at most the vocabulary's {vocabulary} tokens")
        forward_model = text_generation_utils.forward_model

        def forward(*inputs):
            logits = forward_model(*inputs)
            if logits is not None:  # else this is not the last pipeline stage
                logits[..., vocabulary:] = -torch.inf
            return logits

        def is_stopped(stop_tokens, tokens, row, index) -> bool:
            start = len(prompts[row])
            if index < start:
                return False
            return stop_tokens_in_completion(stop_tokens, tokens[:, start:], row, index - start)

        with (
            swapped(text_generation_utils, "forward_model", forward),
            swapped(text_generation_utils, "stop_tokens_in_completion", is_stopped),
        ):
            stop_tokens = stop_tokens and list(stop_tokens)  # GPT-NeoX changes the list
            yield from stream_tokens(
                neox_args, model, prompts, *args, stop_tokens=stop_tokens, **kwargs
            )


def share(value: Any, source: int = 0, group: dist.ProcessGroup | None = None) -> Any:
    """Returns the value of rank `source` on all ranks of its group, by default of all."""
    box = [value]
    dist.broadcast_object_list(box, source, group=group)
    return box[0]


# megatron/text_generation_utils.py:628 and 700
@repairs(
    "samples of several ranks",
    "megatron.text_generation_utils:generate_samples_input_from_file",
    'if is_mp_rank_0():\n        with open(output_file, "w")',
)
def write_samples_once() -> None:
    """Lets the first rank alone write samples. In GPT-NeoX each pipeline stage and data-parallel
    rank writes them, all at once, to the same file."""
    from megatron import text_generation_utils

    def write_on_first_rank(generate, neox_args, *args, **kwargs):
        if dist.get_rank():
            kwargs["output_file"] = os.devnull
        return generate(neox_args, *args, **kwargs)

    for name in ("generate_samples_input_from_file", "generate_samples_unconditional"):
        in_metala_runs(getattr(text_generation_utils, name))(write_on_first_rank)


# megatron/text_generation_utils.py:713
@repairs(
    "interactive generation",
    "megatron.text_generation_utils:generate_samples_interactive",
    "context_tokens = neox_args.tokenizer.tokenize(raw_text)",
)
def talk_on_all_ranks() -> None:
    """Hands the prompt that the first rank reads to all ranks, and ends with exit code 0 where the
    input ends (Ctrl-D). GPT-NeoX keeps the prompt from the other pipeline stages and data-parallel
    ranks, and ends in a traceback."""
    from megatron import text_generation_utils

    @in_metala_runs(text_generation_utils.generate_samples_interactive)
    def talk(_, neox_args, model, *, prompt_end="\n", **sampling):
        tokenizer = neox_args.tokenizer
        is_first = dist.get_rank() == 0
        while (text := share(read_prompt(prompt_end) if is_first else None)) is not None:
            prompts = [tokenizer.tokenize(text) or [tokenizer.eod]]
            samples = text_generation_utils.stream_tokens(neox_args, model, prompts, **sampling)
            for tokens, starts, ends, *_ in samples:
                if is_first:
                    generated = tokens[0, starts[0] : ends[0] + 1].tolist()
                    print(f"Generated Text: {tokenizer.detokenize(generated)}", flush=True)
            if is_first:
                next(read_lines("\n<press enter to continue>"), None)


def read_prompt(prompt_end: str) -> str | None:
    """Returns what is typed up to `prompt_end`, `None` at the end of the input."""
    if os.isatty(1):
        os.system("clear")
    text = ""
    for line in read_lines("Context prompt >>> "):
        text += line + "\n"
        if prompt_end in text:
            return text.split(prompt_end)[0]
    return None


def read_lines(question: str) -> Iterator[str]:
    """Yields the lines that are typed, without their ends, and asks for each."""
    try:
        while True:
            yield input(question)
    except EOFError:
        print(flush=True)


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

    @overrides(GPT2ModelPipe, "_set_parallel_output")
    def set_parallel_output_of_any_head(set_parallel_output, self, value):
        set_parallel_output(self, value)
        self.parallel_output = value  # a tied head looks here at each call

    @overrides(GPT2ModelPipe, "to_sequential")
    def to_sequential_with_head(to_sequential, self):
        model, in_training = to_sequential(self), self.parallel_output
        # The pipeline's own layers, which `to_sequential` has built anew, would live as long as the
        # model: `gather` holds the pipeline, and so does a tied head.
        self._modules.clear()
        self.forward_funcs.clear()

        def gather(is_wanted: bool) -> None:
            self.parallel_output = in_training and not is_wanted
            if hasattr(model.sequential[-1], "final_linear"):
                model.sequential[-1].final_linear.set_parallel_output(self.parallel_output)

        model.gather_logits = gather
        return model

    @overrides(SequentialWrapper, "inference_mode")
    def gathering_inference_mode(inference_mode, self, use_cache=True):
        inference_mode(self, use_cache)
        self.gather_logits(True)

    @overrides(SequentialWrapper, "train_mode")
    def parallel_train_mode(train_mode, self):
        train_mode(self)
        self.gather_logits(False)
