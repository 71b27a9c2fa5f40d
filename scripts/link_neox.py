#!/usr/bin/env python3
"""Runs `megatron_patch.commands.link_neox`; `--help` says how."""

from megatron_patch.commands.command_line import run_script
from megatron_patch.commands.link_neox import main

if __name__ == "__main__":
    run_script(main)
