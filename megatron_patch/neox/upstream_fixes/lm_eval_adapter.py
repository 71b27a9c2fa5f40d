"""Evaluation by today's lm_eval: what stands for GPT-NeoX's adapter in `eval_tasks/`.

GPT-NeoX's adapter needs lm_eval 0.4.0 or 0.4.1, evaluates the first ten questions of each task, and
fails at a task with one stop text. This one was tested with lm_eval 0.4.11 and 0.4.13.

All ranks go through the same requests. Data-parallel ranks share the batches.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager, get_task_dict
from megatron import mpu
from megatron.text_generation_utils import get_batch
from tqdm import tqdm

from megatron_patch.neox.upstream_fixes.generation import share
from megatron_patch.neox.upstream_fixes.processes import end_run

DEFAULT_NEW_TOKENS = 256  # lm_eval's
_SAMPLING = ("temperature", "top_k", "top_p")
Request = tuple[Any, list[int], list[int]]  # a key, the context's tokens, the continuation's


class NeoXModel(TemplateLM):
    """A GPT-NeoX model as lm_eval sees it, with the constructor and `run_eval` of GPT-NeoX's
    `EvalHarnessAdapter`."""

    def __init__(self, model, forward_step_fn, neox_args, batch_size: int | None = None):
        super().__init__()
        self.model, self.neox_args = model, neox_args
        self.words = neox_args.tokenizer
        self.batch_size = batch_size or neox_args.batch_size
        self.is_pipe_parallel = neox_args.is_pipe_parallel

    @property
    def eot_token_id(self) -> int:
        return self.words.eod

    @property
    def max_length(self) -> int:
        return self.neox_args.seq_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.words.tokenize(string)

    # ---- Likelihoods

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text. A text longer than `seq_length` is read in
        windows, each of which begins with the last token of the one before."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, 1
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += value
        return sums

    def _loglikelihood_tokens(self, requests: list[Request], **_) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether greedy decoding gives it.

        Prompts are padded on the right with the end-of-document token. Layers are causal, so
        nothing that is read depends on the padding.
        """
        self.model.module.inference_mode(use_cache=False)
        inputs = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                end_run(
                    f"seq_length: found {self.max_length}, wanted at least the "
                    f"{len(continuation)} tokens of a continuation"
                )
            inputs.append((context + continuation)[-self.max_length - 1 : -1])
        order = sorted(range(len(requests)), key=lambda i: -len(inputs[i]))
        answers = {}
        own = self._share_batches(list(_batches(order, self.batch_size)))
        for batch in _with_progress(own, "Likelihoods"):
            logits = self._forward([inputs[i] for i in batch])
            if logits is None:  # this is not the last pipeline stage
                continue
            for i, row in zip(batch, logits, strict=True):
                wanted = torch.tensor(requests[i][2], dtype=torch.long, device=row.device)
                scores = row[len(inputs[i]) - len(wanted) : len(inputs[i])].float().log_softmax(-1)
                value = scores.gather(1, wanted[:, None]).sum().item()
                answers[i] = value, bool((scores.argmax(-1) == wanted).all())
        return _gather(answers, len(requests))

    def _share_batches(self, batches: list[list[int]]) -> list[list[int]]:
        """Returns this data-parallel rank's batches. A rank that has fewer than another takes the
        first once more: in a pipeline the ranks wait for each other at each batch."""
        ranks, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        starts = range(0, len(batches), ranks)
        return [batches[start + rank if start + rank < len(batches) else 0] for start in starts]

    @torch.no_grad()
    def _forward(self, prompts: list[list[int]]) -> torch.Tensor | None:
        """Returns logits [prompts, longest prompt, tokens of the vocabulary], `None` on all
        pipeline stages but the last."""
        from megatron.text_generation_utils import forward_model

        longest = max(map(len, prompts))
        padded = [prompt + [self.words.eod] * (longest - len(prompt)) for prompt in prompts]
        tokens, mask, positions = get_batch(self.neox_args, torch.cuda.LongTensor(padded))
        logits = forward_model(self.model, (tokens, positions, mask), self.is_pipe_parallel)
        return None if logits is None else logits[..., : self.words.vocab_size]

    # ---- Texts

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Returns the continuation of each context, up to the first of its stop texts."""
        recompute = self.neox_args.recompute
        self.model.module.inference_mode(use_cache=not recompute)
        settings = [_generation(request.args[1]) for request in requests]
        prompts = []
        for request, (new_tokens, _, _) in zip(requests, settings, strict=True):
            if new_tokens >= self.max_length:
                end_run(
                    f"seq_length: found {self.max_length}, wanted more than the {new_tokens} "
                    "tokens that a task generates"
                )
            prompt = self.tok_encode(request.args[0]) or [self.words.eod]
            prompts.append(prompt[new_tokens - self.max_length :])

        def key(i: int) -> str:
            return json.dumps(settings[i])

        order = sorted(range(len(requests)), key=lambda i: (key(i), -len(prompts[i])))
        groups = (list(group) for _, group in itertools.groupby(order, key))
        batches = [batch for group in groups for batch in _batches(group, self.batch_size)]
        # In a pipeline all ranks wait for each other at each token, so each does everything.
        own = batches if self.is_pipe_parallel else self._share_batches(batches)
        answers: dict[int, str] = {}
        for batch in _with_progress(own, "Generation"):
            texts = self._generate([prompts[i] for i in batch], *settings[batch[0]])
            answers.update(zip(batch, texts, strict=True))
        return _gather(answers, len(requests))

    def _generate(
        self, prompts: list[list[int]], new_tokens: int, until: list[str], sampling: dict
    ) -> list[str]:
        """Returns the continuations of one batch: up to the end of document, `new_tokens` tokens or
        a stop text, whichever comes first."""
        from megatron.text_generation_utils import stream_tokens

        eod, lengths = self.words.eod, [len(prompt) for prompt in prompts]

        def completion(tokens: list[int]) -> tuple[str, bool]:
            tokens = tokens[:new_tokens]
            is_over = len(tokens) == new_tokens or eod in tokens
            whole = self.words.detokenize(tokens[: tokens.index(eod)] if eod in tokens else tokens)
            text = whole
            for stop in filter(None, until):
                text = text.split(stop)[0]
            return text, is_over or text != whole

        samples = stream_tokens(
            self.neox_args,
            self.model,
            prompts,
            # GPT-NeoX counts from the end of the shortest prompt.
            maximum_tokens=max(lengths) - min(lengths) + new_tokens,
            recompute=self.neox_args.recompute,
            **sampling,
        )
        with contextlib.closing(samples):
            for end, (tokens, *_) in enumerate(samples, start=min(lengths) + 1):
                rows = zip(tokens.tolist(), lengths, strict=True)
                completions = [completion(row[start:end]) for row, start in rows]
                if all(is_over for _, is_over in completions):
                    break
        return [text for text, _ in completions]

    # ---- Tasks

    def run_eval(
        self, eval_tasks: list[str], num_fewshot: int = 0, bootstrap_iters: int = 2, **_
    ) -> dict[str, Any]:
        """Returns lm_eval's results, on all ranks. Their metrics are numbers alone, which GPT-NeoX
        prints. The model is left in training mode, as GPT-NeoX's adapter leaves it."""
        manager, names = _find_tasks(tuple(eval_tasks))
        if self.neox_args.local_rank == 0:
            get_task_dict(names, manager)  # downloads the data once a node
        dist.barrier()
        try:
            results = simple_evaluate(
                model=self,
                tasks=names,
                task_manager=manager,
                num_fewshot=num_fewshot,
                bootstrap_iters=bootstrap_iters,
                log_samples=False,
                random_seed=None,  # a training that evaluates keeps its random states
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        finally:
            self.model.module.train_mode()
            if self.is_pipe_parallel:
                self.model.reset_activation_shape()  # else training would receive the last shape
        results = share(results and json.loads(json.dumps(results, default=str)))
        results["results"] = {
            task: {name: value for name, value in metrics.items() if _is_number(value)}
            for task, metrics in results["results"].items()
        }
        return results


def _batches(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _with_progress(batches: list[list[int]], what: str) -> Iterable[list[int]]:
    return tqdm(batches, desc=what, disable=dist.get_rank() != 0)


def _gather(answers: dict[int, Any], count: int) -> list[Any]:
    """Returns the answers of all ranks in the order of the requests."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, answers)
    found = {number: answer for part in parts for number, answer in part.items()}
    return [found[number] for number in range(count)]


def _generation(given: dict[str, Any]) -> tuple[int, list[str], dict[str, float]]:
    """Returns how many tokens a task generates, its stop texts, and how GPT-NeoX samples. No
    sampling is greedy decoding, which lm_eval means unless `do_sample` or a temperature is given.
    """
    given = dict(given)
    until = given.pop("until", None) or []
    new_tokens = given.pop("max_gen_toks", DEFAULT_NEW_TOKENS)
    sampling = {name: given.pop(name) for name in _SAMPLING if given.get(name) is not None}
    if not given.pop("do_sample", bool(sampling.get("temperature"))):
        sampling = {}
    elif not sampling:
        sampling = {"temperature": 1.0}
    for name, value in given.items():
        end_run(
            f"generation_kwargs.{name}: found {value!r}, wanted none: GPT-NeoX generates with "
            f"{', '.join(_SAMPLING)}"
        )
    return int(new_tokens), [until] if isinstance(until, str) else until, sampling


@functools.cache  # lm_eval reads thousands of YAML files
def _find_tasks(names: tuple[str, ...]) -> tuple[TaskManager, list[str]]:
    """Returns lm_eval's tasks, with those in the folders of YAML files, and the names of the tasks
    that are asked for. A name may be a pattern such as `arc_*`, or a YAML file."""
    own = {name: Path(name) for name in names if name.endswith(".yaml")}
    manager = TaskManager(include_path=sorted({str(f.parent) for f in own.values()}) or None)
    found: dict[str, None] = {}
    for name in names:
        if name in own:
            declared = re.search(r"^task: *(\S+)", own[name].read_text(), re.MULTILINE)
            matches = [declared[1]] if declared else []
        else:
            matches = manager.match_tasks([name])
        if not matches:
            end_run(f"eval_tasks: found {name!r}, wanted a task of lm_eval or its YAML file")
        found |= dict.fromkeys(matches)
    return manager, list(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
