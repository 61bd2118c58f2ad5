"""What a run leaves: its record, its pictures and page, its W&B run."""
