"""`dtl doctor`: checks a machine before a run. Probing is separate from judging, so that any machine can be judged in a test."""
