"""What may be claimed of a run, and how it is shown: page, charts, terminal."""
