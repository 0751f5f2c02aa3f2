"""The files of a run: their names, formats and progress bars."""
