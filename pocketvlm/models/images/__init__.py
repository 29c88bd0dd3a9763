"""Pictures: what image processors make of them, as data that their settings hold."""
