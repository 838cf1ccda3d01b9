"""Tables, plots and one self-contained HTML report per run."""
