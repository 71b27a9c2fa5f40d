"""MetaLA models that give a sequence numbers in place of words: reward models (one number)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from .configuration_metala import MetaLAConfig
from .modeling_metala import MetaLAModel
from .pretrained_metala import MetaLAPreTrainedModel


class MetaLAForSequenceClassification(MetaLAPreTrainedModel):
    """MetaLA model with a linear head of `config.num_labels` numbers on each row's last token. An
    exported reward model has one, the reward."""

    def __init__(self, config: MetaLAConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MetaLAModel(config)
        self.score = nn.Linear(config.decoder_embed_dim, config.num_labels, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple | SequenceClassifierOutputWithPast:
        """Runs the model and the head.

        Args:
            attention_mask: [B, T], 0 for padding on either side. Without one, a row ends with its
                last column.
            labels: [B], or [B, num_labels] for several numbers; see transformers' `problem_type`.
            kwargs: other arguments of `MetaLAModel.forward`.

        Returns:
            `loss` if labels are given, `logits` [B, num_labels], `past_key_values`,
            `hidden_states`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        # Padding behind a row's last token has the result of that token.
        logits = self.score(outputs.last_hidden_state[:, -1])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        found = SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return found if self.config.return_dict and return_dict is not False else found.to_tuple()


if __name__.startswith("transformers_modules."):
    MetaLAForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["MetaLAForSequenceClassification"]
