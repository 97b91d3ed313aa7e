"""What a run leaves behind: folder, checkpoints, ledger, summary."""
