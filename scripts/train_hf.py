#!/usr/bin/env python3
"""Runs megatron_patch/commands/train_hf.py; --help describes it."""

from megatron_patch.commands.train_hf import cli

if __name__ == "__main__":
    cli()
