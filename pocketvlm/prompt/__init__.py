"""Messages to token ids: roles, chat templates, special tokens, and when an answer ends."""
