"""Converting checkpoints: GPT-NeoX to Hugging Face and back, and between parallel layouts."""
