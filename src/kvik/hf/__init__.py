"""kvik inside transformers."""
