"""GPT-NeoX's generate.py on MetaLA models and hybrids, against the converted model and against a
forward pass over the whole text."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import torch

from convert import reshape_neox
from tests.neox.conversion import convert, export
from tests.neox.training import neox, settings, train

# Large initial weights: what follows depends on the whole prompt.
HYBRID = {
    "init_method": "normal",
    "init_method_std": 0.2,
    "train_iters": 2,
    "num_layers": 3,
    "attention_config": [[["metala", "global", "metala"], 1]],
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "use_bias_in_attn_linear": False,
}
PROMPTS = ["import os", "def read(self, name):", "class A:", "for x in range(10):"]


@pytest.fixture(scope="module")
def trained(neox_checkout, token_data, tokenizer_file, make_once) -> Path:
    """A hybrid after two steps on one rank, in `checkpoints`; converted, in `hf`; on two
    tensor-parallel ranks, in `tensor`; in two pipeline stages, in `pipeline`."""

    def make(folder: Path) -> None:
        checkpoints = folder / "checkpoints"
        saving = {"save": str(checkpoints), "checkpoint_factor": 2}
        train(
            neox_checkout, settings(token_data, tokenizer_file, **HYBRID, **saving), folder / "run"
        )
        export(neox_checkout, checkpoints, folder / "hf")
        for name, tp, pp in (("tensor", 2, 0), ("pipeline", 1, 2)):
            convert(
                reshape_neox, neox_checkout, "--checkpoint", checkpoints,
                "--output", folder / name, "--tensor-parallel", tp, "--pipeline-parallel", pp,
            )  # fmt: skip

    return make_once("generating hybrid", make)


@pytest.fixture(scope="module")
def hugging_face(trained):
    """Returns a function that continues a text greedily, and the model's tokenizer and model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import megatron_patch.hf  # noqa: F401

    tokenizer = AutoTokenizer.from_pretrained(trained / "hf")
    model = AutoModelForCausalLM.from_pretrained(trained / "hf").eval()

    def continued(text: str, count: int) -> str:
        ids = tokenizer(text)["input_ids"] or [tokenizer.eos_token_id]
        whole = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
        return tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)

    return continued, tokenizer, model


@pytest.fixture
def generating(trained, token_data, tokenizer_file, tmp_path):
    """Returns a function that gives the settings of generate.py for a layout."""

    def configure(folder: str, tp: int = 1, pp: int = 0, **changes) -> dict:
        loading = {"load": str(trained / folder), "finetune": True, "num_gpus": 2}
        asked = {"sample_output_file": str(tmp_path / "samples.jsonl"), "maximum_tokens": 12}
        return settings(
            token_data, tokenizer_file, tp, pp, **{**HYBRID, **loading, **asked, **changes}
        )

    return configure


@pytest.mark.parametrize(
    ("folder", "tp", "pp"), [("checkpoints", 1, 0), ("tensor", 2, 0), ("pipeline", 1, 2)]
)
def test_prompts_of_a_file_are_continued_as_by_the_converted_model(
    neox_checkout, generating, hugging_face, tmp_path, folder, tp, pp
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    config = generating(folder, tp, pp, text_gen_type="input-file", sample_input_file=str(prompts))
    run = neox(neox_checkout, "generate.py", config, tmp_path)
    assert run.returncode == 0, run.output[-6000:]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["context"] for sample in samples] == PROMPTS
    continued = [hugging_face[0](prompt, 12) for prompt in PROMPTS]
    assert [sample["text"] for sample in samples] == continued and len(set(continued)) == 4


def test_unconditional_samples_are_written_once(neox_checkout, generating, hugging_face, tmp_path):
    """Two data-parallel ranks."""
    config = generating("checkpoints", text_gen_type="unconditional", num_samples=3)
    run = neox(neox_checkout, "generate.py", config, tmp_path)
    assert run.returncode == 0, run.output[-6000:]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["text"] for sample in samples] == 3 * [hugging_face[0]("", 12)]


def test_prompts_are_typed(neox_checkout, generating, hugging_face, tmp_path):
    """On two pipeline stages, of which one reads. The input's end is no failure."""
    config = generating("pipeline", pp=2, text_gen_type="interactive", prompt_end="END")
    typed = f"{PROMPTS[0]}END\n\n{PROMPTS[1]}\nEND\n\n"
    run = neox(neox_checkout, "generate.py", config, tmp_path, typed)
    assert run.returncode == 0, run.output[-6000:]
    for prompt in (PROMPTS[0], PROMPTS[1] + "\n"):
        assert f"Generated Text: {as_text(hugging_face[0](prompt, 12))}\n" in run.output
    assert "Traceback" not in run.output


