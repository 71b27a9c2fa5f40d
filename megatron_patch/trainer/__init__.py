"""Trains on GPT-NeoX's settings and data with the Hugging Face Trainer, where GPT-NeoX is not.

`metala-train` (scripts/train_hf.py) is its command.
"""
