"""Files of anybody: read within bounds, written whole, signed."""
