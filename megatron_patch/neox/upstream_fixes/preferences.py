"""Preference training: DPO (arXiv 2305.18290) and KTO (arXiv 2402.01306)."""

from __future__ import annotations

import functools
import sys
from importlib import import_module

import torch

from megatron_patch.neox.patching import in_metala_runs, repairs, swapped
from megatron_patch.neox.post_training import reference_args


# megatron/training.py:644, 659, 707 and 726 call them, and no line imports or defines them.
@repairs("log-probabilities", "megatron.training:forward_step", "get_pos_neg_logp(")
def define_log_probabilities() -> None:
    """Defines the two functions that GPT-NeoX's DPO and KTO call.

    Both take logits [b, s, vocabulary] and labels [b, s], and return log-probabilities [b, s] of
    the labels. KTO gathers the logits of tensor-parallel ranks before the call, DPO does not.
    """
    from megatron import mpu, text_generation_utils, training

    def pairs_of_log_probabilities(
        logits: torch.Tensor, labels: torch.Tensor, force_fp32: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the log-probabilities of the first and of the second half of a batch."""
        logits = (logits.float() if force_fp32 else logits).contiguous()
        # GPT-NeoX makes the labels in inference mode. Their copy may be kept for the backward pass.
        return (-mpu.vocab_parallel_cross_entropy(logits, labels.clone())).chunk(2)

    for name, function in (
        ("get_pos_neg_logp", pairs_of_log_probabilities),
        ("get_logp", text_generation_utils.get_logp),
    ):
        if not hasattr(training, name):
            setattr(training, name, function)


# megatron/training.py:774 and 787 take the mean of a row that ends with zeros where it is padded,
# so the reward of a sample would shrink with its length.
@repairs("rewards of KTO", "megatron.training:forward_step", "reward1.mean(-1)")
def give_each_token_the_reward() -> None:
    """Gives all positions of a sample its reward, padding too."""
    from megatron.training import get_batch

    @in_metala_runs(get_batch)
    def get_batch_with_rewards(get_batch, neox_args, data_iterator):
        batch = get_batch(neox_args, data_iterator)
        if neox_args.train_impl != "kto":
            return batch
        *others, rewards, reference = batch
        return *others, rewards[:, :1].expand_as(rewards), reference


# megatron/training.py:611 takes the n-th label of all rows for that of the n-th row.
@repairs("labels of rewards", "megatron.training:forward_step", "pos_loss_mask.nonzero()")
def check_labels_of_rewards() -> None:
    """Ends a training of a reward model at a document that has no label, or several."""
    from megatron.training import get_batch

    @in_metala_runs(get_batch)
    def get_batch_with_one_label(get_batch, neox_args, data_iterator):
        batch = get_batch(neox_args, data_iterator)
        if neox_args.train_impl == "rm" and ((found := batch[2].sum(1)) != 1).any():
            sys.exit(  # the rank that reads such a document is often not the first
                f"MetaLA: train_impl: found rm and documents with {found.int().tolist()} labels, "
                "wanted one label in each, behind the token that gets the reward"
            )
        return batch


# megatron/training.py:1243: a run that goes on from its own checkpoint would take that for the
# reference. Line 1227 tells the trained model alone how inputs become a batch.
@repairs("reference model", "megatron.training:setup_model_and_optimizer", "model=reference_model,")
def load_the_reference() -> None:
    """Loads the reference model from the `load` of the YAML files, also when a run goes on."""
    training = import_module("megatron.training")

    @in_metala_runs(training.setup_model_and_optimizer)
    def set_up_with_reference(setup, neox_args, *args, **kwargs):
        load = training.load_checkpoint

        def load_reference(neox_args, **kwargs):
            reference = reference_args(neox_args)
            kwargs["iteration"] = reference.iteration
            return load(neox_args=reference, **kwargs)

        # GPT-NeoX loads the model that is trained first.
        loads = iter((load, load_reference))
        with swapped(training, "load_checkpoint", lambda **kwargs: next(loads)(**kwargs)):
            *model, reference = setup(neox_args, *args, **kwargs)
        if reference is not None:
            batch_fn = functools.partial(training.get_batch_sequential, neox_args=neox_args)
            reference.module.set_batch_fn(batch_fn)
        return *model, reference
