"""Lorica: fine-tuning of language models with LoRA and QLoRA. Importing it is cheap: torch loads with the first verb that needs it."""

__version__ = "0.1.0"
