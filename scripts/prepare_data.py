#!/usr/bin/env python3
"""Runs megatron_patch/commands/prepare_data.py; --help describes it."""

from megatron_patch.commands.prepare_data import cli

if __name__ == "__main__":
    cli()
