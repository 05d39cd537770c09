"""The file that batch jobs are kept in: its form and what is asked of it. Blocks; knows no loop and decides nothing."""
