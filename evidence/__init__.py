"""What was measured, and how sure we are: judge, metrics, tables, comparisons, the demo and the sweep over seeds."""
