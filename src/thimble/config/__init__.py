"""Every option, declared once, in one file a command; the command line, YAML, Python and the docs follow from it."""
