"""How long `compress` will take in its stages on this host: counted work at measured rates."""
