"""One plain function per command: config in, report out; verbs never print."""
