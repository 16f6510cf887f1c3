"""From requests to tokens: engine, sampling, conversation."""
