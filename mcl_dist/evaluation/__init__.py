"""Protocols that score a frozen or fine-tuned representation."""
