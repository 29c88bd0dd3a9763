"""Messages to token ids: roles, chat templates, special tokens, end tokens."""
