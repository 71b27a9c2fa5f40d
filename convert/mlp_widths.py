"""GPT-NeoX's settings for the widths of a hybrid's MLPs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from convert.command import ConvertError
from megatron_patch.neox.settings import (
    SettingsError,
    attention_intermediate_size,
    metala_intermediate_size,
)


def hybrid_mlp_settings(config: Any) -> dict[str, int | None]:
    """`intermediate_size` and `mlp_multiple_of` of a hybrid `MetaLAConfig`.

    A metala layer's MLP is `intermediate_size` wide; GPT-NeoX gives its own a third of that,
    rounded up to a multiple of `mlp_multiple_of`, which is here the width itself. Where
    `intermediate_size` is left out, they are 8/3 and 4/3 of the hidden size.

    Raises:
        ConvertError: no settings give both widths.
    """
    wanted = (config.glu_dim, config.attention_glu_dim)
    for size in (config.glu_dim, None):
        settings = {"intermediate_size": size, "mlp_multiple_of": config.attention_glu_dim}
        args = SimpleNamespace(hidden_size=config.hidden_size, expansion_factor=None, **settings)
        try:
            if (metala_intermediate_size(args), attention_intermediate_size(args)) == wanted:
                return settings
        except SettingsError:
            pass
    raise ConvertError(
        f"attention_glu_dim: found {config.attention_glu_dim}, which no settings of GPT-NeoX give "
        f"beside glu_dim {config.glu_dim}, wanted at least a third of it"
    )
