"""FFN channels and KV groups removed whole."""
