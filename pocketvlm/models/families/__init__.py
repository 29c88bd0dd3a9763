"""Families of models: one reader each, `config.json -> ModelSpec`; nothing else knows a family."""
