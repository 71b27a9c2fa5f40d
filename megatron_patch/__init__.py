"""MetaLA (Meta Linear Attention) for GPT-NeoX and Hugging Face."""

__version__ = "0.1.0"
