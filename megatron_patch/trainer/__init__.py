"""The embedded engine: GPT-NeoX's settings and data, trained by the Hugging Face Trainer.

For a machine without GPT-NeoX. `scripts/train_hf.py` is its command.
"""
