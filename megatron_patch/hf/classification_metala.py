"""The forward pass of MetaLA models that give a sequence numbers, as reward models do."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


class MetaLAClassificationMixin:
    """Reads `config.num_labels` numbers off each row's last token. The class has a `model` and a
    linear head `score`."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.model.set_input_embeddings(value)

    # transformers 4.46's Trainer looks for the name `loss_kwargs` before it passes
    # `num_items_in_batch`.
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        # In the signature, where `pipeline` looks for whether it can switch the cache off.
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **loss_kwargs: Any,
    ) -> tuple | SequenceClassifierOutputWithPast:
        """Runs the model and the head.

        Args:
            attention_mask: [B, T], 0 for padding, on either side. Without one a row ends with its
                last column.
            labels: [B], or [B, num_labels] for several numbers; see transformers' `problem_type`.
            num_items_in_batch: divides the summed loss in place of the number of labels. The
                Trainer passes it where it accumulates gradients.
            loss_kwargs: other arguments of `MetaLAModel.forward`.

        Returns:
            `loss` if labels are given, `logits` [B, num_labels], `past_key_values`,
            `hidden_states`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **loss_kwargs,
        )
        # Padding behind a row's last token has the result of that token.
        logits = self.score(outputs.last_hidden_state[:, -1])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            if num_items_in_batch is not None:  # transformers' losses of sequences do not read it
                loss = loss * (labels != -100).sum() / num_items_in_batch
        found = SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return found if return_dict else found.to_tuple()
