"""`dtl doctor`: what would go wrong on this machine, before it does. Probing is apart from judging, so that any machine can be judged."""
