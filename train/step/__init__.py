"""What is compiled: the step, its loss, its optimizer and its guard."""
