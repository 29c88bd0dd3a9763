"""The certificate: whether an artifact answers like the checkpoint that was evaluated."""
