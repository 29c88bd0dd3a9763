"""Ways to give the tiles of a picture different numbers of visual tokens."""
