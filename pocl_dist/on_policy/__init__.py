"""The student's own answers: when (`policy`), how (`rollout`), once more (`replay_buffer`)."""
