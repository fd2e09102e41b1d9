"""Train an aligner from question-answer-correction data: rows in, checkpoint out."""
