"""What mode=diagnose measures of a data set and of a model, and how it is told."""
