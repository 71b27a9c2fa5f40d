"""The settings for a hybrid's MLP widths, against GPT-NeoX's own arithmetic."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_patch.architecture import Architecture, AttentionLayers
from megatron_patch.architecture_neox import to_neox


def neox_widths(hidden: int, settings: dict) -> tuple[int, int] | None:
    """Returns the widths of the two MLPs, as `metala` layers and GPT-NeoX's `ParallelMLP` compute
    them, or `None` where the two matrices of `ParallelMLP` would not fit each other."""
    total, factor = settings.get("intermediate_size"), settings.get("expansion_factor")
    multiple = settings.get("mlp_multiple_of", 1)
    ffn_dim = total or (int(factor * hidden) if factor else 4 * hidden)
    ffn_dim = int(ffn_dim * 2 / 3)
    width = (ffn_dim // 2 + multiple - 1) // multiple * multiple
    if (ffn_dim + 2 * multiple - 1) // (2 * multiple) * multiple != width:
        return None
    own = total or (int(factor * hidden) if factor else -(-8 * hidden // 768) * 256)
    return own, width


@given(
    hidden=st.sampled_from([16, 32, 48, 64, 96, 256, 1024]),
    size=st.one_of(
        st.fixed_dictionaries({"intermediate_size": st.integers(1, 3000)}),
        st.fixed_dictionaries({"expansion_factor": st.floats(0.5, 8)}),
        st.just({}),
    ),
    multiple=st.one_of(
        st.just({}), st.fixed_dictionaries({"mlp_multiple_of": st.integers(1, 512)})
    ),
)
def test_whatever_widths_gpt_neox_gives_are_found_again(hidden, size, multiple):
    widths = neox_widths(hidden, size | multiple)
    assume(widths is not None and min(widths) > 0)
    model = Architecture(
        num_layers=2,
        hidden_size=hidden,
        num_heads=1,
        intermediate_size=widths[0],
        layer_types=("metala", "global"),
        attention=AttentionLayers(1, widths[1], True, True),
    )
    assert neox_widths(hidden, to_neox(model)) == widths