def as_text(text: str) -> str:
    """Returns a text as a pipe in text mode gives it back."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def test_cached_steps_read_one_token_and_give_the_logits_of_the_whole_text(
    in_neox, generating, hugging_face
):
    """Greedy steps with the cache in a batch of prompts of other lengths and one by one, against
    recomputed ones. Every layer reads the prompt once, then one token a step."""
    code = """
    from megatron import text_generation_utils
    from megatron.text_generation_utils import stream_tokens
    from megatron.training import setup_model_and_optimizer
    neox_args.optimizer, neox_args.no_load_optim = None, True
    engine, *_ = setup_model_and_optimizer(neox_args, use_cache=True)
    model = engine.module
    seen, logits = [], []
    for layer in model.sequential[2:5]:
        layer.register_forward_hook(lambda layer, x, y: seen.append(x[0][0].shape[0]))
    model.sequential[-1].register_forward_hook(
        lambda layer, x, y: logits.append((y if torch.is_tensor(y) else y[0])[0, -1].tolist()))
    prompts = settings["prompts"]
    def tokens(prompts, recompute=False):
        model.inference_mode(use_cache=not recompute)
        count = 20 + max(map(len, prompts)) - min(map(len, prompts))
        for out, *_ in stream_tokens(
            neox_args, engine, prompts, maximum_tokens=count, recompute=recompute
        ):
            pass
        return [row[len(p) : len(p) + 20].tolist() for p, row in zip(prompts, out)]
    first = tokens(prompts[:1])
    of_first = seen[:], logits[:]
    alone = first + [row for p in prompts[1:] for row in tokens([p])]
    again = [row for p in prompts for row in tokens([p], recompute=True)]
    answer([alone, tokens(prompts), again, *of_first])
    """
    _, tokenizer, model = hugging_face
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    config = generating("checkpoints")
    code = f"settings['prompts'] = {prompts}\n" + textwrap.dedent(code)
    alone, batch, recomputed, seen, logits = in_neox(config, code)
    assert alone == batch == recomputed
    assert seen == [len(prompts[0])] * 3 + [1] * 3 * 19
    whole = torch.tensor([prompts[0] + alone[0]])
    with torch.no_grad():
        expected = model(whole).logits[0, len(prompts[0]) - 1 : -1]
    torch.testing.assert_close(
        torch.tensor(logits)[:, : expected.shape[1]], expected, rtol=0, atol=1e-4
    )


def test_sampling_and_stop_tokens(in_neox, config, tmp_path):
    """Sampled tokens have a word, and are among the best `top_k` or the fewest whose probabilities
    exceed `top_p`. Stop tokens end the completions that have them, not prompts that have them. The
    first rank alone writes."""
    code = f"settings['output'] = {str(tmp_path / 'samples')!r}\n" + textwrap.dedent("""
    from types import SimpleNamespace
    from megatron import text_generation_utils
    from megatron.text_generation_utils import generate_samples_from_prompt, stream_tokens
    from megatron.training import setup_model_and_optimizer
    from megatron_patch.neox.upstream_fixes import generation
    neox_args.optimizer, neox_args.no_load_optim = None, True
    engine, *_ = setup_model_and_optimizer(neox_args, use_cache=True)
    engine.module.inference_mode(use_cache=True)
    logits = []
    engine.module.sequential[-1].register_forward_hook(
        lambda layer, x, y: logits.append((y if torch.is_tensor(y) else y[0])[0, -1].tolist()))
    def run(prompts, count=30, **options):
        logits.clear()
        for out, start, end, _, is_done in stream_tokens(
            neox_args, engine, prompts, maximum_tokens=count, **options
        ):
            pass
        rows = [row[len(p) :] for p, row in zip(prompts, out.tolist())]
        return [rows, end.tolist(), is_done.tolist(), logits[:]]
    prompt = [7, 8, 9]
    sampled = [run([prompt], temperature=2.0), run([prompt], temperature=2.0, top_k=3),
               run([prompt], temperature=2.0, top_p=0.5)]
    (greedy,), *_ = run([prompt])
    stops = [greedy[4:6], [greedy[20]]]
    longer = prompt + [5] + stops[1] + [6, 6]
    stopped = [run([prompt], stop_tokens=stops), run([prompt], stop_tokens=stops),
               run([prompt, longer], stop_tokens=stops)]
    unstopped, *_ = run([prompt, longer])
    written = []
    for rank in (1, 0):
        names = {**vars(torch.distributed), "get_rank": lambda: rank}
        generation.dist = SimpleNamespace(**names)
        text_generation_utils.generate_samples_unconditional(
            neox_args, engine, 1, output_file=settings["output"], maximum_tokens=1)
        written.append(os.path.exists(settings["output"]))
    answer([sampled, greedy, stopped, unstopped, written])
    """)
    config |= {"make_vocab_size_divisible_by": 640, "init_method_std": 0.2}
    config |= {"metala": {"init": "neox"}, "init_method": "normal"}
    sampled, greedy, stopped, unstopped, written = in_neox(config, code)
    assert written == [False, True]
    words = 512
    for (rows, _, _, logits), (top_k, top_p) in zip(
        sampled, ((words, 1.0), (3, 1.0), (words, 0.5)), strict=True
    ):
        for token, step in zip(rows[0], torch.tensor(logits), strict=False):
            assert token < words and len(step) == 640
            best = step[:words].div(2).softmax(0).sort(descending=True)
            rank = (best.indices == token).nonzero().item()
            assert rank < top_k and best.values[:rank].sum() <= top_p
        assert rows[0][:30] != greedy[:30]
    assert greedy[20] not in greedy[:20] + greedy[4:6]
    for rows, end, is_done, logits in stopped[:2]:  # what a caller gives is not changed
        assert rows[0][:6] == greedy[:6] and len(logits) == 6
        assert (end, is_done) == ([3 + 4], [True])
    rows, end, is_done, _ = stopped[2]
    assert rows[0][:6] == greedy[:6] and end[0] == 3 + 4 and is_done[0]
    wanted = unstopped[1]
    length = 7
    assert end[1] >= length and rows[1][: end[1] - length + 1] == wanted[: end[1] - length + 1]
