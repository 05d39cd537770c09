"""What clients can ask for: one file per group, and the table that names them all."""
