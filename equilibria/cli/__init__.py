"""The command line: `equilibria train`, `equilibria eval`, `equilibria generate`."""
