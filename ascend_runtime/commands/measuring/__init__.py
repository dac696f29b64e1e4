"""Measures this host with small jobs on real ranks, so that the planner predicts from its own rates."""
