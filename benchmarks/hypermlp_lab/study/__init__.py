"""The paper's controlled study again: tasks, variants, a plan of runs, statistics and a report."""
