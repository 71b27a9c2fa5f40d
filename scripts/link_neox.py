#!/usr/bin/env python3
"""Runs megatron_patch/commands/link_neox.py; --help describes it."""

from megatron_patch.commands.link_neox import cli

if __name__ == "__main__":
    cli()
