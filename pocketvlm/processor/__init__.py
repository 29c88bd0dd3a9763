"""Processor: the image processor, tokenizer and chat template as stock transformers runs them."""

from pocketvlm.processor.processor import (
    PROCESSOR_FILES,
    RUNTIME_FILES,
    Message,
    Processor,
    user_message,
)

__all__ = ["PROCESSOR_FILES", "RUNTIME_FILES", "Message", "Processor", "user_message"]
