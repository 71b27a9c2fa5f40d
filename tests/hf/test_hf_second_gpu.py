"""A model on the second GPU while the first is the current one."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.hf import MetaLACache

SIZES = dict(decoder_embed_dim=256, glu_dim=384, decoder_layers=3)  # K 64, V 128


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("graph", [None, "eager", "compiled"])
def test_generation_on_the_second_gpu(tiny_model, tokens, graph):
    """Greedy tokens and logits equal those of float64 on the CPU, with and without a CUDA graph."""
    assert torch.cuda.current_device() == 0
    # From now on PyTorch captures on a stream of the first GPU unless it is given another.
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
    model, oracle = tiny_model(**SIZES).to("cuda:1"), tiny_model(torch.float64, **SIZES)
    prompt = tokens(2, 70)
    found = model.generate(
        prompt.to("cuda:1"),
        past_key_values=MetaLACache(model.config, decoding_graph=graph),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert found.sequences.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    sequences = found.sequences.cpu()
    with torch.no_grad():
        wanted = oracle(sequences[:, :-1], use_cache=False).logits[:, prompt.shape[1] - 1 :]
    logits = torch.stack(found.logits, dim=1).cpu().double()
    assert (logits - wanted).norm() <= 1e-4 * wanted.norm()
    assert torch.equal(logits.argmax(-1), sequences[:, prompt.shape[1] :])
