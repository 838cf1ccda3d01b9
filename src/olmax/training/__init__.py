"""One trainer for every objective: state, step, optimisers, schedules, checkpoints, metrics."""
