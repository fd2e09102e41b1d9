"""Figures on question-answer-correction data, and benchmarks."""
