"""What a hyperparameter search is, without Ray: the space, the proposals, the trials on disk, the leaderboard."""
