"""What pays for a model: levers in milliseconds, and the budget law of tokens and size."""
