"""What can be trained on: each task turns rows into work for a session, and measures what was learned."""
