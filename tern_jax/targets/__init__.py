"""How many weights are zero: thresholds, schedules, budgets."""
