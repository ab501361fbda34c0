"""What every long run needs: processes that share it, a lock, checkpoints, a log, seeds."""
