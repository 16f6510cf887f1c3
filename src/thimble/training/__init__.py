"""One training run: plan, loop, step schedule, guard, initialisation, checkpoints, run folder, evaluation."""
