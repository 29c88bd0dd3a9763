"""pocketvlm."""
