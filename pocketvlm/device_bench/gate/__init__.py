"""Whether one bundle is worse than another by more than is allowed."""
