"""Files that are whole or missing, and small files read within a bound."""
