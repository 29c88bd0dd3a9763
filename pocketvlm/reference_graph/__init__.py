"""What a checkpoint computes, in torch: the definition of truth for every artifact."""
