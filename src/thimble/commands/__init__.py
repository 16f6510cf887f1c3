"""One plain function per command: config in, report out; commands never print."""
