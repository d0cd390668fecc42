"""What each part of a step, a run and an evaluation costs."""
