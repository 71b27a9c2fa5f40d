"""Fixtures of the Hugging Face tests: tiny models in which every term of the formulas counts."""

import pytest
import torch

from megatron_patch.hf import MetaLAConfig, MetaLAForCausalLM
from tests.conftest import small_config

VOCABULARY = 61
# A hybrid that uses every option: attention below MetaLA, one key-value head for two query heads,
# half of a head rotated, biases, and an MLP of another width.
HYBRID = dict(
    layer_types=["full_attention", "linear_attention"],
    num_key_value_heads=1,
    attention_bias=True,
    attention_glu_dim=24,
    attention_glu_bias=True,
    rope_theta=100.0,
    partial_rotary_factor=0.5,
)
KINDS = {"metala": {}, "hybrid": HYBRID}
# Lets `generate` run to its last token.
NO_END = dict(eos_token_id=None, pad_token_id=0)


def same(left: torch.Tensor, right: torch.Tensor) -> None:
    """Asserts that float64 tensors are equal up to rounding."""
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config():
    """A function that returns a configuration of 2 layers, width 32 and 2 heads, with changes."""

    def build(**changes) -> MetaLAConfig:
        special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
        return small_config(**{"vocab_size": VOCABULARY, **special, **changes})

    return build


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """A function that returns a model in evaluation mode whose parameters are all random.

    With the usual initialisation `aug_balance` and the biases would be zero, and the logits too
    small to tell a mistake from rounding.
    """

    def build(dtype=torch.float32, **changes) -> MetaLAForCausalLM:
        model = MetaLAForCausalLM(tiny_config(**changes))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "norm" in name:
                    parameter.copy_(1 + 0.3 * noise)
                else:
                    parameter.copy_(
                        noise * (1.0 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
                    )
        return model.to(dtype).eval()

    return build


@pytest.fixture(scope="module", params=KINDS)
def model(tiny_model, request):
    """A pure MetaLA model and a hybrid, in float64 so that no two tokens tie."""
    return tiny_model(torch.float64, **KINDS[request.param])


@pytest.fixture(scope="session")
def tokens():
    """A function that returns random int64 [batch, time] without special tokens."""

    def build(batch: int, time: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(
            3, VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed)
        )

    return build
