"""Fuzzing of the checkpoint readers: valid checkpoints damaged at random, opened under limits."""
