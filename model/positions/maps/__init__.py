"""Position maps, a file for each; model/positions/config.py has the table of them."""
