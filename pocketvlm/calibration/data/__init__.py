"""Samples: pictures, conversations, prompts, and where they come from."""
