"""What a user of TRL brings along."""
