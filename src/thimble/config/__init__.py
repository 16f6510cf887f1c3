"""Every option, declared once; the command line, YAML, Python and the docs follow from it."""
