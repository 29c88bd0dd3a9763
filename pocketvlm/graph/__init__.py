"""The phone's graphs, written once over operators: torch's definition and every target run them."""
