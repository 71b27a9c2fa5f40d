"""GPT-NeoX checkpoints to Hugging Face folders, and between GPT-NeoX's own layouts."""
