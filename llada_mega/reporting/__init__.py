"""What people look at: the HTML report of a run, drawings of attention masks, tables for the terminal."""
