"""The DeepSpeed learner: model, algorithms, objectives, checkpoints and weight publishing."""
