"""What runs here: which process runs when, and what becomes of one that dies or lies."""
