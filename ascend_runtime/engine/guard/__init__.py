"""Finds values that are not finite, frames of one colour and videos that do not move, and says why they may be so."""
