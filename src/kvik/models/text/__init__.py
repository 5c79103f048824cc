"""Text and tokens: tokenizers, how single tokens are spelled, chat templates."""
