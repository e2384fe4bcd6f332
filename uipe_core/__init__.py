"""The science of unlearning by parameter extrapolation: corpora, models, training, update vectors, scoring, metrics."""
