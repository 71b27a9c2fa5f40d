"""The base class of the MetaLA models: transformers' switches, initialisation, weight decay."""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import nn
from transformers import trainer_pt_utils
from transformers.modeling_utils import PreTrainedModel

try:  # transformers 5: these leave weights alone that came from a checkpoint
    from transformers import initialization as init
except ImportError:
    from torch.nn import init

from .architecture_metala import QUERY_GATE_GAIN
from .configuration_metala import MetaLAConfig
from .layers_metala import MetaLARMSNorm, MetaLAShortConvolution, MetaLATokenMixer


class MetaLAPreTrainedModel(PreTrainedModel):
    """Base class of the MetaLA models."""

    config_class = MetaLAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # transformers reads here that a state cannot go back, and refuses assisted decoding.
    _is_stateful = True
    _supports_cache_class = True  # transformers 4.4x: a Cache, not tuples of keys and values
    _supports_sdpa = True  # for the attention layers of a hybrid
    _no_split_modules = ["MetaLADecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(self, config: MetaLAConfig, *args: Any, **kwargs: Any):
        # Again, since from_pretrained(..., key=value) sets values after the configuration's check.
        config.check_values()
        super().__init__(config, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises a module as the authors do.

        Embeddings and linears get normal(init_std), queries and gates xavier-uniform with gain
        2 ** -2.5, the convolution PyTorch's default, biases and `aug_balance` zero.
        """
        if isinstance(module, nn.Linear):
            if getattr(module, "_is_query_or_gate", False):
                init.xavier_uniform_(module.weight, gain=QUERY_GATE_GAIN)
            else:
                init.normal_(module.weight, mean=0.0, std=self.config.init_std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.init_std)
        elif isinstance(module, MetaLAShortConvolution):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, MetaLARMSNorm) and module.weight is not None:
            init.ones_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, MetaLATokenMixer) and module.aug_balance is not None:
            init.zeros_(module.aug_balance)


# The Trainer applies weight decay to the parameters that this function names. It leaves out biases,
# and norms by class (transformers 4) or by name (5). A model has no say otherwise.
_get_parameter_names = trainer_pt_utils.get_parameter_names


@functools.wraps(_get_parameter_names)
def _parameter_names_to_decay(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """Leaves out the parameters that our own modules list as `no_weight_decay`.

    transformers' function calls itself for each submodule, by its name in its module, so it calls
    this one.
    """
    own = isinstance(model, (MetaLARMSNorm, MetaLATokenMixer))
    left_out = model.no_weight_decay if own else ()
    return [name for name in _get_parameter_names(model, *args, **kwargs) if name not in left_out]


trainer_pt_utils.get_parameter_names = _parameter_names_to_decay
