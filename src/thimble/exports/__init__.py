"""From an adapter to what other programs run, and the proof that it does there what it does here."""
